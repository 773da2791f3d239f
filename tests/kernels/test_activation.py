import pytest
import torch

from dflash_kernels import reference, silu_and_mul
from dflash_kernels.testing import assert_within_budget, doubles, same_bits

SHAPES = [(1, 2), (8, 3072), (3, 200), (17, 14), (2, 3, 96), (32,), (0, 64), (4, 0)]


def truth(x):
    out = torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=torch.float64)
    reference.activation.silu_and_mul(*doubles(x), out)
    return out


def torch_silu_and_mul(x):
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(isa, dtype, shape):
    x = (4 * torch.randn(shape)).to(dtype)
    got = silu_and_mul(x)
    assert got.shape == (*shape[:-1], shape[-1] // 2)
    assert_within_budget(got, truth(x), torch_silu_and_mul(x))


def test_special_values_stand_where_torch_has_them(isa, dtype):
    special = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 80.0, -80.0, 95.0, -95.0, 60000.0, -60000.0, 1e-6]
    x = torch.tensor(special + [1.0] * len(special)).to(dtype)
    want = torch_silu_and_mul(x.float())
    got = silu_and_mul(x)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    finite = want.isfinite()
    assert_within_budget(got[finite], want[finite].double(), ulps=2.0)


def test_the_gate_is_the_first_half(isa):
    x = torch.tensor([0.0, 1.0, 3.0, 1.0])
    assert silu_and_mul(x).tolist() == pytest.approx([0.0, 1 / (1 + 2.718281828 ** -1)])


def test_strided_rows_and_untouched_neighbours(isa, dtype):
    packed = torch.randn(5, 300).to(dtype)
    out = torch.full((5, 130), 7.0).to(dtype)
    silu_and_mul(packed[:, 100:200], out=out[:, 40:90])
    assert same_bits(out[:, 40:90], silu_and_mul(packed[:, 100:200].contiguous()))
    assert (out[:, :40] == 7).all() and (out[:, 90:] == 7).all()


def test_out_may_be_the_first_half_of_x(isa, dtype):
    x = torch.randn(6, 74).to(dtype)
    want, up = silu_and_mul(x), x[:, 37:].clone()
    silu_and_mul(x, out=x[:, :37])
    assert same_bits(x[:, :37], want) and same_bits(x[:, 37:], up)


@pytest.mark.parametrize("width", [7, 1536])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(isa, dtype, width):
    x = torch.randn(20, 2 * width).to(dtype)
    x[9] = float("nan")
    whole = silu_and_mul(x)
    for start, n in [(0, 1), (19, 1), (5, 3), (8, 8), (2, 16)]:
        assert same_bits(silu_and_mul(x[start:start + n]), whole[start:start + n])
    assert whole[[8, 10]].isfinite().all()


def test_bad_input_names_what_was_expected_and_got():
    x = torch.randn(2, 8)
    with pytest.raises(TypeError, match=r"silu_and_mul: x must be float32, bfloat16 or float16 .*got int64 \(2, 8\)"):
        silu_and_mul(x.long())
    with pytest.raises(ValueError, match=r"silu_and_mul: x must have shape \(..., 2I\); got float32 \(2, 7\)"):
        silu_and_mul(x[:, :7])
    with pytest.raises(ValueError, match="out must have shape"):
        silu_and_mul(x, out=torch.empty(2, 8))
    with pytest.raises(TypeError, match="out must be float32"):
        silu_and_mul(x, out=torch.empty(2, 4).half())
    with pytest.raises(ValueError, match="contiguous in its last dimension"):
        silu_and_mul(torch.randn(8, 2).t())


def test_schema_and_fake():
    torch.library.opcheck(torch.ops.dflash.silu_and_mul, (torch.randn(3, 8).bfloat16(), torch.empty(3, 4).bfloat16()))
