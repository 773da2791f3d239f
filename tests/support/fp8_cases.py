"""What holds of float8_e4m3fn caches on every backend; the callers run the ops."""

import torch

from dflash_kernels.limits import FP8
from dflash_kernels.paged_kv import PagedKV
from dflash_kernels.testing import assert_within_budget, cache_views, same_bits

SCALES = ["none", "tensor", "one", "head", "k alone"]


def nearest(x):
    """The codes (uint8) that x is to be stored with: looked up among all that there are, in float64."""
    finite = torch.arange(0x7f, dtype=torch.uint8).view(FP8).double()
    middles = (finite[1:] + finite[:-1]) / 2
    a = x.double().abs().clamp(max=448).contiguous()
    code = torch.bucketize(a, middles)
    code += (a == middles[code.clamp(max=len(middles) - 1)]) & (code % 2 == 1)
    return torch.where(x.isnan(), 0x7f, code + 128 * x.signbit()).to(torch.uint8)


def every_case():
    """float32: every code's value and every middle, both signs, each with its neighbours; what is not finite."""
    finite = torch.arange(0x7f, dtype=torch.uint8).view(FP8).float()
    x = torch.cat([finite, (finite[1:] + finite[:-1]) / 2, torch.tensor([464.0, 480.0, 1e9, torch.inf, 2.0**-140])])
    x = torch.cat([x, x.nextafter(torch.tensor(torch.inf)), x.nextafter(torch.tensor(-torch.inf)),
                   torch.tensor([torch.nan])])
    return torch.cat([x, -x])


def scales(kind, heads):
    """(k_scale, v_scale)"""
    k, v = torch.rand(heads) + 0.01, 3 * torch.rand(heads) + 0.2
    return {"none": (None, None), "tensor": (k[0], v[0]), "one": (k[:1], v[:1]), "head": (k, v),
            "k alone": (k, None)}[kind]


# ---- writing: case is a test_context.Case --------------------------------------------------------------------------

def make_fp8(case, kind):
    layers, heads = case.shape[1], case.shape[4]
    case.cache_dtype = FP8
    case.k_scales, case.v_scales = (list(each) for each in zip(*(scales(kind, heads) for _ in range(layers)),
                                                               strict=True))
    return case


def check_stored(case, kind, **change):
    """An fp8 cache has the bytes of the cache of kv's dtype, divided and rounded, and nothing else is touched."""
    plain = case.run(**change)
    want = torch.full(plain.shape, 0x7f, dtype=torch.uint8)
    make_fp8(case, kind)
    for layer, (pair, out) in enumerate(zip(cache_views(plain, case.shape[0]), cache_views(want, case.shape[0]),
                                            strict=True)):
        for t, to, scale in zip(pair, out, (case.k_scales[layer], case.v_scales[layer]), strict=True):
            to.copy_(nearest(t.float() if scale is None else t.float() / scale.reshape(-1, 1)))
    got = case.run(**change)
    assert torch.equal(got.view(torch.uint8), want), kind
    return got


def check_every_value(case):
    """case: heads of 64 in one layer of one head. K takes every value in order, V in reverse."""
    case.args = dict(k_weights=None, cos_sin=None)
    values = every_case().to(case.kv.dtype)
    rows = -(-len(values) // 64)
    case.kv = torch.zeros(rows, 2, 64, dtype=case.kv.dtype)
    padded = torch.cat([values, values.new_zeros(rows * 64 - len(values))])
    case.kv[:, 0], case.kv[:, 1] = padded.view(rows, 64), padded.flip(0).view(rows, 64)
    case.kv = case.kv.flatten(1)
    case.positions, case.slots = torch.zeros(rows, dtype=torch.int64), torch.arange(rows)
    for kind in ("none", "tensor"):
        case.cache_dtype, case.k_scales, case.v_scales = case.kv.dtype, [None], [None]
        check_stored(case, kind)


def check_planted_store_faults(case):
    """A factor instead of a divisor, another layer's or another head's scale: each is other bytes."""
    good = make_fp8(case, "head").run().view(torch.uint8)
    k = case.k_scales
    for fault in ([1 / s for s in k], k[::-1], [s.flip(0) for s in k], [s[:1] for s in k]):
        case.k_scales = fault
        assert not torch.equal(case.run().view(torch.uint8), good)


# ---- reading: case is a test_attention.Case, run(case, **options) calls block_attention ----------------------------

def quantise(case, kind):
    """The case's cache as an fp8 one; where nothing was written, 0x7f."""
    k_scale, v_scale = scales(kind, case.cache.k.shape[2])
    k, v = (nearest(t.float() if s is None else t.float() / s.reshape(-1, 1)).view(FP8)
            for t, s in ((case.cache.k, k_scale), (case.cache.v, v_scale)))
    case.cache = PagedKV(k, v, k_scale, v_scale)
    return case


def check_read(run, case, **options):
    got = run(case, **options)
    assert_within_budget(got, case.expect(**options), case.expect(wide=False, **options), name=str(options))
    return got


def check_planted_read_faults(run, case):
    """Scales that are not this head's, not this tensor's, or not taken at all."""
    quantise(case, "head")
    good, peer, cache = case.expect(), case.expect(wide=False), case.cache
    assert_within_budget(run(case), good, peer)
    for fault in ((cache.v_scale, cache.k_scale), (cache.k_scale.flip(0), cache.v_scale), (None, cache.v_scale),
                  (cache.k_scale, cache.v_scale[:1]), (cache.k_scale, None)):
        case.cache = PagedKV(cache.k, cache.v, *fault)
        try:
            assert_within_budget(run(case), good, peer)
        except AssertionError:
            continue
        raise AssertionError(f"scales {fault} were not noticed")


def check_layouts(run, case):
    """case: pages of 16."""
    cache, want = case.cache, run(case)
    pages, page, heads, dim = cache.k.shape
    poison = torch.full((pages, 2, page + 1, heads, dim + 16), 0x7f, dtype=torch.uint8).view(FP8)
    poison[:, 0, :page, :, :dim], poison[:, 1, :page, :, :dim] = cache.k, cache.v
    table = case.table
    slots = (table[:, :3, None].clamp(max=pages - 1) * page + torch.arange(page)).flatten(1).int()
    for k, v, pages_of in (
            (*(t.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3) for t in (cache.k, cache.v)), table),
            (poison[:, 0, :page, :, :dim], poison[:, 1, :page, :, :dim], table),
            (*(t.reshape(pages * page, 1, heads, dim) for t in (cache.k, cache.v)), slots)):
        case.cache, case.table = PagedKV(k, v, cache.k_scale, cache.v_scale), pages_of
        assert same_bits(run(case), want)
