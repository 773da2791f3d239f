import pytest
import torch

from dflash_kernels import StepGraph, pack_weight, qk_norm_rope, reference, write_context_kv
from dflash_kernels.paged_kv import PagedKV
from dflash_kernels.testing import LAYOUTS, assert_within_budget, cache_views, doubles, same_bits
from dflash_kernels.testing.cache import poisoned_storage, rotary_table

NUM_PAGES, MAX_POS = 6, 64


class Case:
    """Inputs of one call and the storage it writes; `run` and `by_reference` return the whole storage."""

    def __init__(self, dtype, tokens=8, layers=3, kv_heads=3, dim=64, rotary_dim=64, layout="nhd", page_size=2):
        page_size = 1 if layout == "slots" else page_size
        self.page_size, self.shape = page_size, (layout, layers, NUM_PAGES, page_size, kv_heads, dim)
        self.kv = (3 * torch.randn(tokens, layers * 2 * kv_heads * dim)).to(dtype)
        self.positions = torch.randint(0, MAX_POS, (tokens,))
        self.slots = torch.randperm(NUM_PAGES * page_size)[:tokens]
        self.args = dict(k_weights=torch.randn(layers, dim).to(dtype), cos_sin=rotary_table(rotary_dim, MAX_POS))
        self.cache_dtype, self.k_scales, self.v_scales = dtype, [None] * layers, [None] * layers

    def base(self, dtype=None):
        return poisoned_storage(*self.shape, dtype or self.cache_dtype)

    def run(self, base=None, **change):
        base = self.base() if base is None else base
        caches = [PagedKV(*views, *scales) for views, *scales in zip(
            cache_views(base, self.shape[0]), self.k_scales, self.v_scales, strict=True)]
        inputs = dict(kv=self.kv, positions=self.positions, slots=self.slots, **self.args) | change
        write_context_kv(inputs.pop("kv"), inputs.pop("positions"), inputs.pop("slots"), caches, **inputs)
        return base

    def by_reference(self, double=False, **change):
        base = self.base(torch.float64 if double else None)
        k, v = zip(*cache_views(base, self.shape[0]), strict=True)
        a = dict(kv=self.kv, positions=self.positions, slots=self.slots, eps=1e-6, interleaved=False, commit_lens=None,
                 v_scale=1.0, rounding="each", **self.args) | change
        floats = a["kv"], a["k_weights"], a["cos_sin"]
        kv, weights, cos_sin = doubles(*floats) if double else floats
        reference.context.write_context_kv(kv, a["positions"], a["slots"], k, v, [], [], weights, cos_sin,
                                           a["commit_lens"], a["eps"], a["v_scale"], a["interleaved"],
                                           a["rounding"] == "each")
        return base

    def check(self, **change):
        """NaN must stay exactly where the reference leaves it, and what is written must be within the budget."""
        got = self.run(**change)
        assert_within_budget(got, self.by_reference(double=True, **change), self.by_reference(**change))
        return got


def rows(base, layout, slots):
    """(L, 2, len(slots), Hkv, D): the K and V rows at these slots."""
    page_size = cache_views(base, layout)[0][0].shape[1]
    return torch.stack([torch.stack([t[slots // page_size, slots % page_size] for t in pair])
                        for pair in cache_views(base, layout)])


def check_lengths_and_slots(case):
    """case: 12 tokens, 2 layers, 2 heads of 32. Rows past a commit length and slots and positions that do not exist."""
    end = NUM_PAGES * case.page_size
    case.slots = torch.tensor([0, -1, end - 1, end, 1, 2, 2**62, -(2**62), 3, 4, -end, 2])
    case.kv[5], case.positions[8] = float("nan"), MAX_POS
    lens = torch.tensor([4, 1, 9], dtype=torch.int32)
    got = case.check(commit_lens=lens)
    kept = (torch.arange(4) < lens[:, None]).flatten() & (case.slots >= 0) & (case.slots < end)
    kept &= case.positions < MAX_POS
    assert got.isfinite().sum() == kept.sum() * 2 * 2 * 2 * 32
    assert case.run(commit_lens=torch.tensor([0, 0, -1], dtype=torch.int32)).isnan().all()


@pytest.mark.parametrize("rounding", ["each", "end"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "pairs"])
@pytest.mark.parametrize("shape", [(8, 3, 3, 64, 64), (3, 8, 1, 64, 32), (5, 1, 2, 128, 64), (2, 5, 1, 256, 256),
                                   (3, 2, 2, 20, 6), (0, 2, 1, 64, 64)], ids=str)
def test_matches_reference(isa, dtype, shape, interleaved, rounding):
    case = Case(dtype, *shape)
    for table_dtype in {torch.float32, dtype}:
        case.check(interleaved=interleaved, rounding=rounding, v_scale=0.707, eps=1e-5,
                   cos_sin=case.args["cos_sin"].to(table_dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_p16_every_cache_layout_holds_the_same_rows(isa, dtype, layout):
    case, plain = Case(dtype, 5, 2, 2, 32, 32, layout), Case(dtype, 5, 2, 2, 32, 32)
    plain.kv, plain.positions, plain.args = case.kv, case.positions, case.args
    case.slots = torch.randperm(NUM_PAGES * case.page_size)[:5]
    got = case.check()
    assert same_bits(rows(got, layout, case.slots), rows(plain.run(), "nhd", plain.slots))
    assert got.isfinite().sum() == 5 * 2 * 2 * 2 * 32


def test_p16_k_and_v_may_have_different_strides(isa, dtype):
    case = Case(dtype, 5, layers=1)
    k, like = cache_views(case.base(), "nhd")[0]
    v = torch.full_like(torch.stack([like, like], 1).transpose(2, 3).contiguous(), float("nan"))[:, 1].transpose(1, 2)
    assert all(a != b for a, b in zip(k.stride()[:3], v.stride(), strict=False))
    write_context_kv(case.kv, case.positions, case.slots, [PagedKV(k, v)], **case.args)
    want_k, want_v = cache_views(case.run(), "nhd")[0]
    assert same_bits(k, want_k) and same_bits(v, want_v)


@pytest.mark.parametrize("rounding", ["each", "end"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "pairs"])
def test_k_has_the_bits_of_qk_norm_rope(isa, dtype, interleaved, rounding):
    """A key read from the context equals the key of the same token in a block."""
    layers, heads, dim = 3, 2, 64
    case = Case(dtype, 9, layers, heads, dim, 32)
    base = case.run(interleaved=interleaved, rounding=rounding)
    got = rows(base, "nhd", case.slots)
    for layer, kv in enumerate(case.kv.unflatten(1, (layers, -1)).unbind(1)):
        qkv = torch.cat([torch.randn(9, 3 * dim).to(dtype), kv], 1)
        qk_norm_rope(qkv, case.positions, case.args["cos_sin"], num_heads=3, num_kv_heads=heads, head_dim=dim,
                     k_weight=case.args["k_weights"][layer], interleaved=interleaved, rounding=rounding)
        k, v = qkv.unflatten(1, (-1, dim))[:, 3:].split(heads, 1)
        assert same_bits(got[layer, 0], k.contiguous()) and same_bits(got[layer, 1], v.contiguous())


def test_planted_faults_change_k_bits(isa, dtype):
    """What greedy text never shows: a shift of the positions, the other pairing, another layer's weight."""
    case = Case(dtype)
    case.positions = torch.arange(10, 18)
    good = rows(case.run(), "nhd", case.slots)
    faults = [dict(positions=case.positions + 3), dict(interleaved=True), dict(cos_sin=None), dict(k_weights=None),
              dict(k_weights=case.args["k_weights"].roll(1, 0)), dict(cos_sin=rotary_table(32, MAX_POS))]
    truth = rows(case.by_reference(double=True), "nhd", case.slots)
    peer = rows(case.by_reference(), "nhd", case.slots)
    for fault in faults:
        bad = rows(case.run(**fault), "nhd", case.slots)
        assert (bad[:, 0] != good[:, 0]).any(-1).any(0).all(), fault
        assert same_bits(bad[:, 1], good[:, 1])
        with pytest.raises(AssertionError):
            assert_within_budget(bad, truth, peer)


def test_p13_absolute_positions_far_out(isa, dtype):
    case = Case(dtype, 4)
    case.args["cos_sin"] = rotary_table(64, 10_100)
    case.positions = torch.arange(10_003, 10_007)
    got = case.check()
    near = case.run(positions=case.positions - 10_000)
    assert (rows(got, "nhd", case.slots)[:, 0] != rows(near, "nhd", case.slots)[:, 0]).any(-1).all()


def test_p14_v_scale_multiplies_v_alone_and_one_copies_bits(isa, dtype):
    case = Case(dtype)
    case.kv[0, -3:] = torch.tensor([-0.0, float("inf"), float("nan")]).to(dtype)
    v = case.kv.unflatten(1, (3, 2, 3, 64))[:, :, 1].transpose(0, 1)
    plain, scaled = (rows(case.run(v_scale=s), "nhd", case.slots) for s in (1.0, 0.707))
    assert same_bits(plain[:, 1], v.contiguous())
    assert same_bits(scaled[:, 1], (v.float() * 0.707).to(dtype).contiguous())
    assert same_bits(scaled[:, 0], plain[:, 0])


def test_p15_quantised_or_mixed_dtypes_are_refused():
    case = Case(torch.bfloat16)
    for kv in (case.kv.to(torch.int8), case.kv.view(torch.uint8), case.kv.to(torch.float8_e4m3fn), case.kv.double(),
               pack_weight(case.kv)):
        with pytest.raises(TypeError, match="write_context_kv: kv must be float32, bfloat16 or float16"):
            case.run(kv=kv)
    with pytest.raises(TypeError, match=r"caches\[0\].k must be float16"):
        case.run(kv=case.kv.half())
    with pytest.raises(TypeError, match="k_weights must be bfloat16"):
        case.run(k_weights=case.args["k_weights"].float())
    with pytest.raises(NotImplementedError, match="got torch.float8_e5m2"):
        PagedKV(*torch.zeros(2, 4, 4, 1, 64).to(torch.float8_e5m2))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("commits", [(4, 0, 1, 3), (0, 0, 0, 0), (4, 4, 4, 4), (9, -1, 2, 4)], ids=str)
def test_p17_rows_past_the_commit_length_are_not_written(isa, dtype, layout, commits):
    case = Case(dtype, 16, 2, 1, 32, 32, layout, page_size=4)
    if layout == "slots":
        case.slots = torch.cat([torch.randperm(NUM_PAGES), torch.full((10,), -1)])[torch.randperm(16)]
    lens = torch.tensor(commits, dtype=torch.int32)
    got = case.check(commit_lens=lens)
    kept = (torch.arange(4) < lens[:, None]).flatten() & (case.slots >= 0)
    assert got.isfinite().sum() == kept.sum() * 2 * 2 * 32
    assert same_bits(got, case.run(slots=case.slots.where(kept, -1)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_p18_slots_outside_the_cache_write_nothing(isa, dtype, layout):
    case = Case(dtype, 10, 2, 1, 32, 32, layout, page_size=3)
    p = case.page_size
    end = NUM_PAGES * p
    case.slots = torch.tensor([-1, end, end - 1, 0, p, 2 * p - 1 if p > 1 else 3, end + p, -p, 2**62, -(2**62)])
    got = case.check()
    assert got.isfinite().sum() == 4 * 2 * 2 * 32
    assert case.run(slots=torch.full((10,), -1)).isnan().all()


def test_p18_rows_of_a_padded_batch_and_positions_outside_the_table_write_nothing(isa, dtype):
    case = Case(dtype, 6)
    case.kv[4:] = float("nan")
    case.slots[4:] = -1
    case.positions = torch.tensor([0, MAX_POS - 1, MAX_POS, -1, 2**40, -5])
    got = case.check()
    assert got.isfinite().sum() == 2 * 3 * 2 * 3 * 64


def test_slots_of_each_layer(isa, dtype):
    case = Case(dtype, 5, layers=3, page_size=4)
    wide = torch.stack([torch.randperm(24)[:7] for _ in range(3)])
    wide[1, 3] = -1
    got = case.check(slots=wide[:, 1:6])
    for layer in range(3):
        alone = case.run(slots=wide[layer, 1:6].contiguous())
        assert same_bits(got[layer], alone[layer])


def test_strided_rows(isa, dtype):
    case = Case(dtype)
    wide = torch.full((8, case.kv.shape[1] + 37), float("nan"), dtype=dtype)
    wide[:, 5:-32] = case.kv
    assert same_bits(case.run(kv=wide[:, 5:-32]), case.run())


def test_a_row_has_the_same_bits_alone_in_any_batch_and_twice(isa, dtype):
    case = Case(dtype, 24, layers=3, page_size=4)
    whole = case.run()
    assert same_bits(case.run(), whole)
    parts = case.base()
    for start, n in [(0, 1), (1, 3), (4, 8), (12, 12)]:
        part = slice(start, start + n)
        case.run(parts, kv=case.kv[part], positions=case.positions[part], slots=case.slots[part])
    assert same_bits(parts, whole)


def test_no_rotation_and_no_norm(isa, dtype):
    case = Case(dtype)
    case.check(cos_sin=None)
    raw = rows(case.run(cos_sin=None, k_weights=None), "nhd", case.slots)
    assert same_bits(raw, case.kv.unflatten(1, (3, 2, 3, 64)).movedim(0, 2).contiguous())


@pytest.mark.skipif(not StepGraph.available(), reason="needs the C++ library")
def test_p20_replay_reads_lengths_slots_and_positions_anew(isa):
    case, graph = Case(torch.bfloat16, 8, layers=2), StepGraph()
    base = case.base()
    lens = torch.tensor([0, 0], dtype=torch.int32)
    with graph.capture():
        case.run(base, commit_lens=lens)
    assert base.isnan().all()
    for commits in ([3, 1], [0, 4]):
        base.fill_(float("nan"))
        lens.copy_(torch.tensor(commits))
        case.kv.copy_(torch.randn(case.kv.shape))
        case.positions.copy_(case.positions.flip(0))
        case.slots.copy_(case.slots.flip(0))
        graph.replay()
        assert same_bits(base, case.run(commit_lens=lens)) and base.isfinite().any()


def test_positions_are_checked_on_request_for_written_rows_only(monkeypatch):
    monkeypatch.setenv("DFLASH_CHECK", "1")
    case = Case(torch.float32, 4)
    case.positions[2] = MAX_POS
    with pytest.raises(ValueError, match=r"write_context_kv: positions must be in \[0, 64\).*; got 64 at row 2"):
        case.run()
    case.run(commit_lens=torch.tensor([2, 0], dtype=torch.int32))
    case.run(slots=torch.tensor([0, 1, -1, 2]))
    case.run(cos_sin=None)
    Case(torch.float32, 0).run()


def test_bad_input_names_what_was_expected_and_got():
    case = Case(torch.float32, 4)
    base = case.base()
    cases = [
        (ValueError, r"kv must have shape \(T, L \* 2 \* Hkv \* D\) = \(\*, 1152\); got", dict(kv=case.kv[:, 1:])),
        (TypeError, "positions must be int64", dict(positions=case.positions.int())),
        (TypeError, "slots must be int64", dict(slots=case.slots.int())),
        (ValueError, r"slots must have shape \(L, T\) = \(3, 4\)", dict(slots=case.slots[None])),
        (ValueError, r"k_weights must have shape \(L, D\) = \(3, 64\)", dict(k_weights=torch.ones(2, 64))),
        (TypeError, "commit_lens must be int32", dict(commit_lens=torch.ones(2).long())),
        (ValueError, "commit_lens must have a length B that divides T = 4", dict(commit_lens=torch.ones(3).int())),
        (ValueError, "commit_lens must have a length B", dict(commit_lens=torch.ones(0).int())),
        (ValueError, "rounding must be 'each' or 'end'; got None", dict(rounding=None)),
    ]
    for error, message, change in cases:
        with pytest.raises(error, match="write_context_kv: .*" + message):
            case.run(base, **change)
    caches = [PagedKV(k, v) for k, v in cache_views(base, "nhd")]
    for error, message, wrong in [
        (ValueError, "caches must be L >= 1 PagedKV", []),
        (NotImplementedError, "at most 64 layers; got 65", caches[:1] * 65),
        (TypeError, r"caches\[1\] must be a PagedKV; got float32", [caches[0], base, caches[2]]),
        (ValueError, r"caches\[2\] must have the shape of caches\[0\]",
         [*caches[:2], PagedKV(caches[2].k[1:], caches[2].v[1:])]),
        (ValueError, r"caches\[1\] must have the strides of caches\[0\]",
         [caches[0], PagedKV(caches[1].k.transpose(1, 2).contiguous().transpose(1, 2), caches[1].v), caches[2]]),
    ]:
        with pytest.raises(error, match=message):
            write_context_kv(case.kv, case.positions, case.slots, wrong, **case.args)
    assert base.isnan().all()


def test_schema_and_fake():
    case = Case(torch.bfloat16, 4, 2, 1, 16, 8)
    k, v = ([t.clone() for t in ts] for ts in zip(*cache_views(torch.zeros_like(case.base()), "nhd"), strict=True))
    torch.library.opcheck(torch.ops.dflash.write_context_kv, (
        case.kv, case.positions, case.slots, k, v, [], [], case.args["k_weights"], case.args["cos_sin"],
        torch.tensor([2, 1], dtype=torch.int32), 1e-6, 0.5, False, True))
