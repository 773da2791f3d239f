import pytest
import torch

from dflash_kernels._triton.rope import qk_norm_rope
from dflash_kernels.testing import assert_within_budget, cache_views, rotary_table, same_bits
from tests.kernels.test_rope import MAX_POS, by_reference, make
from tests.support import fp8_cases
from tests.triton import test_triton_context

GEOMETRIES = [(3, 9, 3, 64, 64), (2, 6, 1, 128, 64), (1, 2, 2, 256, 256), (2, 2, 1, 64, 32), (2, 3, 2, 20, 6),
              (1, 1, 1, 2, 2), (0, 2, 1, 64, 64), (1, 1, 1, 1000, 1000)]


@pytest.fixture(params=[torch.float32, torch.float16], ids=["f32", "f16"])
def dtype(request):
    return request.param


def run(qkv, positions, cos_sin, num_heads, num_kv_heads, head_dim, q_weight=None, k_weight=None, eps=1e-6,
        interleaved=False, rounding="each", caches=(None, None), scales=(None, None), slots=None):
    assert qk_norm_rope(qkv, positions, cos_sin, q_weight, k_weight, *caches, *scales, slots, num_heads, num_kv_heads,
                        head_dim, eps, interleaved, rounding == "each") is None
    return qkv


@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_matches_reference(dtype, geometry, interleaved):
    qkv, args = make(dtype, *geometry)
    for rounding, table_dtype in (("each", torch.float32), ("end", dtype)):
        args |= dict(cos_sin=args["cos_sin"].to(table_dtype), interleaved=interleaved, rounding=rounding, eps=1e-5)
        got = run(qkv.clone(), **args)
        assert_within_budget(got, by_reference(qkv, **args, double=True), by_reference(qkv, **args))
        v = (geometry[1] + geometry[2]) * geometry[3]
        assert same_bits(got[:, v:], qkv[:, v:])


def test_without_norm_the_bits_are_the_plain_expressions(dtype):
    qkv, args = make(dtype, 3, 3, 2, 48, 36)
    args |= dict(q_weight=None, k_weight=None)
    for interleaved in (False, True):
        want = by_reference(qkv, **args, interleaved=interleaved)
        assert same_bits(run(qkv.clone(), **args, interleaved=interleaved), want)


def test_one_weight_alone_and_no_rotation(dtype):
    qkv, args = make(dtype, 2, 2, 1, 64, 64)
    args["cos_sin"] = None
    both, q_only = run(qkv.clone(), **args), run(qkv.clone(), **args | dict(k_weight=None))
    assert same_bits(q_only[:, 128:], qkv[:, 128:]) and same_bits(q_only[:, :128], both[:, :128])
    assert_within_budget(both, by_reference(qkv, **args, double=True), by_reference(qkv, **args))


def test_queries_and_keys_apart_have_the_bits_of_one_call(dtype):
    qkv, args = make(dtype, 2, 3, 2, 32, 32)
    both, apart = run(qkv.clone(), **args), qkv.clone()
    run(apart[:, :96], **args | dict(num_kv_heads=0))
    run(apart[:, 96:], **args | dict(num_heads=0))
    assert same_bits(apart, both) and not same_bits(both, qkv)


def test_p13_positions_are_absolute(dtype):
    qkv, args = make(dtype, 2, 2, 1, 64, 64)
    args |= dict(cos_sin=rotary_table(64, 10_100), positions=torch.tensor([10_000, 10_099]))
    got = run(qkv.clone(), **args)
    assert_within_budget(got, by_reference(qkv, **args, double=True), by_reference(qkv, **args))


@pytest.mark.parametrize("layout", ["nhd", "hnd"])
def test_cache_takes_finished_k_and_v_at_existing_slots_of_known_positions(dtype, layout):
    qkv, args = make(dtype, 8, 3, 2, 32, 32)
    args["positions"][1], args["positions"][4] = MAX_POS, -1
    # Two guard pages on either side of the four that belong to the cache.
    shape = (2, 8, 4, 2, 32) if layout == "nhd" else (2, 8, 2, 4, 32)
    pages = torch.full(shape, float("nan")).to(dtype)
    k, v = (p if layout == "nhd" else p.transpose(1, 2) for p in pages)
    slots = torch.tensor([3, 4, 15, 16, 1, 0, 2**40, -2**40])
    wide = torch.full((8, 300), 7.0).to(dtype)
    wide[:, 20:244] = qkv
    got = run(wide[:, 20:244], **args, caches=(k[2:6], v[2:6]), slots=slots)
    assert same_bits(got, run(qkv.clone(), **args))
    assert (wide[:, :20] == 7).all() and (wide[:, 244:] == 7).all()
    assert got[[1, 4], :160].isnan().all() and got[:, 160:].isfinite().all()
    _, k_rows, v_rows = got.unflatten(1, (7, 32)).split([3, 2, 2], dim=1)
    written = {3: 0, 15: 2, 0: 5}
    for slot, token in written.items():
        assert same_bits(k[2 + slot // 4, slot % 4], k_rows[token])
        assert same_bits(v[2 + slot // 4, slot % 4], v_rows[token])
    assert pages.isfinite().sum() == 2 * len(written) * 2 * 32


@pytest.mark.parametrize("kind", ["none", "tensor", "head"])
def test_an_fp8_cache_gets_the_bytes_of_write_context_kv(dtype, kind):
    heads, dim = 2, 64
    case = fp8_cases.make_fp8(test_triton_context.Case(dtype, 3, 1, heads, dim, 32), kind)
    context, own = case.run(interleaved=kind == "head"), case.base()
    qkv = torch.cat([torch.randn(3, 3 * dim).to(dtype), case.kv], 1)
    run(qkv, case.positions, case.args["cos_sin"], 3, heads, dim, k_weight=case.args["k_weights"][0],
        interleaved=kind == "head", caches=cache_views(own, "nhd")[0], scales=(case.k_scales[0], case.v_scales[0]),
        slots=case.slots)
    assert same_bits(own, context)
