"""The convolution of a block. In 16 bits its results are those of the reference in the same dtype, bit for bit."""

import pytest
import torch
import torch.nn.functional as F

from dflash_kernels import StepGraph, add_rms_norm, grouped_conv, grouped_conv_add_rms_norm, reference
from dflash_kernels.ops.conv import ROUNDINGS
from dflash_kernels.testing import assert_within_budget, doubles, same_bits

# requests, width, hidden, groups, taps: a block of one, rows of several turns, groups of 16, 32, 8, 12, 64 and 1
SHAPES = [(1, 1, 32, 2, 2), (2, 19, 96, 6, 2), (3, 3, 64, 2, 1), (2, 5, 64, 8, 2), (2, 9, 60, 5, 3), (2, 4, 64, 1, 4),
          (1, 3, 7, 7, 2), (0, 4, 32, 2, 2)]
FEW = [SHAPES[i] for i in (1, 4, 5)]


def inputs(shape, dtype):
    """x, one half of a projection's coefficients, base."""
    b, q, h, groups, taps = shape
    both = torch.randn(b, q, 2, taps, groups).to(dtype)
    return torch.randn(b, q, h).to(dtype), both[:, :, 1], torch.randn(taps, h).to(dtype)


def by_reference(x, delta, base, rounding):
    out = torch.empty_like(x)
    b, q, h = x.shape
    reference.conv.grouped_conv(x.reshape(-1, h), delta.reshape(b * q, *delta.shape[2:]), base, q,
                                ROUNDINGS.index(rounding), out.view(-1, h))
    return out


def engine_form(x, delta, base):
    """As the engines' own torch code: coefficients first, then one product a tap."""
    groups = delta.shape[-1]
    blocks = x.unflatten(-1, (groups, -1))
    coefficients = base.view(len(base), groups, -1) + delta[..., None]
    total = coefficients[:, :, 0] * blocks
    for tap in range(1, min(len(base), x.shape[1])):
        total = total + coefficients[:, :, tap] * F.pad(blocks, (0, 0, 0, 0, tap, 0))[:, :x.shape[1]]
    return total.flatten(-2)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(vector_isa, dtype, shape, rounding):
    x, delta, base = inputs(shape, dtype)
    got = grouped_conv(x, delta, base, rounding=rounding)
    if dtype != torch.float32:
        assert same_bits(got, by_reference(x, delta, base, rounding))
    want = by_reference(*doubles(x, delta, base), "end")
    peer = engine_form(x, delta, base) if rounding != "reference" else by_reference(x, delta, base, rounding)
    assert_within_budget(got, want, peer, ulps=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_rounding_is_another_and_the_engines_is_that_of_their_code(dtype):
    x, delta, base = inputs((3, 16, 96, 6, 2), dtype)
    found = [grouped_conv(x, delta, base, rounding=r) for r in ROUNDINGS]
    assert torch.equal(found[2], engine_form(x, delta, base))  # apart from the sign of zeros
    exact = by_reference(*doubles(x, delta, base), "end").to(dtype)
    assert (found[0] == exact).float().mean() > 0.99
    for other in (found[1], found[2]):
        assert 0.4 < (found[0] == other).float().mean() < 0.9
    assert not same_bits(found[1], found[2])


@pytest.mark.parametrize("taps", [1, 2, 3])
def test_reference_is_the_dflash_package_s(vector_isa, taps):
    model = pytest.importorskip("dflash.model")
    x, delta, base = inputs((2, 16, 96, 6, taps), torch.bfloat16)
    want = model._grouped_dynamic_convolve(x, delta, base, 16)
    assert same_bits(grouped_conv(x, delta, base, rounding="reference"), want)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_at_the_ends_of_their_range_round_as_torch_rounds_them(vector_isa, dtype, rounding):
    largest, tiny = torch.finfo(dtype).max / 4, torch.finfo(dtype).tiny
    ends = torch.tensor([0.0, -0.0, tiny, tiny / 4, 1.0, -3.0, float("inf"), float("nan"), largest, -largest]).to(dtype)
    x, delta, base = inputs((2, 8, 96, 6, 2), dtype)
    x, base = ends[torch.randint(0, 10, x.shape)], ends[torch.randint(0, 8, base.shape)]
    delta = delta.clamp(-3, 3)  # products stay finite in float32, where fusing one with its sum could be seen
    got, want = grouped_conv(x, delta, base, rounding=rounding), by_reference(x, delta, base, rounding)
    assert torch.equal(got.isnan(), want.isnan()) and want.isnan().any() and want.isinf().any()
    assert same_bits(got.nan_to_num(7), want.nan_to_num(7))


def test_an_impulse_reaches_the_taps_after_it_and_no_other_block(vector_isa):
    x, delta, base = inputs((3, 8, 96, 6, 3), torch.float32)
    x.zero_()
    x[1, 0] = 1.0
    got = grouped_conv(x, delta, base)
    assert got[1, :3].all() and not got[1, 3:].any() and not got[0].any() and not got[2].any()
    for row in range(3):
        assert_within_budget(got[1, row], base[row] + delta[1, row, row].repeat_interleave(16), ulps=2)


@pytest.mark.parametrize("taps", [2, 3])
def test_nothing_comes_from_another_block(vector_isa, dtype, taps):
    x, delta, base = inputs((4, 5, 32, 2, taps), dtype)
    clean = grouped_conv(x, delta, base)
    for poisoned in range(4):
        y = x.clone()
        y[poisoned] = float("nan")
        got = grouped_conv(y, delta, base)
        others = [b for b in range(4) if b != poisoned]
        assert same_bits(got[others], clean[others]) and got[poisoned].isnan().all()


@pytest.mark.parametrize("shape", [(5, 7, 96, 6, 2), (40, 3, 60, 5, 3)])
def test_a_row_s_bits_are_those_of_its_block_alone_and_of_a_narrower_one(vector_isa, dtype, by_threads, shape):
    x, delta, base = inputs(shape, dtype)
    residual, weight = torch.randn_like(x), torch.randn(shape[2]).to(dtype)

    def run(b=slice(None), q=shape[1]):
        return [grouped_conv(x[b, :q].contiguous(), delta[b, :q].contiguous(), base), *grouped_conv_add_rms_norm(
            x[b, :q].contiguous(), delta[b, :q].contiguous(), base, residual[b, :q].clone(), weight)]

    whole, *others = by_threads(run)
    for other in others:
        assert all(map(same_bits, whole, other))
    for b, q in ((0, 1), (4, 2), (2, shape[1])):
        for got, want in zip(run(slice(b, b + 1), q), whole, strict=True):
            assert same_bits(got, want[b:b + 1, :q])


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("shape", FEW, ids=str)
def test_fused_it_has_the_bits_of_the_ops_it_fuses(vector_isa, dtype, shape, rounding):
    x, delta, base = inputs(shape, dtype)
    residual, weight = torch.randn_like(x), torch.randn(shape[2]).to(dtype)
    kept, sums, out = residual.clone(), torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
    y = grouped_conv(x, delta, base, rounding=rounding)
    want, want_sum = add_rms_norm(y, residual.clone(), weight, 1e-5)
    normed, h = grouped_conv_add_rms_norm(x, delta, base, residual, weight, 1e-5, rounding=rounding, out=out,
                                          residual_out=sums)
    assert normed is out and h is sums and same_bits(residual, kept)
    assert same_bits(out, want) and same_bits(sums, want_sum)
    normed, h = grouped_conv_add_rms_norm(x, delta, base, residual, weight, 1e-5, rounding=rounding)
    assert h is residual and same_bits(normed, want) and same_bits(h, want_sum)


def test_strided_rows_and_untouched_neighbours(vector_isa, dtype):
    packed = torch.randn(3, 4, 96).to(dtype)
    delta, base = torch.randn(3, 4, 2, 2, 2).to(dtype), torch.randn(2, 32).to(dtype)
    out = torch.full((3, 4, 96), 7.0).to(dtype)
    grouped_conv(packed[..., 32:64], delta[:, :, 0], base, out=out[..., 32:64])
    assert same_bits(out[..., 32:64], grouped_conv(packed[..., 32:64].contiguous(), delta[:, :, 0].contiguous(), base))
    assert (out[..., :32] == 7).all() and (out[..., 64:] == 7).all()


def test_identity_coefficients_leave_rows_as_they_are(vector_isa, dtype):
    """As a checkpoint begins: base 1 and 0, and a projection of zeros."""
    x = torch.randn(2, 8, 96).to(dtype)
    base = torch.stack((torch.ones(96), torch.zeros(96))).to(dtype)
    for rounding in ROUNDINGS:
        assert same_bits(grouped_conv(x, torch.zeros(2, 8, 2, 6, dtype=dtype), base, rounding=rounding), x)


def test_a_replay_reads_new_coefficients():
    x, delta, base = inputs((2, 4, 32, 2, 2), torch.bfloat16)
    residual, weight = torch.randn_like(x), torch.randn(32).bfloat16()
    out, sums, graph = torch.empty_like(x), torch.empty_like(x), StepGraph("cpu")
    with graph.capture():
        grouped_conv_add_rms_norm(x, delta, base, residual, weight, out=out, residual_out=sums)
    x.normal_(), delta.normal_(), residual.normal_()
    graph.replay()
    want = grouped_conv_add_rms_norm(x, delta, base, residual.clone(), weight)
    assert len(graph) == 1 and same_bits(out, want[0]) and same_bits(sums, want[1])


def test_bad_input_names_what_was_expected_and_got():
    x, delta, base = inputs((2, 3, 32, 2, 2), torch.float32)
    for error, message, arguments in (
            (TypeError, r"x must be float32, bfloat16 or float16 \(B, Q, H\); got int64", (x.long(), delta, base)),
            (ValueError, r"x must have shape \(B, Q, H\); got float32 \(6, 32\)", (x.flatten(0, 1), delta, base)),
            (ValueError, r"delta must have shape \(B, Q, t, G\) = \(2, 3, \*, \*\)", (x, delta[:, :2], base)),
            (ValueError, "groups that divide H = 32; got float32 .2, 3, 2, 5", (x, torch.zeros(2, 3, 2, 5), base)),
            (ValueError, "at least one tap", (x, delta[:, :, :0], base)),
            (TypeError, "delta must be float32", (x, delta.half(), base)),
            (ValueError, r"base must have shape \(t, H\) = \(2, 32\)", (x, delta, base[:1])),
            (ValueError, "delta must be contiguous in its last", (x, delta.transpose(2, 3), base)),
            (ValueError, "delta must have all rows at one stride", (x, torch.zeros(2, 7, 2, 2)[:, :3], base)),
            (ValueError, "x must flatten to rows", (torch.zeros(2, 7, 32)[:, :3], delta, base))):
        with pytest.raises(error, match=f"grouped_conv: .*{message}"):
            grouped_conv(*arguments)
    with pytest.raises(ValueError, match="rounding must be one of 'end', 'reference', 'engine'; got 'each'"):
        grouped_conv(x, delta, base, rounding="each")
    with pytest.raises(ValueError, match="grouped_conv: out must not be x; got the same tensor"):
        grouped_conv(x, delta, base, out=x)
    with pytest.raises(ValueError, match="grouped_conv: out must not be x; got the same tensor"):
        grouped_conv(x, delta, base, out=x[:])
    with pytest.raises(ValueError, match="grouped_conv_add_rms_norm: residual must have shape"):
        grouped_conv_add_rms_norm(x, delta, base, x[:1], base[0])
    with pytest.raises(ValueError, match="grouped_conv_add_rms_norm: residual_out must not be x"):
        grouped_conv_add_rms_norm(x, delta, base, x.clone(), base[0], residual_out=x)
    for given, name in (({}, "residual"), ({"residual_out": torch.empty_like(x)}, "residual_out")):
        residual = x.clone()
        with pytest.raises(ValueError, match=f"norm: out must not be {name}; got the same tensor"):
            grouped_conv_add_rms_norm(x, delta, base, residual, base[0], out=given.get(name, residual), **given)
    with pytest.raises(ValueError, match="grouped_conv_add_rms_norm: residual must not be x; got the same tensor"):
        grouped_conv_add_rms_norm(x, delta, base, x, base[0])
    with pytest.raises(ValueError, match="grouped_conv_add_rms_norm: residual must not be x; got the same tensor"):
        grouped_conv_add_rms_norm(x, delta, base, x.view(x.shape), base[0])
