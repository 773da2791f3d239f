import pytest
import torch
import torch.nn.functional as F

from dflash_kernels import reference
from dflash_kernels._triton import linear as triton_linear
from dflash_kernels.testing import assert_within_budget, doubles, same_bits

CHUNK = triton_linear.CHUNK


@pytest.fixture(params=[torch.float32, torch.float16], ids=["f32", "f16"])
def dtype(request):
    return request.param


def problem(dtype, rows, n, k):
    x, w = torch.randn(rows, k).to(dtype), (torch.randn(n, k) / k**0.5).to(dtype)
    return x, w, torch.randn(n).to(dtype)


def run(x, w, bias=None, out=None, scales=None):
    out = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype) if out is None else out
    assert triton_linear.linear(x, w, scales, bias, w.shape[0], out) is None
    return out


# one shape for each way of tiling rows, with and without a split of K, with tails of N and K
@pytest.mark.parametrize("rows,n,k", [(1, 1, 1), (3, 70, 45), (17, 33, 130), (40, 65, 64), (130, 20, 48), (0, 32, 32),
                                      (2, 20, CHUNK + 1), (1, 16, CHUNK)])
@pytest.mark.parametrize("biased", [True, False])
def test_matches_reference(dtype, rows, n, k, biased):
    x, w, b = problem(dtype, rows, n, k)
    b = b if biased else None
    want = torch.empty(rows, n, dtype=torch.float64)
    reference.linear.linear(*doubles(x, w), None, *doubles(b), n, want)
    assert_within_budget(run(x, w, b), want, F.linear(x, w, b) if rows else None, ulps=2)


@pytest.mark.parametrize("rows,n,k", [(1, 1, 1), (3, 70, 45), (40, 65, 64), (130, 20, 48), (2, 20, CHUNK + 1)])
def test_a_weight_in_8_bits(dtype, rows, n, k):
    x, w, b = problem(dtype, rows, n, k)
    q, scales = reference.linear.quantize(w)
    for bias in (b, None):
        want = torch.empty(rows, n, dtype=torch.float64)
        reference.linear.linear(*doubles(x), q, *doubles(scales, bias), n, want)
        like = F.linear(x, (q * scales[:, None]).to(dtype), bias)
        assert_within_budget(run(x, q, bias, scales=scales), want, like, ulps=2)
    # Where the scales are powers of two nothing is rounded, so the bits are those of the weight that they make.
    scales = torch.exp2(torch.randint(-6, 3, (n,)).float())
    assert same_bits(run(x, q, b, scales=scales), run(x, (q * scales[:, None]).to(dtype), b))


def test_chunks_added_here_and_in_a_second_launch_are_the_same_bits(dtype, monkeypatch):
    x, w, b = problem(dtype, 3, 40, 2 * CHUNK + 100)
    split = run(x, w, b)
    monkeypatch.setattr(triton_linear, "SPLIT_BELOW", 0)
    assert same_bits(run(x, w, b), split)
    q, scales = reference.linear.quantize(w)
    whole = run(x, q, b, scales=scales)
    monkeypatch.undo()
    assert same_bits(run(x, q, b, scales=scales), whole)


def test_a_row_sees_none_of_its_neighbours(dtype):
    """What the interpreter can show: a NaN stays in its row in every tiling. That bits agree is for a GPU to show."""
    for rows in (3, 20, 40, 100):
        x, w, _ = problem(dtype, rows, 20, 64)
        clean = run(x, w)
        x[rows // 2, 5] = float("nan")
        got = run(x, w)
        assert got[rows // 2].isnan().all()
        keep = torch.arange(rows) != rows // 2
        assert same_bits(got[keep], clean[keep])


def test_strided_rows_and_untouched_neighbours(dtype):
    for k in (64, CHUNK + 64):
        x, w, b = problem(dtype, 5, 40, k)
        nan = float("nan")
        wide_x, wide_w = torch.full((5, k + 9), nan).to(dtype), torch.full((40, k + 3), nan).to(dtype)
        wide_x[:, 4:-5], wide_w[:, 1:-2] = x, w
        out = torch.full((5, 100), 7.0).to(dtype)
        run(wide_x[:, 4:-5], wide_w[:, 1:-2], b, out[:, 30:70])
        assert same_bits(out[:, 30:70].contiguous(), run(x, w, b))
        assert (out[:, :30] == 7).all() and (out[:, 70:] == 7).all()


@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_number_of_rows_has_a_configuration(itemsize):
    for rows in (1, 16, 17, 64, 65, 128, 129, 5000):
        c = triton_linear.config(rows, itemsize)
        assert min(rows, 64) <= c.ROWS * c.TILES and CHUNK % c.BLOCK_K == 0
        assert c.TILES in (1, 2, 4) and c.ROWS < 64, "tiles of 64 rows are another instruction on some GPUs"
