"""Weights in 8 bits: quantised by row, and the same bits in every batch."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import dflash_kernels as dk
from dflash_kernels import reference
from dflash_kernels.testing import assert_within_budget, doubles, same_bits

SHAPES = [(1, 1, 1), (1, 16, 32), (3, 17, 33), (8, 100, 64), (16, 64, 96), (17, 130, 40), (70, 48, 33), (0, 32, 32)]


def problem(dtype, rows, n, k):
    x, w = torch.randn(rows, k).to(dtype), torch.randn(n, k) / k**0.5
    return x, *dk.quantize_weight(w.to(dtype)), torch.randn(n).to(dtype)


def test_each_element_is_off_by_half_a_step_at_most(dtype):
    w = (torch.randn(40, 70) * torch.logspace(-6, 3, 40)[:, None]).to(dtype)
    w[7] = 0
    before = w.clone()
    q, scales = dk.quantize_weight(w)
    top = w.float().abs().amax(1)
    assert q.dtype == torch.int8 and scales.dtype == torch.float32 and same_bits(w, before)
    assert ((q * scales[:, None] - w.float()).abs() <= scales[:, None] * 0.5001).all()
    assert q.abs().amax(1).tolist() == [127 * (t > 0) for t in top.tolist()]
    assert (q[7] == 0).all() and scales[7] == 1


def test_packing_is_lossless():
    q, scales = torch.randint(-128, 128, (45, 70), dtype=torch.int8), torch.rand(45)
    packed = dk.pack_weight(q.T.contiguous().T, torch.rand(90)[::2].copy_(scales))
    assert torch.equal(reference.linear.unpack(packed.data, 45, 70), q)
    index = torch.tensor([44, 0, 15, 16, 16, 31])
    assert torch.equal(packed.rows(index), q[index] * scales[index, None])
    with FakeTensorMode():
        q, scales = torch.empty(45, 70, dtype=torch.int8, device="cuda"), torch.empty(45, device="cuda")
        assert dk.pack_weight(q, scales).data is q


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_matches_reference(isa, dtype, shape):
    x, q, scales, b = problem(dtype, *shape)
    for bias in (b, None):
        want = torch.empty(shape[:2], dtype=torch.float64)
        reference.linear.linear(*doubles(x), q, *doubles(scales), 0, *doubles(bias), shape[1], want)
        like = F.linear(x, (q * scales[:, None]).to(dtype), bias) if shape[0] else None
        assert_within_budget(dk.linear(x, dk.pack_weight(q, scales), bias), want, like, ulps=2)


@pytest.mark.parametrize("n,k", [(96, 64), (80, 45), (16, 2304)])
def test_a_row_has_the_same_bits_whatever_stands_beside_it(isa, dtype, n, k):
    x, q, scales, b = problem(dtype, 70, n, k)
    packed = dk.pack_weight(q, scales)
    whole = dk.linear(x, packed, b)
    for start, width in [(0, 1), (69, 1), (13, 3), (8, 8), (31, 16), (5, 17), (5, 33)]:
        assert same_bits(dk.linear(x[start:start + width], packed, b), whole[start:start + width])


def test_bits_do_not_depend_on_threads(isa, dtype, by_threads):
    x, q, scales, _ = problem(dtype, 5, 600, 256)
    packed = dk.pack_weight(q, scales)
    got = by_threads(lambda: dk.linear(x, packed))
    assert same_bits(got[0], got[1]) and same_bits(got[0], got[2])


def test_scales_that_round_nothing_give_the_bits_of_the_weight_that_they_make(isa, dtype):
    x, q, _, b = problem(dtype, 20, 100, 130)
    scales = torch.exp2(torch.randint(-6, 3, (100,)).float())
    w = (q * scales[:, None]).to(dtype)
    eight, plain = dk.pack_weight(q, scales), dk.pack_weight(w)
    for rows in (1, 8, 20):
        got, want = dk.linear(x[:rows], eight, b), dk.linear(x[:rows], plain, b)
        assert same_bits(got, want), rows


@pytest.mark.parametrize("rows", [1, 8, 65])
def test_heads_see_what_linear_writes(isa, dtype, rows):
    x, q, scales, b = problem(dtype, rows, 1000, 64)
    packed = dk.pack_weight(q, scales)
    for bias in (None, b):
        logits = dk.linear(x, packed, bias)
        ids, values = dk.lm_head_argmax(x, packed, bias=bias, num_valid=990)
        assert torch.equal(ids, logits[:, :990].argmax(-1))
        assert torch.equal(values, logits[:, :990].max(-1).values.float())
        first, top, _ = dk.lm_head_topk(x, packed, 4, bias=bias, num_valid=990)
        assert torch.equal(first[:, 0], ids) and torch.equal(top, logits[:, :990].float().topk(4).values)


def test_bad_input_names_what_was_expected_and_got():
    w, q, scales = torch.randn(4, 8), torch.zeros(4, 8, dtype=torch.int8), torch.ones(4)
    with pytest.raises(ValueError, match="quantize_weight: weight must be finite and not empty"):
        dk.quantize_weight(torch.full((4, 8), float("inf")))
    with pytest.raises(TypeError, match=r"quantize_weight: weight must be .* got int8 \(4, 8\)"):
        dk.quantize_weight(q)
    with pytest.raises(TypeError, match="pack_weight: scales must be given for an int8 weight; got None"):
        dk.pack_weight(q)
    with pytest.raises(TypeError, match=r"pack_weight: weight must be int8 \(N, K\); got float32 \(4, 8\)"):
        dk.pack_weight(w, scales)
    with pytest.raises(ValueError, match=r"pack_weight: scales must have shape \(N,\) = \(4\); got float32 \(3,\)"):
        dk.pack_weight(q, scales[:3])
    data = dk.pack_weight(q, scales).data
    with pytest.raises(TypeError, match="PackedWeight: data must be a tensor of float32, .* got torch.int8"):
        dk.PackedWeight(data, 4, 8)
    with pytest.raises(TypeError, match="PackedWeight: scales must be a tensor of float32; got torch.float64"):
        dk.PackedWeight(data, 4, 8, scales.double())
    with pytest.raises(ValueError, match=r"PackedWeight: scales must be contiguous \(4,\) on cpu; got \(5,\)"):
        dk.PackedWeight(data, 4, 8, torch.ones(5))
    with pytest.raises(ValueError, match=r"linear: x must have 8 = weight's K columns; got float32 \(2, 9\)"):
        dk.linear(torch.randn(2, 9), dk.PackedWeight(data, 4, 8, scales))
