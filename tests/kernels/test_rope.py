import pytest
import torch

from dflash_kernels import qk_norm_rope, reference
from dflash_kernels.paged_kv import PagedKV
from dflash_kernels.testing import assert_within_budget, doubles, rotary_table, same_bits

MAX_POS = 64
# T, Hq, Hkv, D, R: SmolLM2, MiniMax-M2.7 (partial), Gemma, half of a small head, sizes that fill no vector, no token
GEOMETRIES = [(8, 9, 3, 64, 64), (3, 6, 1, 128, 64), (2, 2, 2, 256, 256), (5, 2, 1, 64, 32), (3, 2, 1, 20, 6),
              (1, 1, 1, 2, 2), (0, 2, 1, 64, 64)]


def make(dtype, tokens, heads, kv_heads, dim, rotary_dim):
    """qkv, the keyword arguments of a call with norm weights."""
    qkv = (3 * torch.randn(tokens, (heads + 2 * kv_heads) * dim)).to(dtype)
    return qkv, dict(positions=torch.randint(0, MAX_POS, (tokens,)), cos_sin=rotary_table(rotary_dim, MAX_POS),
                     num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, q_weight=torch.randn(dim).to(dtype),
                     k_weight=torch.randn(dim).to(dtype))


def by_reference(qkv, positions, cos_sin, num_heads, num_kv_heads, head_dim, q_weight=None, k_weight=None, eps=1e-6,
                 interleaved=False, rounding="each", double=False):
    if double:
        qkv, cos_sin, q_weight, k_weight = doubles(qkv, cos_sin, q_weight, k_weight)
    qkv = qkv.clone()
    reference.rope.qk_norm_rope(qkv, positions, cos_sin, q_weight, k_weight, *[None] * 5, num_heads, num_kv_heads,
                                head_dim, eps, interleaved, rounding == "each")
    return qkv


@pytest.mark.parametrize("rounding", ["each", "end"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_matches_reference(isa, dtype, geometry, interleaved, rounding):
    qkv, args = make(dtype, *geometry)
    for table_dtype in {torch.float32, dtype}:
        args |= dict(cos_sin=args["cos_sin"].to(table_dtype), interleaved=interleaved, rounding=rounding, eps=1e-5)
        got = qk_norm_rope(qkv.clone(), **args)
        assert_within_budget(got, by_reference(qkv, **args, double=True), by_reference(qkv, **args))
        v = (geometry[1] + geometry[2]) * geometry[3]
        assert same_bits(got[:, v:], qkv[:, v:])


@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])
def test_without_norm_the_bits_are_the_plain_expressions(isa, dtype, interleaved):
    qkv, args = make(dtype, 7, 3, 2, 48, 36)
    args |= dict(q_weight=None, k_weight=None, interleaved=interleaved)
    want = by_reference(qkv, **args)
    for rounding in ("each", "end"):
        assert same_bits(qk_norm_rope(qkv.clone(), **args, rounding=rounding), want)
    assert not same_bits(want, qkv)


def test_one_weight_alone_and_no_rotation(isa, dtype):
    qkv, args = make(dtype, 4, 2, 1, 64, 64)
    q_only = qk_norm_rope(qkv.clone(), **args | dict(k_weight=None, cos_sin=None))
    both = qk_norm_rope(qkv.clone(), **args | dict(cos_sin=None))
    assert same_bits(q_only[:, 128:], qkv[:, 128:]) and same_bits(q_only[:, :128], both[:, :128])
    args["cos_sin"] = None
    assert_within_budget(both, by_reference(qkv, **args, double=True), by_reference(qkv, **args))


def test_rounding_each_and_end_are_what_they_say(isa):
    qkv, args = make(torch.bfloat16, 16, 4, 2, 64, 64)
    got = {r: qk_norm_rope(qkv.clone(), **args, rounding=r) for r in ("each", "end")}
    want = {r: by_reference(qkv, **args, rounding=r) for r in ("each", "end")}
    # The sum's order may flip a last bit of a few elements; the two roundings differ in many.
    agree = {(a, b): (got[a] == want[b]).float().mean().item() for a in got for b in want}
    assert min(agree["each", "each"], agree["end", "end"]) > 0.99
    assert max(agree["each", "end"], agree["end", "each"]) < 0.9


def test_p13_positions_are_absolute(isa):
    """Far positions rotate by the table's own row, and a wrong offset changes every bit pattern."""
    qkv, args = make(torch.float32, 4, 2, 1, 64, 64)
    args["cos_sin"] = rotary_table(64, 10_100)
    far = torch.arange(10_000, 10_004)
    got = qk_norm_rope(qkv.clone(), **args | dict(positions=far))
    want = by_reference(qkv, **args | dict(positions=far), double=True)
    assert_within_budget(got, want, by_reference(qkv, **args | dict(positions=far)))
    for wrong in (far - 10_000, far + 3, far - 1):
        assert not same_bits(qk_norm_rope(qkv.clone(), **args | dict(positions=wrong))[:, :192], got[:, :192])
        with pytest.raises(AssertionError):
            assert_within_budget(got, by_reference(qkv, **args | dict(positions=wrong), double=True))


def test_pairing_matters(isa):
    qkv, args = make(torch.float32, 4, 2, 1, 64, 32)
    args["positions"] = torch.arange(1, 5)
    neox, pairs = (qk_norm_rope(qkv.clone(), **args, interleaved=i) for i in (False, True))
    assert (neox != pairs)[:, :192].unflatten(1, (3, 64))[..., :32].float().mean() > 0.9
    assert same_bits(neox.unflatten(1, (4, 64))[..., 32:], pairs.unflatten(1, (4, 64))[..., 32:])


@pytest.mark.parametrize("family", ["qwen3", "glm"])
def test_equals_transformers(isa, family):
    """Qwen3 rotates halves, GLM pairs of neighbours in half of the head; in float32 the bits must agree."""
    module = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    tokens, heads, kv_heads, dim, rotary_dim = 5, 4, 2, 64, 64 if family == "qwen3" else 32
    qkv, args = make(torch.float32, tokens, heads, kv_heads, dim, rotary_dim)
    cos, sin = (torch.cat([t, t], -1)[None] for t in args["cos_sin"][args["positions"]].chunk(2, -1))
    q, k, v = qkv.unflatten(1, (-1, dim)).transpose(0, 1)[None].split([heads, kv_heads, kv_heads], dim=1)
    q, k = module.apply_rotary_pos_emb(q, k, cos, sin)
    want = torch.cat([q, k, v], 1)[0].transpose(0, 1).flatten(1)
    args |= dict(q_weight=None, k_weight=None, interleaved=family == "glm")
    assert torch.equal(qk_norm_rope(qkv.clone(), **args), want)


def test_strided_rows_and_untouched_neighbours(isa, dtype):
    qkv, args = make(dtype, 4, 2, 1, 32, 32)
    wide = torch.full((4, 200), 7.0).to(dtype)
    wide[:, 30:158] = qkv
    view = qk_norm_rope(wide[:, 30:158], **args)
    assert view.data_ptr() == wide[:, 30:].data_ptr() and same_bits(view, qk_norm_rope(qkv.clone(), **args))
    assert (wide[:, :30] == 7).all() and (wide[:, 158:] == 7).all()


def test_meta_tensors_pass_while_values_are_checked(monkeypatch):
    monkeypatch.setenv("DFLASH_CHECK", "1")
    qkv, args = make(torch.float32, 4, 3, 2, 32, 32)
    meta = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in args.items()}
    assert qk_norm_rope(qkv.to("meta"), **meta).shape == qkv.shape


def test_queries_and_keys_apart_have_the_bits_of_one_call(isa, dtype):
    """As where queries have a table of their own."""
    qkv, args = make(dtype, 4, 3, 2, 32, 32)
    both, apart = qk_norm_rope(qkv.clone(), **args), qkv.clone()
    qk_norm_rope(apart[:, :96], **args | dict(num_kv_heads=0))
    assert same_bits(apart[:, 96:], qkv[:, 96:]) and same_bits(apart[:, :96], both[:, :96])
    qk_norm_rope(apart[:, 96:], **args | dict(num_heads=0))
    assert same_bits(apart, both) and not same_bits(both, qkv)


def test_a_row_has_the_same_bits_alone_and_in_any_batch(isa, dtype):
    qkv, args = make(dtype, 40, 5, 2, 64, 64)
    whole = qk_norm_rope(qkv.clone(), **args)
    for start, n in [(0, 1), (39, 1), (5, 3), (8, 8), (20, 16)]:
        part = slice(start, start + n)
        got = qk_norm_rope(qkv[part].clone(), **args | dict(positions=args["positions"][part]))
        assert same_bits(got, whole[part])


@pytest.mark.parametrize("position", [-1, MAX_POS, 2**40])
def test_a_position_outside_the_table_is_nan_and_stores_nothing(isa, dtype, position, monkeypatch):
    qkv, args = make(dtype, 3, 2, 1, 32, 32)
    args["positions"] = torch.tensor([0, position, MAX_POS - 1])
    cache = PagedKV(*torch.full((2, 2, 2, 1, 32), 7.0).to(dtype))
    got = qk_norm_rope(qkv.clone(), **args, cache=cache, slots=torch.arange(3))
    assert got[1, :96].isnan().all() and same_bits(got[1, 96:], qkv[1, 96:])
    assert got[[0, 2]].isfinite().all() and (cache.k[0, 1] == 7).all() and (cache.v[0, 1] == 7).all()
    monkeypatch.setenv("DFLASH_CHECK", "1")
    with pytest.raises(ValueError, match=rf"positions must be in \[0, 64\).*got {position} at row 1"):
        qk_norm_rope(qkv, **args)


@pytest.mark.parametrize("layout", ["nhd", "hnd"])
def test_cache_takes_finished_k_and_v_at_existing_slots_only(isa, dtype, layout):
    qkv, args = make(dtype, 8, 3, 2, 32, 32)
    # Two guard pages on either side of the four that belong to the cache.
    shape = (2, 8, 4, 2, 32) if layout == "nhd" else (2, 8, 2, 4, 32)
    pages = torch.full(shape, float("nan")).to(dtype)
    k, v = (p if layout == "nhd" else p.transpose(1, 2) for p in pages)
    slots = torch.tensor([3, 4, 15, 16, -1, 0, 2**40, -2**40])
    got = qk_norm_rope(qkv.clone(), **args, cache=PagedKV(k[2:6], v[2:6]), slots=slots)
    assert same_bits(got, qk_norm_rope(qkv.clone(), **args))
    _, k_rows, v_rows = got.unflatten(1, (7, 32)).split([3, 2, 2], dim=1)
    written = {3: 0, 4: 1, 15: 2, 0: 5}
    for slot, token in written.items():
        assert same_bits(k[2 + slot // 4, slot % 4], k_rows[token])
        assert same_bits(v[2 + slot // 4, slot % 4], v_rows[token])
    assert pages.isfinite().sum() == 2 * len(written) * 2 * 32


def test_bad_input_names_what_was_expected_and_got():
    qkv, args = make(torch.float32, 2, 2, 1, 8, 8)
    cache = PagedKV(torch.zeros(2, 2, 1, 8), torch.zeros(2, 2, 1, 8))
    before = qkv.clone()
    cases = [
        (TypeError, r"qkv must be float32, bfloat16 or float16 .*got float64 \(2, 32\)", dict(qkv=qkv.double())),
        (ValueError, r"qkv must have shape \(T, \(Hq \+ 2 Hkv\) \* D\) = \(\*, 32\); got", dict(qkv=qkv[:, :31])),
        (ValueError, "rows that do not overlap", dict(qkv=torch.zeros(1, 32).expand(2, 32))),
        (TypeError, r"positions must be int64 \(T,\); got int32", dict(positions=args["positions"].int())),
        (ValueError, "positions must have shape", dict(positions=args["positions"][:1])),
        (TypeError, "cos_sin must be", dict(cos_sin=args["cos_sin"].half())),
        (ValueError, "even and <= 8", dict(cos_sin=torch.zeros(4, 10))),
        (ValueError, "R > 0, even", dict(cos_sin=torch.zeros(4, 5))),
        (ValueError, "R > 0, even", dict(cos_sin=torch.zeros(4, 0))),
        (TypeError, "q_weight must be float32", dict(q_weight=args["q_weight"].bfloat16())),
        (ValueError, "k_weight must have shape", dict(k_weight=torch.ones(4))),
        (ValueError, "rounding must be 'each' or 'end'; got 'both'", dict(rounding="both")),
        (ValueError, "cache and slots must be given together; got cache alone", dict(cache=cache)),
        (ValueError, "got slots alone", dict(slots=torch.arange(2))),
        (TypeError, "slots must be int64", dict(cache=cache, slots=torch.arange(2).int())),
        (TypeError, "cache must be a PagedKV; got float32", dict(cache=cache.k, slots=torch.arange(2))),
        (ValueError, "head_dim must be at least 1; got 0", dict(head_dim=0)),
    ]
    for error, message, change in cases:
        with pytest.raises(error, match="qk_norm_rope: .*" + message):
            qk_norm_rope(**dict(qkv=qkv, **args) | change)
    half = PagedKV(cache.k.half(), cache.v.half())
    with pytest.raises(TypeError, match="cache.k must be float32"):
        qk_norm_rope(qkv, **args, cache=half, slots=torch.arange(2))
    with pytest.raises(ValueError, match="cache.k must have pages of at least 1 token; got"):
        qk_norm_rope(qkv, **args, cache=PagedKV(cache.k[:, :0], cache.v[:, :0]), slots=torch.arange(2))
    with pytest.raises(NotImplementedError, match="head_dim must be <= 1024; got 2048"):
        qk_norm_rope(torch.zeros(1, 3 * 2048), torch.zeros(1).long(), None, num_heads=1, num_kv_heads=1, head_dim=2048)
    assert same_bits(qkv, before) and not cache.k.any()


def test_schema_and_fake():
    qkv, args = make(torch.bfloat16, 3, 2, 1, 16, 8)
    k, v = torch.zeros(2, 2, 2, 1, 16).bfloat16()
    torch.library.opcheck(torch.ops.dflash.qk_norm_rope, (
        qkv, args["positions"], args["cos_sin"], args["q_weight"], args["k_weight"], k.clone(), v.clone(),
        None, None, torch.arange(3), 2, 1, 16, 1e-6, False, True))
    torch.library.opcheck(torch.ops.dflash.qk_norm_rope, (
        qkv, args["positions"], *[None] * 8, 2, 1, 16, 1e-6, True, False))
