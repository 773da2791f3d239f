"""On the GPU: weights in blocks against the elements that they stand for, and one answer for each row."""

import pytest
import torch
import torch.nn.functional as F

import dflash_kernels as dk
from bench.random_blocks import blocks
from dflash_kernels import reference
from dflash_kernels.formats import EVERY
from dflash_kernels.testing import assert_within_budget, same_bits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


def problem(name, dtype, rows, n, k):
    w = blocks(name, n, k).cuda()
    packed = dk.pack_weight(w, format=name)
    wide = reference.quant.widen(reference.quant_gpu.pack(w, name), name, n, k).to(dtype)
    return torch.randn(rows, k, device="cuda").to(dtype), packed, wide, torch.randn(n, device="cuda").to(dtype)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("n,k", [(100, 256), (1000, 2816)])
def test_products_and_rows_of_blocks(dtype, name, n, k):
    x, packed, wide, b = problem(name, dtype, 150, n, k)
    whole = dk.linear(x, packed, b)
    truth = F.linear(x.double(), wide.double(), b.double())
    assert_within_budget(whole, truth, F.linear(x, wide, b), ulps=2)
    firsts = dk.lm_head_topk(x, packed, 8, bias=b)
    assert torch.equal(firsts[1], whole.float().topk(8).values)
    assert torch.equal(whole.float().gather(1, firsts[0]), firsts[1])
    for start, rows in ((0, 1), (149, 1), (7, 16), (20, 17), (40, 33), (60, 65), (100, 50)):
        at = slice(start, start + rows)
        assert same_bits(dk.linear(x[at], packed, b), whole[at]), (start, rows)
        ids, values = dk.lm_head_argmax(x[at], packed, bias=b)
        best = whole[at].float()
        assert torch.equal(values, best.max(-1).values), (start, rows)
        assert torch.equal(ids, (best == values[:, None]).int().argmax(-1)), (start, rows)
        got = dk.lm_head_topk(x[at], packed, 8, bias=b)
        assert all(same_bits(a, t[at]) for a, t in zip(got, firsts, strict=True)), (start, rows)


@pytest.mark.parametrize("name", EVERY)
def test_lookups_in_blocks(dtype, name):
    _, packed, wide, _ = problem(name, dtype, 1, 100, 512)
    ids = torch.tensor([[99, 0, 17], [-1, 2**40, 7]], device="cuda")
    out = torch.empty(2, 3, 512, dtype=dtype, device="cuda")
    dk.embed_tokens(ids, packed, out=out)
    assert torch.equal(out, dk.embed_tokens(ids, wide))
    lens = torch.tensor([5, 9], dtype=torch.int32, device="cuda")
    block = dk.prepare_block(torch.tensor([3, 99], device="cuda"), lens, 4, 20, embedding=packed)
    assert torch.equal(block.rows, dk.embed_tokens(block.ids, packed))
    assert torch.equal(packed.rows(torch.tensor([5, 99], device="cuda")).to(dtype), wide[[5, 99]])


def test_bad_input_names_what_was_expected_and_got():
    w = blocks("q4_1", 20, 64).cuda()
    packed = dk.pack_weight(w, format="q4_1")
    assert packed.exact and packed.data.shape == (1, 32, 160) and packed.data.device == w.device
    with pytest.raises(ValueError, match="PackedWeight: exact must be True where there is a format on CUDA; got"):
        dk.PackedWeight(packed.data, 20, 64, format="q4_1")
    with pytest.raises(ValueError, match=r"data must be contiguous \(1, 32, 160\), as pack_weight lays it out; got"):
        dk.PackedWeight(packed.data[:, :16], 20, 64, format="q4_1", exact=True)
    with pytest.raises(ValueError, match="rows of whole blocks of 20 bytes, as q4_1 has"):
        dk.pack_weight(w[:, :-1], format="q4_1")
    with pytest.raises(ValueError, match="linear: weight must be on cpu; got cuda:0"):
        dk.linear(torch.randn(2, 64), packed)
