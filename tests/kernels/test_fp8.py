"""float8_e4m3fn caches on the CPU: what is stored, what is read, and what is refused."""

import pytest
import torch

from dflash_kernels import block_attention, qk_norm_rope, write_context_kv
from dflash_kernels.limits import FP8
from dflash_kernels.paged_kv import PagedKV
from dflash_kernels.reference import _fp8
from dflash_kernels.testing import LAYOUTS, cache_views, same_bits
from tests.kernels import test_context
from tests.support import attention_cases
from tests.support import fp8_cases as fp8
from tests.support.attention_cases import NAN, ints


def test_the_reference_rounds_to_the_nearest_and_knows_every_code():
    x = fp8.every_case()
    assert torch.equal(_fp8.quantised(x, None).view(torch.uint8), fp8.nearest(x))
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)
    kept = fp8.nearest(_fp8.dequantised(codes, None))
    assert torch.equal(kept[:255], codes.view(torch.uint8)[:255]) and kept[255] == 0x7f


# ---- write_context_kv and qk_norm_rope -----------------------------------------------------------------------------

@pytest.mark.parametrize("kind", fp8.SCALES)
@pytest.mark.parametrize("shape", [(8, 3, 3, 64, 64), (2, 2, 1, 128, 64), (3, 2, 2, 20, 6), (0, 1, 1, 64, 64)], ids=str)
def test_context_is_stored_divided_and_rounded(isa, dtype, shape, kind):
    fp8.check_stored(test_context.Case(dtype, *shape), kind, interleaved=kind == "head", v_scale=0.707)


def test_every_value_is_stored_as_the_nearest(isa, dtype):
    fp8.check_every_value(test_context.Case(dtype, 2, 1, 1, 64, page_size=8))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_p16_p17_p18_layouts_commit_lengths_and_slots_that_do_not_exist(isa, dtype, layout):
    case = test_context.Case(dtype, 12, 2, 2, 32, 32, layout, page_size=4)
    end = test_context.NUM_PAGES * case.page_size
    case.slots = torch.tensor([0, -1, end - 1, end, 1, 2, 2**62, -(2**62), 3, 4, -end, 2])
    got = fp8.check_stored(case, "head", commit_lens=ints(4, 1, 9))
    assert (got.view(torch.uint8) != 0x7f).any()


def test_planted_faults_change_what_is_stored(isa, dtype):
    fp8.check_planted_store_faults(test_context.Case(dtype, 4, 2, 3, 64, 64))


@pytest.mark.parametrize("kind", ["none", "tensor", "head"])
def test_qk_norm_rope_stores_what_write_context_kv_does(isa, dtype, kind):
    layers, heads, dim = 2, 2, 64
    case = fp8.make_fp8(test_context.Case(dtype, 5, layers, heads, dim, 32), kind)
    context, own = case.run(), case.base()
    for layer, (k, v) in enumerate(cache_views(own, "nhd")):
        kv = case.kv.unflatten(1, (layers, -1))[:, layer]
        qkv = torch.cat([torch.randn(5, 3 * dim).to(dtype), kv], 1)
        qk_norm_rope(qkv, case.positions, case.args["cos_sin"], num_heads=3, num_kv_heads=heads, head_dim=dim,
                     k_weight=case.args["k_weights"][layer], slots=case.slots,
                     cache=PagedKV(k, v, case.k_scales[layer], case.v_scales[layer]))
    assert same_bits(own, context)


# ---- block_attention -----------------------------------------------------------------------------------------------

OPTIONS = [{}, {"causal": True}, {"window": (6, 6)}, {"window": (0, 0)}, {"softcap": 3.0}, {"window": (5, 0)},
           {"causal": True, "window": (9, -1), "scale": 0.5}, {"window": (300, 2), "softcap": 7.0}]


@pytest.mark.parametrize("kind", fp8.SCALES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attention_matches_reference(isa, dtype, options, kind):
    case = fp8.quantise(attention_cases.Case([37, 0, 270, 16], dtype=dtype), kind)
    fp8.check_read(attention_cases.Case.run, case, sinks=torch.linspace(-2, 2, 6), **options)


@pytest.mark.parametrize("heads,kv_heads,dim,page", [(2, 2, 128, 1), (9, 3, 64, 5), (7, 1, 256, 16), (3, 1, 20, 128),
                                                     (4, 4, 1, 3), (5, 5, 33, 16), (2, 1, 80, 64)])
def test_geometries(isa, dtype, heads, kv_heads, dim, page):
    case = attention_cases.Case([66, 5], width=3, heads=heads, kv_heads=kv_heads, dim=dim, page=page, dtype=dtype)
    fp8.check_read(attention_cases.Case.run, fp8.quantise(case, "head"), window=(40, 1))


def test_planted_faults_change_what_is_read(isa, dtype):
    fp8.check_planted_read_faults(attention_cases.Case.run, attention_cases.Case([70, 9], dtype=dtype))


def test_without_scales_the_bits_are_those_of_the_same_numbers_in_a_cache_of_q_s_dtype(isa, dtype):
    case = fp8.quantise(attention_cases.Case([300, 20], width=5, dtype=dtype), "none")
    got = case.run(causal=True)
    case.cache = PagedKV(case.cache.k.to(dtype), case.cache.v.to(dtype))
    assert same_bits(got, case.run(causal=True))


def test_p16_every_cache_layout_gives_the_same_bits(isa, dtype):
    fp8.check_layouts(attention_cases.Case.run, fp8.quantise(attention_cases.Case([45, 3], dtype=dtype), "head"))


def test_nan_reaches_exactly_the_rows_that_see_it(isa, dtype):
    clean = fp8.quantise(attention_cases.Case([50], width=6, dtype=dtype), "head").run(window=(8, 1))
    for which in ("k", "v"):
        for at in (41, 44, 49):
            torch.manual_seed(0)
            case = attention_cases.Case([50], width=6, dtype=dtype)
            getattr(case.cache, which)[int(case.table[0, at // 16]), at % 16] = NAN
            torch.manual_seed(0)
            got = fp8.quantise(case, "head").run(window=(8, 1))
            for i in range(6):
                sees = 50 + i - 8 <= at <= 50 + i + 1
                assert got[0, i].isnan().all() if sees else same_bits(got[0, i], clean[0, i]), (which, at, i)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (70, 70)}], ids=str)
def test_p23_a_request_has_the_same_bits_alone_in_any_batch_and_in_any_width(isa, dtype, options):
    case = fp8.quantise(attention_cases.Case([300, 0, 65, 530], width=7, heads=3, kv_heads=1, dtype=dtype), "head")
    whole = case.run(**options)
    q, k, v, cache, table, lens = case.args()
    for b in ([0], [1], [3, 1], [2, 2, 0]):
        assert same_bits(block_attention(q[b], k[b], v[b], cache, table[b], lens[b], **options), whole[b])
    if options.get("causal"):  # rows before the last see the same keys in a shorter block
        for n in (1, 2, 5):
            part = block_attention(q[:, :n], k[:, :n], v[:, :n], cache, table, lens, **options)
            assert same_bits(part, whole[:, :n].contiguous())


def test_page_size_and_threads_change_no_bit(isa, dtype):
    results, threads = [], torch.get_num_threads()
    try:
        for page in (1, 16, 128):
            torch.manual_seed(0)
            case = fp8.quantise(attention_cases.Case([700, 20], width=8, page=page, dtype=dtype), "head")
            for n in (1, 2):
                torch.set_num_threads(n)
                results.append(case.run(causal=True))
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(r, results[0]) for r in results)


# ---- errors --------------------------------------------------------------------------------------------------------

def test_scales_that_a_cache_cannot_have():
    k, v = torch.zeros(2, 2, 4, 3, 8).to(FP8)
    for error, match, k_scale in [
        (TypeError, "k_scale must be a float32 tensor; got float", 0.5),
        (TypeError, "k_scale must be a float32 tensor; got torch.bfloat16", torch.ones(3).bfloat16()),
        (ValueError, r"k_scale must be contiguous, of shape \(\), \(1,\) or \(Hkv,\) = \(3,\); got \(2,\)",
         torch.ones(2)),
        (ValueError, "k_scale must be contiguous", torch.ones(6)[::2]),
        (ValueError, "k_scale must be on cpu; got meta", torch.ones(3, device="meta")),
    ]:
        with pytest.raises(error, match=f"PagedKV: {match}"):
            PagedKV(k, v, k_scale)
    with pytest.raises(ValueError, match="v_scale must be None where the cache is not float8_e4m3fn"):
        PagedKV(k.float(), v.float(), None, torch.ones(3))


def test_layers_whose_caches_differ_are_refused():
    case = test_context.Case(torch.float32, 2, layers=2)
    views, plain = cache_views(case.base(FP8), "nhd"), cache_views(case.base(), "nhd")
    one = torch.tensor(1.0)
    for error, match, caches in [
        (TypeError, r"caches\[1\] must have the dtype of caches\[0\]", [PagedKV(*views[0]), PagedKV(*plain[1])]),
        (ValueError, r"caches\[1\] must have the strides of caches\[0\]",
         [PagedKV(*plain[0]), PagedKV(plain[1][0], plain[1][1].transpose(1, 2).contiguous().transpose(1, 2))]),
        (ValueError, r"caches\[1\].k_scale must be as large as that of caches\[0\], none; got 1",
         [PagedKV(*views[0]), PagedKV(*views[1], one)]),
        (ValueError, r"caches\[1\].v_scale must be as large as that of caches\[0\], 1; got 3",
         [PagedKV(*views[0], one, one), PagedKV(*views[1], one, torch.ones(3))]),
    ]:
        with pytest.raises(error, match=f"write_context_kv: {match}"):
            write_context_kv(case.kv, case.positions, case.slots, caches, **case.args)


def test_scales_are_checked_on_request(monkeypatch):
    monkeypatch.setenv("DFLASH_CHECK", "1")
    case = fp8.make_fp8(test_context.Case(torch.float32, 2, layers=1), "head")
    case.run()
    case.v_scales = [torch.tensor([1.0, 0.0, 1.0])]
    with pytest.raises(ValueError, match=r"caches\[0\].v_scale must be finite and above 0; got \[1.0, 0.0, 1.0\]"):
        case.run()
    attention = fp8.quantise(attention_cases.Case([20]), "tensor")
    attention.run()
    attention.cache.k_scale.fill_(-1.0)
    with pytest.raises(ValueError, match="cache.k_scale must be finite and above 0; got -1.0"):
        attention.run()
