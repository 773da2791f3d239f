import pytest
import torch

from dflash_kernels._triton.activation import silu_and_mul
from dflash_kernels.testing import assert_within_budget, same_bits
from tests.kernels.test_activation import torch_silu_and_mul, truth

DTYPES = [torch.float32, torch.float16]


def run(x, out=None):
    out = torch.empty(x.shape[0], x.shape[1] // 2, dtype=x.dtype) if out is None else out
    assert silu_and_mul(x, out) is None
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (2, 3072), (3, 200), (5, 14), (0, 64), (4, 0)], ids=str)
def test_matches_reference(dtype, shape):
    x = (4 * torch.randn(shape)).to(dtype)
    assert_within_budget(run(x), truth(x), torch_silu_and_mul(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_stand_where_torch_has_them(dtype):
    special = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 80.0, -80.0, 95.0, -95.0, 60000.0, -60000.0, 1e-6]
    x = torch.tensor([special + [1.0] * len(special)]).to(dtype)
    want, got = torch_silu_and_mul(x.float()), run(x)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    finite = want.isfinite()
    assert_within_budget(got[finite], want[finite].double(), ulps=2.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_in_place_and_untouched_neighbours(dtype):
    packed = torch.randn(5, 300).to(dtype)
    out = torch.full((5, 130), 7.0).to(dtype)
    want = run(packed[:, 100:200].contiguous())
    run(packed[:, 100:200], out[:, 40:90])
    assert same_bits(out[:, 40:90].contiguous(), want)
    assert (out[:, :40] == 7).all() and (out[:, 90:] == 7).all()
    run(packed[:, 100:200], packed[:, 100:150])
    assert same_bits(packed[:, 100:150].contiguous(), want)
