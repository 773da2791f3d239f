import pytest
import torch

from dflash_kernels._triton import attention as triton_attention
from dflash_kernels.paged_kv import PagedKV
from dflash_kernels.testing import assert_within_budget, same_bits
from tests.kernels.test_attention import check_window_edges
from tests.kernels.test_attention_limits import BEYOND, check_a_context_beyond_the_table, check_scores_of_minus_524288
from tests.support import fp8_cases
from tests.support.attention_cases import NAN, Case, check_packed_blocks, check_rows_beside_what_is_not_finite, ints

CANARY = 7.0


TILES = {"f32": (torch.float32, 8), "f16": (torch.float16, 8), "f16 sm_90": (torch.float16, 9)}


@pytest.fixture(params=["f32", "f16 sm_90"])
def dtype(request, monkeypatch):
    """With the smallest tiles and with the largest, which the short blocks and splits here leave half empty."""
    dtype, generation = TILES[request.param]
    monkeypatch.setattr(triton_attention, "generation", lambda device: generation)
    return dtype


every_tile = pytest.mark.parametrize("dtype", TILES, indirect=True)


@pytest.fixture
def short_splits(monkeypatch):
    """Splits of 64 positions, of 128 from 256 on, so that short contexts have several."""
    monkeypatch.setattr(triton_attention, "SPLIT", 64)
    monkeypatch.setattr(triton_attention, "EACH", 2)


def launch(q, k, v, cache, table, lens, *, out, block_lens=None, context_starts=None, block_starts=None,
           max_block=None, scale=None, causal=False, window=(-1, -1), sinks=None, softcap=0.0):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    pages = (None,) * 4 if cache is None else (cache.k, cache.v, cache.k_scale, cache.v_scale)
    rows = (q, k, v, out) if block_starts is None else (t.unsqueeze(0) for t in (q, k, v, out))
    q4, k4, v4, out4 = rows
    assert triton_attention.block_attention(
        q4, k4, v4, *pages, table, lens, block_lens, context_starts, block_starts, max_block or q.shape[1], scale,
        causal, *window, sinks, softcap, out4) is None
    return out


def run(case, **options):
    return launch(*case.args(), out=torch.full_like(case.q, CANARY), **options)


def check(case, **options):
    got = run(case, **options)
    assert_within_budget(got, case.expect(**options), case.expect(wide=False, **options), name=str(options))
    return got


@every_tile
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (6, 6)}, {"window": (0, 0)}, {"softcap": 3.0},
                                     {"causal": True, "window": (70, -1), "scale": 0.5}], ids=str)
def test_matches_reference(dtype, options):
    check(Case([37, 0, 150, 16], dim=32, dtype=dtype), **options)


@every_tile
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (70, 2), "softcap": 3.0}], ids=str)
def test_several_splits_match_reference(dtype, options, short_splits):
    check(Case([0, 300, 63, 64, 126], dim=16, dtype=dtype), sinks=torch.linspace(-2, 2, 6), **options)


# heads, key heads, head dim, page size, width: every configuration of the table, more rows than a tile, odd sizes
@every_tile
@pytest.mark.parametrize("heads,kv_heads,dim,page,width", [(2, 2, 128, 1, 3), (9, 3, 64, 5, 3), (3, 1, 256, 16, 2),
                                                           (3, 1, 20, 128, 30), (7, 1, 33, 16, 5), (4, 4, 1, 3, 2)])
def test_geometries(dtype, heads, kv_heads, dim, page, width):
    check(Case([66, 5], width=width, heads=heads, kv_heads=kv_heads, dim=dim, page=page, dtype=dtype), window=(40, 1))


@pytest.mark.parametrize("dim,dtype,major,fp8", [(128, torch.float16, 12, False), (128, torch.float16, 9, False),
                                                 (128, torch.float16, 10, True),
                                                 (256, torch.float32, 10, False), (256, torch.float32, 12, False)])
def test_tiles_that_one_generation_has(dim, dtype, major, fp8, monkeypatch):
    monkeypatch.setattr(triton_attention, "generation", lambda device: major)
    context, left = (70, 50) if dtype == torch.float32 else (166, 140)  # tiles that are seen whole, in part, not at all
    case = Case([context, 5], width=9, heads=5, kv_heads=1, dim=dim, dtype=dtype)
    if fp8:
        fp8_cases.check_read(run, fp8_cases.quantise(case, "head"), window=(left, 1))
    else:
        check(case, window=(left, 1))
        check(case, softcap=3.0)


def test_sinks(dtype):
    sinks = torch.tensor([-torch.inf, -3.0, 0.0, 2.0, 30.0, 200.0])
    case = Case([70, 0], dim=16, dtype=dtype)
    got = check(case, sinks=sinks, window=(20, 20))
    check(case, sinks=sinks.to(dtype))
    assert same_bits(got[:, :, 0], run(case, window=(20, 20))[:, :, 0])
    assert (got[:, :, 5] == 0).all()


def test_p1_only_valid_keys_enter_the_softmax_at_every_length(short_splits):
    for context in (0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129):
        case = Case([context], width=2, heads=2, kv_heads=1, dim=16)
        case.q.zero_()
        mean = case.v[0].double().mean(0).expand(1, 2, 2, 16)
        torch.testing.assert_close(run(case).double(), mean, rtol=0, atol=1e-6, msg=f"context {context}")


@pytest.mark.parametrize("left,right", [(10, 3), (63, 0), (0, 1), (31, 31), (-1, 2)])
def test_p5_the_window_ends_exactly_at_its_edge_on_both_sides(left, right):
    check_window_edges(run, left, right)


def test_p16_cache_layouts_packed_rows_strided_output_and_canaries(dtype):
    case = Case([45, 3], dim=16, dtype=dtype)
    q, k, v, cache, table, lens = case.args()
    want = run(case)
    pages, page, heads, dim = cache.k.shape
    poison = torch.full((pages, 2, page + 1, heads, dim + 16), NAN, dtype=dtype)  # interleaved, padded
    poison[:, 0, :page, :, :dim], poison[:, 1, :page, :, :dim] = cache.k, cache.v
    slots = (table[:, :3, None].clamp(max=pages - 1) * page + torch.arange(page)).flatten(1).int()
    layouts = [
        ([t.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3) for t in (cache.k, cache.v)], table),
        ([poison[:, i, :page, :, :dim] for i in (0, 1)], table),
        ([t.reshape(pages * page, 1, heads, dim) for t in (cache.k, cache.v)], slots),
    ]
    packed = torch.full((2, 5, 11, 16), NAN, dtype=dtype)
    packed[:, :4, :6], packed[:, :4, 6:8], packed[:, :4, 8:10] = q, k, v
    rows = packed[:, :4, :6], packed[:, :4, 6:8], packed[:, :4, 8:10]
    for caches, pages_of in layouts:
        out = torch.full((2, 4, 8, 22), CANARY).to(dtype)
        view = out[:, :, 1:7, 3:19]
        wide_table = torch.full((2, pages_of.shape[1] + 3), -7, dtype=torch.int32)
        wide_table[:, 2:-1] = pages_of
        launch(*rows, PagedKV(*caches), wide_table[:, 2:-1], lens, out=view)
        assert same_bits(view, want)
        view.fill_(CANARY)
        assert (out == CANARY).all()


def test_p19_context_starts_hides_what_was_never_written(dtype):
    case = Case([100, 40, 17], dim=16, dtype=dtype)
    starts = ints(33, 40, 0)
    want = check(case, context_starts=starts)
    for at in range(33):
        where = int(case.table[0, at // 16]), at % 16
        case.cache.k[where], case.cache.v[where] = NAN, NAN
    case.table[0, :2] = -5
    case.table[1, :2] = 2**31 - 1
    assert same_bits(run(case, context_starts=starts), want)


@pytest.mark.parametrize("splits", [512, 64])
def test_p20_block_lens_hide_rows_and_padded_requests_write_nothing(dtype, splits, monkeypatch):
    monkeypatch.setattr(triton_attention, "SPLIT", splits)
    case = Case([20, 133, 0, 5], width=5, dim=16, dtype=dtype)
    lens = ints(5, 2, 1, 0)
    for b, n in enumerate(lens.tolist()):
        case.k[b][case.contexts[b] + n:], case.v[b][case.contexts[b] + n:], case.q[b, n:] = NAN, NAN, NAN
    got = run(case, block_lens=lens)
    want, peer = case.expect(block_lens=lens), case.expect(wide=False, block_lens=lens)
    for b, n in enumerate(lens.tolist()):
        assert_within_budget(got[b, :n], want[b, :n], peer[b, :n])
        assert (got[b, n:] == CANARY).all()


@pytest.mark.parametrize("splits", [512, 64])
def test_packed_blocks_have_the_bits_of_padded_ones(dtype, splits, monkeypatch):
    monkeypatch.setattr(triton_attention, "SPLIT", splits)
    case = Case([70, 2, 0, 300], heads=3, kv_heads=1, dim=16, dtype=dtype)
    check_packed_blocks(launch, case, [4, 1, 0, 3], [3, 0, 99, 8], 12, causal=True)


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_what_is_not_finite_reaches_exactly_the_rows_that_see_it(dtype, bad):
    for at in (41, 49, 53):
        case = Case([50], width=6, heads=2, kv_heads=1, dim=16, dtype=dtype)
        case.v[0][at, 0, 3] = bad
        if at < 50:
            case.cache.v[int(case.table[0, at // 16]), at % 16, 0, 3] = bad
        check(case, window=(8, 1))
        check(case)
    case = Case([50], width=6, heads=2, kv_heads=1, dim=16, dtype=dtype)
    clean = run(case, window=(8, 1))
    case.k[0][53], case.q[0, 0, 1] = NAN, NAN
    got = run(case, window=(8, 1))
    for i in range(6):
        for h in range(2):
            reached = i + 1 >= 3 or (i, h) == (0, 1)
            assert got[0, i, h].isnan().all() if reached else same_bits(got[0, i, h], clean[0, i, h])


def test_a2_a_row_beside_one_that_sees_what_is_not_finite_has_its_bits(dtype):
    check_rows_beside_what_is_not_finite(run, Case([150], width=6, heads=2, kv_heads=1, dim=16, dtype=dtype), 140)


def test_a2_a_row_beside_one_that_sees_what_is_not_finite_has_its_bits_over_an_fp8_cache(dtype):
    case = Case([150], width=6, heads=2, kv_heads=1, dim=16, dtype=dtype)
    check_rows_beside_what_is_not_finite(run, fp8_cases.quantise(case, "none"), 140)


def test_p21_a_context_past_the_table_is_nan_where_it_is_seen(dtype):
    case = Case([20, 20], dim=16, dtype=dtype)
    case.lens[0] = 16 * case.table.shape[1] + 1
    got = run(case, window=(2, -1))
    assert torch.equal(got.isnan(), case.expect(window=(2, -1)).isnan()) and got[0, :2].isnan().all()
    case.lens[0], case.table[0, 0] = 20, 2**30
    got = run(case)
    assert got[0].isnan().all() and not got[1].isnan().any()
    sizes = dict(heads=3, kv_heads=1, dim=16, dtype=dtype)
    case = Case([300, 300], **sizes)  # in a tile that all rows see
    case.table[1, 9] = -1
    assert torch.equal(run(case).isnan(), case.expect().isnan())
    assert same_bits(run(case, window=(120, -1)), run(Case([300, 300], **sizes), window=(120, -1)))


@pytest.mark.parametrize("splits", [512, 64])
def test_a_context_far_past_the_table_ends_with_the_table(splits, monkeypatch):
    """As one token past it, in its bits and in what is read: 2**31 - 1 positions, block included, are never counted."""
    monkeypatch.setattr(triton_attention, "SPLIT", splits)
    case = Case([20, 20, 20], heads=3, kv_heads=1, dim=16)
    room = 16 * case.table.shape[1]
    case.table[:2] = torch.arange(case.table.shape[1])  # every page exists
    for options in ({}, {"causal": True, "window": (2, -1)}, {"window": (room + 1, 0), "causal": True}):
        case.lens[:] = ints(room + 1, room + 1, 20)
        want = run(case, **options)
        assert want[:2, :2].isnan().all() and not want[2].isnan().any()
        assert torch.equal(want[:2].isnan(), case.expect(**options)[:2].isnan())
        for far in (room + 5, 2**31 - 1):
            case.lens[:2] = ints(far, 2**30)
            assert same_bits(run(case, **options), want), (options, far)
    case.lens[:2] = ints(2**31 - 1, 2**31 - 2)
    got = run(case, context_starts=case.lens.clone())
    case.lens[:2] = room
    assert same_bits(got, run(case, context_starts=case.lens))


def test_empty_batches_and_blocks_and_no_cache(dtype):
    assert run(Case([], dim=16, dtype=dtype)).shape == (0, 4, 6, 16)
    assert run(Case([5, 0], width=0, dim=16, dtype=dtype)).shape == (2, 0, 6, 16)
    case = Case([0], dim=16, dtype=dtype)
    q, k, v, *_ = case.args()
    want = run(case, causal=True, window=(2, 0))
    for context in (0, 123456):
        got = launch(q, k, v, None, None, ints(context), out=torch.empty_like(q), causal=True, window=(2, 0))
        assert same_bits(got, want)


# ---- bits ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [{}, {"causal": True, "window": (70, -1)}], ids=str)
@pytest.mark.parametrize("kind", ["", "head"], ids=["16 or 32 bits", "fp8"])
def test_how_splits_are_shared_out_changes_no_bit(dtype, options, kind, short_splits, monkeypatch):
    """Nor does how many there are room for."""
    case = Case([300, 0, 65, 128], heads=3, kv_heads=1, dim=16, dtype=dtype)
    case = fp8_cases.quantise(case, kind) if kind else case
    monkeypatch.setattr(triton_attention, "shares_of", lambda tasks, splits, at_once: 1)
    want = run(case, **options)
    for shares in (3, 9):
        monkeypatch.setattr(triton_attention, "shares_of", lambda tasks, splits, at_once, n=shares: n)
        assert same_bits(run(case, **options), want), shares
        case.table = torch.cat([case.table, torch.full((4, 9 * shares), 2**30, dtype=torch.int32)], 1)


def test_what_is_not_finite_is_left_to_merge_exactly(dtype, short_splits, monkeypatch):
    """Of each of a program's splits, not of the last alone."""
    for at in (10, 100, 190, 205):
        case = Case([200], width=6, heads=2, kv_heads=1, dim=20, dtype=dtype)
        case.v[0][at, 0, 17] = float("inf")
        if at < 200:
            case.cache.v[int(case.table[0, at // 16]), at % 16, 0, 17] = float("inf")
        for shares in (1, 2):
            monkeypatch.setattr(triton_attention, "shares_of", lambda tasks, splits, at_once, n=shares: n)
            check(case, window=(97, 1))


@every_tile
def test_p22_p23_alone_in_a_batch_or_one_by_one_a_row_has_the_same_bits(dtype, short_splits):
    start, total = 125, 8
    case = Case([start + total, 70], width=total, heads=3, kv_heads=1, dim=16, dtype=dtype)
    lens = ints(start, 70)
    k, v = (torch.stack([x[0][start:start + total], x[1][70:]]) for x in (case.k, case.v))
    whole = launch(case.q, k, v, case.cache, case.table, lens, out=torch.empty_like(case.q), causal=True)
    for width in (1, 3, total):
        for i in range(0, total, width):
            part = case.q[:1, i:i + width]
            got = launch(part, k[:1, i:i + width], v[:1, i:i + width], case.cache, case.table[:1], ints(start + i),
                         out=torch.empty_like(part), causal=True)
            assert same_bits(got[0], whole[0, i:i + width]), (width, i)


# ---- fp8 caches ----------------------------------------------------------------------------------------------------

@every_tile
@pytest.mark.parametrize("kind,options", [("none", {}), ("tensor", {"window": (6, 6)}), ("one", {"causal": True}),
                                          ("head", {"softcap": 3.0, "window": (70, 2)}),
                                          ("k alone", {"causal": True, "window": (9, -1)})], ids=str)
def test_fp8_matches_reference(dtype, options, kind, short_splits):
    case = fp8_cases.quantise(Case([37, 0, 150, 64], dim=16, dtype=dtype), kind)
    fp8_cases.check_read(run, case, sinks=torch.linspace(-2, 2, 6), **options)


@pytest.mark.parametrize("heads,kv_heads,dim,page,width", [(2, 2, 128, 1, 3), (9, 3, 64, 5, 3), (3, 1, 256, 16, 2),
                                                           (3, 1, 20, 128, 30), (7, 1, 33, 16, 5), (4, 4, 1, 3, 2)])
def test_fp8_geometries(dtype, heads, kv_heads, dim, page, width):
    case = fp8_cases.quantise(Case([66, 5], width=width, heads=heads, kv_heads=kv_heads, dim=dim, page=page,
                                   dtype=dtype), "head")
    if dtype == torch.float32 and dim > 64:
        with pytest.raises(NotImplementedError, match=f"heads of 64; got {dim}"):
            run(case)
        return
    fp8_cases.check_read(run, case, window=(40, 1))


def test_planted_faults_change_what_is_read_of_an_fp8_cache(dtype):
    fp8_cases.check_planted_read_faults(run, Case([70, 9], dim=16, dtype=dtype))


def test_p16_fp8_layouts_give_the_same_bits(dtype):
    fp8_cases.check_layouts(run, fp8_cases.quantise(Case([45, 3], dim=16, dtype=dtype), "head"))


def test_fp8_nan_reaches_exactly_the_rows_that_see_it(dtype):
    sizes = dict(width=6, heads=2, kv_heads=1, dim=16, dtype=dtype)
    clean = run(fp8_cases.quantise(Case([50], **sizes), "none"), window=(8, 1))
    for which, at in (("k", 44), ("v", 41), ("v", 49)):
        case = Case([50], **sizes)
        getattr(case.cache, which)[int(case.table[0, at // 16]), at % 16] = NAN
        got = run(fp8_cases.quantise(case, "none"), window=(8, 1))
        for i in range(6):
            sees = 50 + i - 8 <= at <= 50 + i + 1
            assert got[0, i].isnan().all() if sees else same_bits(got[0, i], clean[0, i]), (which, at, i)


@pytest.mark.parametrize("options", [{}, {"causal": True, "window": (70, -1)}], ids=str)
def test_p23_fp8_rows_have_the_same_bits_however_they_come(dtype, options, short_splits, monkeypatch):
    """Splits shared out or not, a request alone or in a batch, a block or its first rows."""
    case = fp8_cases.quantise(Case([126, 0, 65, 150], width=6, heads=3, kv_heads=1, dim=16, dtype=dtype), "head")
    q, k, v, cache, table, lens = case.args()
    whole = run(case, **options)
    for b in ([0], [3, 1]):
        part = launch(q[b], k[b], v[b], cache, table[b], lens[b], out=torch.empty_like(q[b]), **options)
        assert same_bits(part, whole[b])
    if options:
        for n in (1, 2, 5):
            part = launch(q[:, :n], k[:, :n], v[:, :n], cache, table, lens, out=torch.empty_like(q[:, :n]), **options)
            assert same_bits(part, whole[:, :n].contiguous())
    monkeypatch.setattr(triton_attention, "shares_of", lambda tasks, splits, at_once: 1)
    assert same_bits(run(case, **options), whole)


def test_scores_of_minus_524288_are_a_mean_and_no_zeros(dtype, short_splits):
    check_scores_of_minus_524288(run, contexts=(70, 0), dtype=dtype)


def test_a_context_beyond_the_page_table_ends_and_is_nan(dtype):
    check_a_context_beyond_the_table(run, BEYOND[-1], dtype=dtype)
