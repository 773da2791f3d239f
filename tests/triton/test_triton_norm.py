import pytest
import torch

from dflash_kernels import reference
from dflash_kernels._triton.norm import CONFIGS, add_rms_norm, rms_norm
from dflash_kernels.testing import assert_within_budget, doubles, same_bits
from tests.kernels.test_norm import torch_norm

SHAPES = [(1, 1), (3, 576), (2, 1024), (2, 3072), (2, 100), (1, max(CONFIGS) + 5), (0, 64), (3, 0)]
NAN = float("nan")


@pytest.fixture(params=[torch.float32, torch.float16], ids=["f32", "f16"])
def dtype(request):
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_match_reference(dtype, shape):
    x, r, w = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)
    for h in (x, x + r):
        want, out = torch.empty(shape, dtype=torch.float64), torch.full(shape, NAN, dtype=dtype)
        reference.norm.rms_norm(*doubles(h, w), 1e-5, want)
        if h is x:
            assert rms_norm(x, w, 1e-5, out) is None
        else:
            assert add_rms_norm(x, r, w, 1e-5, out, None) is None
            assert same_bits(r, h)
        if out.numel():
            assert_within_budget(out, want, torch_norm(h, w, 1e-5))


def test_add_writes_where_it_is_told(dtype):
    x, r, w = (torch.randn(4, 96).to(dtype) for _ in range(3))
    features, before = torch.full((4, 3, 96), NAN, dtype=dtype), r.clone()
    want = torch.empty_like(x)
    reference.norm.add_rms_norm(x, r, w[0], 1e-6, want, torch.empty_like(x))
    add_rms_norm(x, r, w[0], 1e-6, x, features[:, 1])
    assert same_bits(r, before) and features[:, 0].isnan().all() and features[:, 2].isnan().all()
    assert_within_budget(x, want, ulps=2)


def test_strided_rows_and_untouched_neighbours(dtype):
    packed, w = torch.randn(3, 300).to(dtype), torch.randn(100).to(dtype)
    packed[1, 150] = NAN
    out, want = torch.full((3, 300), 7.0).to(dtype), torch.empty(3, 100, dtype=dtype)
    rms_norm(packed[:, 100:200], w, 1e-6, out[:, 100:200])
    rms_norm(packed[:, 100:200].contiguous(), w, 1e-6, want)
    assert same_bits(out[:, 100:200], want)
    assert (out[:, :100] == 7).all() and (out[:, 200:] == 7).all()
    assert want[1].isnan().all() and want[[0, 2]].isfinite().all()
