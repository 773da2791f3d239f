"""Weights in blocks: what they widen to, and products with the bits of those with the widened weights."""

import pytest
import torch
import torch.nn.functional as F

from bench.random_blocks import blocks
from dflash_kernels import reference
from dflash_kernels._triton import block as triton_block
from dflash_kernels._triton import linear as triton_linear
from dflash_kernels._triton import lm_head as triton_head
from dflash_kernels._triton import lm_head_topk as triton_topk
from dflash_kernels.formats import EVERY, EXACT, FORMATS, gpu_shape
from dflash_kernels.testing import assert_within_budget, doubles, same_bits

FORMAT = pytest.mark.parametrize("name", EVERY)
CHUNK = triton_linear.CHUNK


@pytest.fixture(params=[torch.float32, torch.float16], ids=["f32", "f16"])
def dtype(request):
    return request.param


def elements(name, rows, n, k):
    """The weight by the CPU's layout, or of groups of 128 by their definition: none of it is the GPU's."""
    if name in FORMATS:
        return reference.quant.widen(reference.quant.pack(rows, name), name, n, k)
    b = rows.view(n, -1, EVERY[name].bytes)
    d, zero = b[..., :2].contiguous().view(torch.float16).float(), b[..., 2:3].float() if name[0] == "u" else 8
    return (d * (torch.cat([b[..., -64:] & 15, b[..., -64:] >> 4], -1).float() - zero)).reshape(n, k)


def problem(name, dtype, rows, n, k):
    """x, the packed weight, the number of its format, its elements in dtype, a bias."""
    w = blocks(name, n, k)
    packed = reference.quant_gpu.pack(w, name)
    assert packed.shape == gpu_shape(EVERY[name], n, k)
    x = torch.randn(rows, k).to(dtype)
    return x, packed, EVERY[name].number + EXACT, elements(name, w, n, k).to(dtype), torch.randn(n).to(dtype)


def linear(x, weight, number, n, bias=None):
    out = torch.full((x.shape[0], n + 2), 7.0, dtype=x.dtype)
    triton_linear.linear(x, weight, None, number, bias, n, out[:, 1:-1])
    assert (out[:, [0, -1]] == 7).all()
    return out[:, 1:-1].contiguous()


@pytest.fixture
def alike(monkeypatch):
    """Weights in elements are multiplied by as many k at a time, which the interpreter's bits depend on."""
    for itemsize, rows in triton_linear.CONFIGS:
        monkeypatch.setitem(triton_linear.CONFIGS, (itemsize, rows), triton_linear.config(rows, itemsize, 1))


def sizes(name):
    """n and k with tails of outputs, of a record and of a group."""
    return {32: (45, 96), 128: (45, 384), 256: (45, 512)}[EVERY[name].block]


@FORMAT
def test_rows_of_a_table_are_the_reference_s(name, dtype):
    for n, k in (sizes(name), (17, EVERY[name].block)):
        _, packed, number, want, _ = problem(name, dtype, 1, n, k)
        assert torch.equal(reference.quant.widen(packed, name, n, k).to(dtype), want)
        ids = torch.tensor([[n - 1, 0, 13], [-1, 2**40, 7]])
        out = torch.full((2, 3, k + 20), 7.0, dtype=dtype)
        triton_block.embed_tokens(ids, packed, number - EXACT, out[..., 10:-10])
        known = (ids >= 0) & (ids < n)
        assert torch.equal(out[..., 10:-10], torch.where(known[..., None], want[ids.clamp(0, n - 1) * known], 0))
        assert (out[..., :10] == 7).all() and (out[..., -10:] == 7).all()


def test_a_block_is_embedded():
    for name in ("q4_1", "uint4_g128"):
        n, k = sizes(name)
        _, packed, number, want, _ = problem(name, torch.float32, 1, n, k)
        ids, rows, lens = torch.empty(2, 3, dtype=torch.int64), torch.empty(2, 3, k), torch.tensor([5, 9]).int()
        given = torch.tensor([44, 3]), lens, 20, None, 1, torch.tensor([3, 2]).int()
        triton_block.prepare_block(*given, packed, number - EXACT, ids, ids.clone(), None, rows)
        assert ids.tolist() == [[44, 20, 20], [3, 20, 20]] and (rows[1, 2] == 0).all()
        assert torch.equal(rows[0], want[ids[0]]) and torch.equal(rows[1, :2], want[ids[1, :2]])


@FORMAT
def test_linear_matches_the_reference(name, dtype):
    n, k = sizes(name)
    for rows, bias in ((3, True), (20, False)):
        x, packed, number, wide, b = problem(name, dtype, rows, n, k)
        b = b if bias else None
        want = torch.empty(rows, n, dtype=torch.float64)
        reference.linear.linear(*doubles(x), wide.double(), None, 0, *doubles(b), n, want)
        assert_within_budget(linear(x, packed, number, n, b), want, F.linear(x, wide, b), ulps=2)
        exact = torch.empty(rows, n, dtype=dtype)
        reference.linear.linear(x, packed, None, number, b, n, exact)
        assert_within_budget(exact, want, F.linear(x, wide, b), ulps=2)


# every configuration, and chunks of K, added here or in a second launch
@FORMAT
def test_bits_are_those_of_the_elements(name, dtype, alike, monkeypatch):
    n, k = sizes(name)
    for rows in (1, 17, 40, 70) if name in ("q4_0", "q6_k") else (1, 17):
        x, packed, number, wide, b = problem(name, dtype, rows, n, k)
        assert same_bits(linear(x, packed, number, n, b), linear(x, wide, 0, n, b)), rows
    for chips in (0, 10**6):
        monkeypatch.setattr(triton_linear, "multiprocessors", lambda device, count=chips: count)
        x, packed, number, wide, b = problem(name, dtype, 2, 20, CHUNK + 512)
        assert same_bits(linear(x, packed, number, 20, b), linear(x, wide, 0, 20, b)), chips


@FORMAT
def test_a_row_has_the_same_bits_in_every_number_of_rows(name, dtype):
    n, k = sizes(name)
    x, packed, number, _, b = problem(name, dtype, 40, n, k)
    whole = linear(x, packed, number, n, b)
    for at in (slice(0, 1), slice(39, 40), slice(3, 20)):
        assert same_bits(linear(x[at], packed, number, n, b), whole[at]), at
    x[7, 5] = float("nan")
    got, others = linear(x, packed, number, n, b), torch.arange(40) != 7
    assert got[7].isnan().all() and same_bits(got[others], whole[others])


@FORMAT
def test_heads_choose_as_with_the_elements(name, alike):
    n, k = 150, sizes(name)[1]
    x, packed, number, wide, b = problem(name, torch.float32, 5, n, k)

    def chosen(weight, number):
        ids, values, lse = torch.empty(5, 4, dtype=torch.int64), torch.empty(5, 4), torch.empty(5)
        best, top = torch.empty(5, dtype=torch.int64), torch.empty(5)
        given = (x, weight, None, number, b, n, 140, 0.5, 30.0, 1000)
        triton_head.lm_head_argmax(*given, best, top)
        triton_topk.lm_head_topk(*given, ids, values, lse)
        assert torch.equal(best, ids[:, 0]) and same_bits(top, values[:, 0].contiguous())
        return ids, values, lse

    got = chosen(packed, number)
    assert all(map(torch.equal, got, chosen(wide, 0)))
    assert torch.equal(got[0][:, 0] - 1000, linear(x, packed, number, n, b)[:, :140].argmax(-1))


@FORMAT
def test_strided_rows_beside_poison(name, dtype):
    n, k = sizes(name)
    x, packed, number, _, _ = problem(name, dtype, 3, n, k)
    wide_x = torch.full((3, k + 40), float("nan"), dtype=dtype)
    wide_x[:, 16:16 + k] = x
    assert same_bits(linear(wide_x[:, 16:16 + k], packed, number, n), linear(x, packed, number, n))


def test_records_hold_nothing_of_what_is_not_there():
    """Outputs up to the next 16 and k up to the next 256 are zeros, which an id past the table shows."""
    _, packed, number, _, _ = problem("q8_0", torch.float32, 1, 45, 96)
    rows = torch.full((1, 3, 256), 7.0)
    triton_block.embed_tokens(torch.tensor([[45, 47, 48]]), packed, number - EXACT, rows)
    assert (rows == 0).all()
