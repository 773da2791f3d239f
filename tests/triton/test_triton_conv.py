import pytest
import torch

from dflash_kernels import reference
from dflash_kernels._triton.conv import COLUMNS, CONFIGS, grouped_conv, grouped_conv_add_rms_norm
from dflash_kernels.testing import assert_within_budget, doubles, same_bits

# requests, width, hidden, groups, taps
SHAPES = [(1, 1, 32, 2, 2), (3, 5, 96, 6, 2), (2, 3, 60, 5, 3), (1, 3, COLUMNS + 24, 1, 2), (0, 4, 32, 2, 2)]
NAN = float("nan")


@pytest.fixture(params=[torch.float32, torch.float16], ids=["f32", "f16"])
def dtype(request):
    return request.param


def inputs(shape, dtype):
    b, q, h, groups, taps = shape
    both = torch.randn(b * q, 2, taps, groups).to(dtype)
    return torch.randn(b * q, h).to(dtype), both[:, 1], torch.randn(taps, h).to(dtype), q


@pytest.mark.parametrize("rounding", range(3))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(dtype, shape, rounding):
    x, delta, base, q = inputs(shape, dtype)
    out, want = torch.full_like(x, NAN), torch.empty_like(x)
    grouped_conv(x, delta, base, q, rounding, out)
    reference.conv.grouped_conv(x, delta, base, q, rounding, want)
    assert same_bits(out, want) if dtype == torch.float16 else out.numel() == 0 or torch.allclose(out, want)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 2, max(CONFIGS) + 16, 1, 2)], ids=str)
def test_fused_it_adds_and_norms(dtype, shape):
    x, delta, base, q = inputs(shape, dtype)
    residual, weight = torch.randn_like(x), torch.randn(shape[2]).to(dtype)
    y, want = torch.empty_like(x), torch.empty(x.shape, dtype=torch.float64)
    reference.conv.grouped_conv(x, delta, base, q, 1, y)
    h = y + residual
    reference.norm.rms_norm(*doubles(h, weight), 1e-5, want)
    out, kept = torch.full_like(x, NAN), residual.clone()
    for sums in (torch.full_like(x, NAN), None):
        grouped_conv_add_rms_norm(x, delta, base, q, 1, residual, weight, 1e-5, out, sums)
        if dtype == torch.float16:
            assert same_bits(residual if sums is None else sums, h)
        if sums is not None:
            assert same_bits(residual, kept)
        if out.numel():
            assert_within_budget(out, want, ulps=8 if dtype == torch.float32 else 2)


def test_nothing_comes_from_another_block_and_neighbours_stay():
    packed, delta, base, q = torch.randn(12, 96), torch.randn(12, 3, 2), torch.randn(3, 32), 4
    packed[4:8] = NAN
    out, want = torch.full((12, 96), 7.0), torch.empty(12, 32)
    grouped_conv(packed[:, 32:64], delta, base, q, 0, out[:, 32:64])
    reference.conv.grouped_conv(packed[:, 32:64], delta, base, q, 0, want)
    assert torch.allclose(out[:, 32:64], want, equal_nan=True)
    assert want[4:8].isnan().all() and want[:4].isfinite().all() and want[8:].isfinite().all()
    assert (out[:, :32] == 7).all() and (out[:, 64:] == 7).all()
