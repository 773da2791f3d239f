"""The inner loop of block_attention: tiles of keys, and the merging of softmaxes.

A value that is not finite must reach only the rows that see it, and 0 * NaN is NaN. The loop that prefetches does not
look: where its sums are not finite, which is rare and ends in NaN anyway, they are computed again, EXACT: such values
go through the tensor cores as zeros, and a second product says which rows see one. Both give a row the same bits.

Keys of an fp8 cache and keys of the block go through separate loops, as one is scaled and the other is not: a key
head's k_scale is part of its scores' factor, and what its values add up to takes v_scale when a softmax of the context
ends. The tile in which the context ends is in both, so that no span is merged before all of it was seen.
"""

import triton
import triton.language as tl

from ._fp8 import of_fp8
from ._math import tanh


@triton.jit
def merge(top, total, acc, other_top, other_total, other):
    """The softmax of two sets of keys, later keys second. One that saw nothing is (-inf, 0, 0) and changes no bit."""
    new = tl.maximum(top, other_top)
    shift = tl.where(new == float("-inf"), 0.0, new)
    a, b = tl.exp2(top - shift), tl.exp2(other_top - shift)
    return new, tl.fma(other_total, b, total * a), tl.fma(other, b[:, None], acc * a[:, None])


@triton.jit
def _not_finite(values, score, FP8: tl.constexpr):
    """What the values that are not finite add to each row that sees them: NaN, inf, -inf, or 0. FP8 has no infinity."""
    wide = values.to(tl.float32)
    seen = tl.where(score == float("-inf"), 0.0, 1.0).to(values.dtype)
    if FP8:
        return tl.where(tl.dot(seen, (wide != wide).to(values.dtype), input_precision="ieee") > 0, float("nan"), 0.0)
    code = tl.where(wide != wide, 16384.0, tl.where(wide == float("inf"), 128.0, 1.0))
    code = tl.where(tl.abs(wide) < float("inf"), 0.0, code).to(values.dtype)
    # At most 64 keys: the three counts share one exact sum.
    counts = tl.dot(seen, code, input_precision="ieee").to(tl.int32)
    infinite = tl.where(counts // 128 % 128 > 0, float("inf"), 0.0) + tl.where(counts % 128 > 0, float("-inf"), 0.0)
    return tl.where(counts >= 16384, float("nan"), infinite)


@triton.jit
def load_rows(at, mask, kind: tl.constexpr, NATIVE: tl.constexpr):
    """Keys or values in `kind`, wherever they are; 0 outside the mask."""
    rows = tl.load(at, mask, 0)
    if at.dtype.element_ty == tl.uint8:
        rows = of_fp8(rows, kind, NATIVE)
    return rows


@triton.jit
def address_of(cache, block, cached, d, SOURCE: tl.constexpr):
    """Where the numbers d are of rows at `cache`, or at `block` if not cached. Triton 3.9 takes a selection of rows'
    addresses for unaligned, and would load number by number with no prefetch: so d is added before."""
    if SOURCE == "cache":
        at = cache + d
    elif SOURCE == "block":
        at = block + d
    else:
        at = tl.where(cached, cache + d, block + d)
    return at


@triton.jit
def scores(q, from_q, ok, cache, block, cached, there, head_dim, SOURCE: tl.constexpr, NATIVE: tl.constexpr,
           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr):
    """q . k, along all of D at once, or CHUNK_D of it at a time: without tensor cores a thread keeps whole rows."""
    cache, block, cached = cache[None, :], block[None, :], cached[None, :]
    if CHUNK_D == BLOCK_D:
        d = tl.arange(0, BLOCK_D)
        from_k = address_of(cache, block, cached, d[:, None], SOURCE)
        keys = load_rows(from_k, there[None, :] & (d < head_dim)[:, None], q.dtype, NATIVE)
        score = tl.dot(q, keys, input_precision="ieee")
    else:
        score = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for chunk in tl.static_range(BLOCK_D // CHUNK_D):
            d = chunk * CHUNK_D + tl.arange(0, CHUNK_D)
            from_k = address_of(cache, block, cached, d[:, None], SOURCE)
            rows = tl.load(from_q[:, None] + d[None, :], ok[:, None] & (d < head_dim)[None, :], 0.0)
            keys = load_rows(from_k, there[None, :] & (d < head_dim)[:, None], q.dtype, NATIVE)
            score = tl.dot(rows, keys, score, input_precision="ieee")
    return score


@triton.jit
def attend(begin, end, top, total, acc, all_top, all_total, all_acc, q, from_q, ok, position, d, first, last, k, v,
           k_cache, v_cache, pages, context, head_dim, factor, v_scale, softcap, left, right, num_pages, k_row, v_row,
           kc_page, kc_row, vc_page, vc_row, EXACT: tl.constexpr, SOURCE: tl.constexpr, NATIVE: tl.constexpr,
           PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
           CHUNK_D: tl.constexpr, SPAN: tl.constexpr, SOFTCAP: tl.constexpr, STAGES: tl.constexpr):
    """The softmax (top, total, acc) of a span that is not over yet, and that of the spans before it, after the tiles
    [begin, end) of keys. No row sees a key outside [first, last). SOURCE: "cache", "block" or "both"."""
    never, nothing = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    zero = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for tile in tl.range(begin, end, num_stages=STAGES):
        at = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside, cached = (at >= first) & (at < last), at < context
        if SOURCE == "cache":
            inside = inside & cached
        if SOURCE == "block":
            inside = inside & (at >= context)
            page, exists = at, at >= context
        else:
            page = tl.load(pages + at // PAGE, inside & cached, 0)
            exists = ((page >= 0) & (page < num_pages)) | (at >= context)
        page, row, after = page.to(tl.int64), (at % PAGE).to(tl.int64), (at - context).to(tl.int64)
        score = scores(q, from_q, ok, k_cache + (page * kc_page + row * kc_row), k + after * k_row, cached,
                       inside & exists, head_dim, SOURCE, NATIVE, BLOCK_M, BLOCK_N, BLOCK_D, CHUNK_D) * factor
        if SOFTCAP:
            score = tanh(score) * softcap
        seen = (inside[None, :] & (at[None, :] >= (position - left)[:, None])
                & (at[None, :] <= (position + right)[:, None]))
        score = tl.where(seen, tl.where(exists[None, :], score, float("nan")), float("-inf"))
        new = tl.maximum(top, tl.max(score, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        weight, fade = tl.exp2(score - shift[:, None]), tl.exp2(top - shift)
        top, total = new, tl.fma(total, fade, tl.sum(weight, 1))
        from_v = address_of((v_cache + (page * vc_page + row * vc_row))[:, None], (v + after * v_row)[:, None],
                            cached[:, None], d[None, :], SOURCE)
        values = load_rows(from_v, (inside & exists)[:, None] & (d < head_dim)[None, :], q.dtype, NATIVE)
        acc *= fade[:, None]
        if EXACT:
            finite = tl.abs(values.to(tl.float32)) < float("inf")
            acc = tl.dot(weight.to(values.dtype), tl.where(finite, values, 0.0), acc, input_precision="ieee")
            acc += _not_finite(values, score, SOURCE == "cache")
        else:
            acc = tl.dot(weight.to(values.dtype), values, acc, input_precision="ieee")
        over = (tile + 1) * BLOCK_N % SPAN == 0
        if SOURCE == "cache":
            over = over & ((tile + 1) * BLOCK_N <= context)
        if over:
            all_top, all_total, all_acc = merge(all_top, all_total, all_acc, top, total, acc * v_scale)
            top, total, acc = never, nothing, zero
    return top, total, acc * v_scale, all_top, all_total, all_acc


@triton.jit
def attend_all(begin, end, q, from_q, ok, position, d, first, last, k, v, k_cache, v_cache, pages, context, head_dim,
               factor, k_scale, v_scale, softcap, left, right, num_pages, k_row, v_row, kc_page, kc_row, vc_page,
               vc_row, EXACT: tl.constexpr, NATIVE: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr,
               BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr, SPAN: tl.constexpr,
               SOFTCAP: tl.constexpr, STAGES: tl.constexpr):
    """The softmax (top, total, acc) of the tiles [begin, end) of keys."""
    top, total = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    all_top, all_total, all_acc = top, total, acc
    if k_cache.dtype.element_ty == tl.uint8:
        top, total, acc, all_top, all_total, all_acc = attend(
            begin, tl.minimum(end, tl.cdiv(context, BLOCK_N)), top, total, acc, all_top, all_total, all_acc, q, from_q,
            ok, position, d, first, last, k, v, k_cache, v_cache, pages, context, head_dim, factor * k_scale, v_scale,
            softcap, left, right, num_pages, k_row, v_row, kc_page, kc_row, vc_page, vc_row, EXACT, "cache", NATIVE,
            PAGE, BLOCK_M, BLOCK_N, BLOCK_D, CHUNK_D, SPAN, SOFTCAP, STAGES)
        top, total, acc, all_top, all_total, all_acc = attend(
            tl.maximum(begin, context // BLOCK_N), end, top, total, acc, all_top, all_total, all_acc, q, from_q, ok,
            position, d, first, last, k, v, k_cache, v_cache, pages, context, head_dim, factor, 1.0, softcap, left,
            right, num_pages, k_row, v_row, kc_page, kc_row, vc_page, vc_row, EXACT, "block", NATIVE, PAGE, BLOCK_M,
            BLOCK_N, BLOCK_D, CHUNK_D, SPAN, SOFTCAP, 1)
    else:
        top, total, acc, all_top, all_total, all_acc = attend(
            begin, end, top, total, acc, all_top, all_total, all_acc, q, from_q, ok, position, d, first, last, k, v,
            k_cache, v_cache, pages, context, head_dim, factor, 1.0, softcap, left, right, num_pages, k_row, v_row,
            kc_page, kc_row, vc_page, vc_row, EXACT, "both", NATIVE, PAGE, BLOCK_M, BLOCK_N, BLOCK_D, CHUNK_D, SPAN,
            SOFTCAP, STAGES)
    return merge(all_top, all_total, all_acc, top, total, acc)
