"""The inner loop of block_attention: tiles of keys, and the merging of softmaxes.

A value that is not finite must reach only the rows that see it, and 0 * NaN is NaN. So tiles whose keys are not seen by
all rows alike (the edges of a window, a causal block) go through the tensor cores with such values as zeros, and a
second product says which rows see one. The other tiles, nearly all of a long context, are prefetched and need neither.
"""

import triton
import triton.language as tl

from ._math import tanh


@triton.jit
def merge(top, total, acc, other_top, other_total, other):
    """The softmax of two sets of keys, later keys second. One that saw nothing is (-inf, 0, 0) and changes no bit."""
    new = tl.maximum(top, other_top)
    shift = tl.where(new == float("-inf"), 0.0, new)
    a, b = tl.exp2(top - shift), tl.exp2(other_top - shift)
    return new, tl.fma(other_total, b, total * a), tl.fma(other, b[:, None], acc * a[:, None])


@triton.jit
def _not_finite(values, seen):
    """What the values that are not finite add to each row that sees them: NaN, inf, -inf, or 0."""
    wide = values.to(tl.float32)
    code = tl.where(wide != wide, 16384.0, tl.where(wide == float("inf"), 128.0, 1.0))
    code = tl.where(tl.abs(wide) < float("inf"), 0.0, code).to(values.dtype)
    # At most 64 keys: the three counts share one exact sum.
    counts = tl.dot(seen.to(values.dtype), code, input_precision="ieee").to(tl.int32)
    infinite = (tl.where(counts // 128 % 128 > 0, float("inf"), 0.0) + tl.where(counts % 128 > 0, float("-inf"), 0.0))
    return tl.where(counts >= 16384, float("nan"), infinite)


@triton.jit
def attend(begin, end, top, total, acc, all_top, all_total, all_acc, q, position, d, first, last, k, v, k_cache,
           v_cache, pages, context, head_dim, factor, softcap, left, right, page_size, num_pages, k_row, v_row, kc_page,
           kc_row, vc_page, vc_row, EDGE: tl.constexpr, BLOCK_N: tl.constexpr, SPAN: tl.constexpr,
           SOFTCAP: tl.constexpr, STAGES: tl.constexpr):
    """Adds the tiles [begin, end) of keys to (top, total, acc), and spans that end to (all_top, all_total, all_acc).

    Outside [first, last) no row sees a key; inside, all rows see every one unless EDGE.
    """
    for tile in tl.range(begin, end, num_stages=STAGES):
        at = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside, cached = (at >= first) & (at < last), at < context
        page = tl.load(pages + at // page_size, inside & cached, 0)
        exists = ((page >= 0) & (page < num_pages)) | (at >= context)
        page, slot, row = page.to(tl.int64), (at % page_size).to(tl.int64), (at - context).to(tl.int64)
        there = (inside & exists)[None, :] & (d < head_dim)[:, None]
        from_k = tl.where(cached, k_cache + (page * kc_page + slot * kc_row), k + row * k_row)
        keys = tl.load(from_k[None, :] + d[:, None], there, 0.0)
        score = tl.dot(q, keys, input_precision="ieee") * factor
        if SOFTCAP:
            score = tanh(score) * softcap
        seen = inside[None, :]
        if EDGE:
            seen = (seen & (at[None, :] >= (position - left)[:, None])
                    & (at[None, :] <= (position + right)[:, None]))
        score = tl.where(seen, tl.where(exists[None, :], score, float("nan")), float("-inf"))
        new = tl.maximum(top, tl.max(score, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        weight, fade = tl.exp2(score - shift[:, None]), tl.exp2(top - shift)
        top, total = new, tl.fma(total, fade, tl.sum(weight, 1))
        from_v = tl.where(cached, v_cache + (page * vc_page + slot * vc_row), v + row * v_row)
        values = tl.load(from_v[:, None] + d[None, :], (inside & exists)[:, None] & (d < head_dim)[None, :], 0.0)
        acc *= fade[:, None]
        if EDGE:
            finite = tl.abs(values.to(tl.float32)) < float("inf")
            acc = tl.dot(weight.to(values.dtype), tl.where(finite, values, 0.0), acc, input_precision="ieee")
            acc += _not_finite(values, seen)
        else:
            acc = tl.dot(weight.to(values.dtype), values, acc, input_precision="ieee")
        if (tile + 1) * BLOCK_N % SPAN == 0:
            all_top, all_total, all_acc = merge(all_top, all_total, all_acc, top, total, acc)
            top, total, acc = tl.full(top.shape, float("-inf"), tl.float32), tl.zeros_like(total), tl.zeros_like(acc)
    return top, total, acc, all_top, all_total, all_acc
