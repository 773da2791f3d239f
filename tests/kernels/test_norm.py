import pytest
import torch

from dflash_kernels import add_rms_norm, reference, rms_norm
from dflash_kernels.testing import assert_within_budget, doubles, same_bits

SHAPES = [(1, 1), (1, 576), (8, 576), (3, 4096), (17, 100), (64, 7), (0, 64)]


def torch_norm(x, w, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w


@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_matches_reference(isa, dtype, shape):
    x, w = torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)
    want = torch.empty(shape, dtype=torch.float64)
    reference.norm.rms_norm(*doubles(x, w), 1e-6, want)
    assert_within_budget(rms_norm(x, w, 1e-6), want, torch_norm(x, w, 1e-6))


@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm_matches_reference(isa, dtype, shape):
    x, r, w = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)
    want, want_r = torch.empty(shape, dtype=torch.float64), x + r
    reference.norm.rms_norm(*doubles(want_r, w), 1e-5, want)
    got, got_r = add_rms_norm(x, r, w, 1e-5)
    assert got_r is r and same_bits(r, want_r)
    assert_within_budget(got, want, torch_norm(want_r, w, 1e-5))


def test_residual_out_takes_the_sum_and_leaves_residual_alone(isa, dtype):
    x, r, w = (torch.randn(4, 96).to(dtype) for _ in range(3))
    features = torch.full((4, 3, 96), float("nan"), dtype=dtype)
    before = r.clone()
    _, h = add_rms_norm(x, r, w[0].contiguous(), residual_out=features[:, 1])
    assert same_bits(r, before) and same_bits(h, (x.float() + r.float()).to(dtype))
    assert features[:, 0].isnan().all() and features[:, 2].isnan().all()


def test_strided_rows_and_untouched_neighbours(isa, dtype):
    packed = torch.randn(5, 300).to(dtype)
    w = torch.randn(100).to(dtype)
    out = torch.full((5, 300), 7.0).to(dtype)
    rms_norm(packed[:, 100:200], w, out=out[:, 100:200])
    assert same_bits(out[:, 100:200], rms_norm(packed[:, 100:200].contiguous(), w))
    assert (out[:, :100] == 7).all() and (out[:, 200:] == 7).all()


@pytest.mark.parametrize("width", [7, 576, 1000])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(isa, dtype, width):
    x, w = torch.randn(40, width).to(dtype), torch.randn(width).to(dtype)
    whole = rms_norm(x, w)
    for start, n in [(0, 1), (39, 1), (5, 3), (8, 8), (20, 16)]:
        assert same_bits(rms_norm(x[start:start + n], w), whole[start:start + n])


def test_nan_and_inf_stay_in_their_row(isa, dtype):
    x, w = torch.randn(3, 64).to(dtype), torch.ones(64, dtype=dtype)
    clean = rms_norm(x, w)
    x[1, 3] = float("nan")
    got = rms_norm(x, w)
    assert got[1].isnan().all() and same_bits(got[0], clean[0]) and same_bits(got[2], clean[2])


def test_bad_input_names_what_was_expected_and_got():
    x, w = torch.randn(2, 8), torch.ones(8)
    with pytest.raises(TypeError, match=r"rms_norm: x must be float32, bfloat16 or float16 .*got int64 \(2, 8\)"):
        rms_norm(x.long(), w)
    with pytest.raises(ValueError, match=r"rms_norm: weight must have shape \(H,\) = \(8\); got float32 \(7,\)"):
        rms_norm(x, w[:7])
    with pytest.raises(TypeError, match="weight must be float32"):
        rms_norm(x, w.half())
    with pytest.raises(ValueError, match="contiguous in its last dimension"):
        rms_norm(torch.randn(8, 2).t(), w)
    with pytest.raises(ValueError, match="residual must have shape"):
        add_rms_norm(x, x[:1], w)
    for given, name in (({}, "residual"), ({"residual_out": x.clone()}, "residual_out")):
        residual = torch.randn(2, 8)
        with pytest.raises(ValueError, match=f"add_rms_norm: out must not be {name}; got the same tensor"):
            add_rms_norm(x, residual, w, out=given.get(name, residual), **given)
