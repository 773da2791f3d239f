"""The inner loop of block_attention: tiles of keys, and the combining of softmaxes.

A value that is not finite must reach only the rows that see it, and 0 * NaN is NaN. The loops do not look: where their
sums are not finite, or a page did not exist, which is rare and ends in NaN anyway, all is computed again, EXACT: such
values go through the tensor cores as zeros, and a second product says which rows see one. Both give a row the same
bits. The second time goes through the keys once for a few columns of the values: in the registers of the first.

Keys of an fp8 cache and keys of the block go through separate loops, as one is scaled and the other is not: a key
head's k_scale is part of its scores' factor, and what its values add up to takes v_scale when a softmax of the context
ends. The tile in which the context ends is in both, so that no split is combined before all of it was seen.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ._fp8 import of_fp8
from ._math import tanh
from .attention_split import begin_of, split_of


class Rows(NamedTuple):
    """A tile of queries: q itself, where each row is read from, which rows exist, and their positions."""

    q: tl.tensor
    from_q: tl.tensor
    ok: tl.tensor
    position: tl.tensor


class Keys(NamedTuple):
    """One head's keys and values: those of the block, and their rows' strides; the caches, and the strides of their
    pages and rows; and the request's row of the page table."""

    k: tl.tensor
    v: tl.tensor
    k_row: tl.tensor
    v_row: tl.tensor
    k_cache: tl.tensor
    v_cache: tl.tensor
    kc_page: tl.tensor
    kc_row: tl.tensor
    vc_page: tl.tensor
    vc_row: tl.tensor
    pages: tl.tensor


class Sight(NamedTuple):
    """A row sees keys of [first, last), from its position - left to its position + right. Keys before `context` are in
    the cache, the others in the block."""

    context: tl.tensor
    first: tl.tensor
    last: tl.tensor
    left: tl.tensor
    right: tl.tensor


class Extent(NamedTuple):
    """Numbers in a key, and pages in the cache."""

    head_dim: tl.tensor
    num_pages: tl.tensor


class Parts(NamedTuple):
    """Where softmaxes of splits are left to be combined: weighted values in part, top and total in part_top. A head has
    slots for so many splits, and so many rows; octaves as in attention_split.py. each: whether each split is left.
    last: whether the last one is, with those before it."""

    part: tl.tensor
    part_top: tl.tensor
    splits: tl.tensor
    rows: tl.tensor
    octaves: tl.tensor
    each: tl.tensor
    last: tl.tensor


class Softmax(NamedTuple):
    """The softmax of some keys, for each row: the largest score, the sum of the weights, and the weighted values."""

    top: tl.tensor
    total: tl.tensor
    acc: tl.tensor


class Split(NamedTuple):
    """The split that a tile of keys is in: its number among those that the rows see, and the position that it ends
    at."""

    number: tl.tensor
    end: tl.tensor


@triton.jit
def nothing_seen(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    return Softmax(tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32),
                   tl.zeros((BLOCK_M, BLOCK_D), tl.float32))


@triton.jit
def combine(one, other):
    """The softmax of two sets of keys, later keys second. One that saw nothing is (-inf, 0, 0) and changes no bit."""
    new = tl.maximum(one.top, other.top)
    shift = tl.where(new == float("-inf"), 0.0, new)
    a, b = tl.exp2(one.top - shift), tl.exp2(other.top - shift)
    return Softmax(new, tl.fma(other.total, b, one.total * a), tl.fma(other.acc, b[:, None], one.acc * a[:, None]))


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
def keys_of(cache, block, cached, there, head_dim, d, kind: tl.constexpr, SOURCE: tl.constexpr, NATIVE: tl.constexpr):
    """Numbers d of keys, (D, N)."""
    at = address_of(cache[None, :], block[None, :], cached[None, :], d[:, None], SOURCE)
    return load_rows(at, there[None, :] & (d < head_dim)[:, None], kind, NATIVE)


@triton.jit
def weigh(score, softmax, sight, mask, factor, softcap, MASKED: tl.constexpr, SOFTCAP: tl.constexpr):
    """Scores as the softmax has them, their weights, and the softmax without the weighted values."""
    score *= factor
    if SOFTCAP:
        score = tanh(score) * softcap
    if MASKED:
        position, at, inside, exists = mask
        seen = (inside[None, :] & (at[None, :] >= (position - sight.left)[:, None])
                & (at[None, :] <= (position + sight.right)[:, None]))
        score = tl.where(seen, tl.where(exists[None, :], score, float("nan")), float("-inf"))
    new = tl.maximum(softmax.top, tl.max(score, 1))
    shift = tl.where(new == float("-inf"), 0.0, new)
    weight, fade = tl.exp2(score - shift[:, None]), tl.exp2(softmax.top - shift)
    total = tl.fma(softmax.total, fade, tl.sum(weight, 1))
    return score, weight, Softmax(new, total, softmax.acc * fade[:, None])


@triton.jit
def attend(begin, end, softmax, combined, split,
           rows, keys, sight, extent, parts, factor, v_scale, softcap, columns,
           EXACT: tl.constexpr, SOURCE: tl.constexpr, NATIVE: tl.constexpr, PAGE: tl.constexpr,
           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr,
           SPLIT: tl.constexpr, EACH: tl.constexpr, SOFTCAP: tl.constexpr, STAGES: tl.constexpr):
    """The softmax of a split that is not over yet, that of the splits before it, and the split, after the tiles
    [begin, end) of keys, of which some rows may not see some. SOURCE: "cache", "block" or "both"."""
    q, context, head_dim = rows.q, sight.context, extent.head_dim
    d = tl.arange(0, BLOCK_D)
    for tile in tl.range(begin, end, num_stages=STAGES):
        # The tile's positions, and the page of each.
        at = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside, cached = (at >= sight.first) & (at < sight.last), at < context
        if SOURCE == "cache":
            inside = inside & cached
        if SOURCE == "block":
            inside = inside & (at >= context)
            page, exists = at, at >= context
        else:
            page = tl.load(keys.pages + at // PAGE, inside & cached, 0)
            exists = ((page >= 0) & (page < extent.num_pages)) | (at >= context)
        page, row, after = page.to(tl.int64), (at % PAGE).to(tl.int64), (at - context).to(tl.int64)
        # Scores.
        in_cache, in_block = keys.k_cache + (page * keys.kc_page + row * keys.kc_row), keys.k + after * keys.k_row
        there = inside & exists
        if CHUNK_D == BLOCK_D:
            key = keys_of(in_cache, in_block, cached, there, head_dim, d, q.dtype, SOURCE, NATIVE)
            score = tl.dot(q, key, input_precision="ieee")
        else:  # without tensor cores a thread keeps whole rows, and has not the registers for all of D
            score = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for chunk in tl.static_range(BLOCK_D // CHUNK_D):
                part = chunk * CHUNK_D + tl.arange(0, CHUNK_D)
                some = tl.load(rows.from_q[:, None] + part[None, :], rows.ok[:, None] & (part < head_dim)[None, :], 0.0)
                key = keys_of(in_cache, in_block, cached, there, head_dim, part, q.dtype, SOURCE, NATIVE)
                score = tl.dot(some, key, score, input_precision="ieee")
        # Weights, and the softmax so far.
        score, weight, softmax = weigh(score, softmax, sight, (rows.position, at, inside, exists), factor, softcap,
                                       True, SOFTCAP)
        # Values.
        at_value = address_of((keys.v_cache + (page * keys.vc_page + row * keys.vc_row))[:, None],
                              (keys.v + after * keys.v_row)[:, None], cached[:, None], columns[None, :], SOURCE)
        values = load_rows(at_value, there[:, None] & (columns < head_dim)[None, :], q.dtype, NATIVE)
        if EXACT:
            finite = tl.abs(values.to(tl.float32)) < float("inf")
            acc = tl.dot(weight.to(values.dtype), tl.where(finite, values, 0.0), softmax.acc, input_precision="ieee")
            acc += _not_finite(values, score, SOURCE == "cache")
        else:
            acc = tl.dot(weight.to(values.dtype), values, softmax.acc, input_precision="ieee")
        # The split's end.
        over = (tile + 1) * BLOCK_N == split.end
        if SOURCE == "cache":
            over = over & ((tile + 1) * BLOCK_N <= context)
        softmax, combined, split = end_of_split(over, Softmax(softmax.top, softmax.total, acc), combined, split, parts,
                                                v_scale, columns, head_dim, SPLIT, EACH)
    return softmax, combined, split


@triton.jit
def keep(softmax, number, parts, columns, head_dim):
    """Leaves a split's softmax to be combined."""
    rows = parts.rows
    BLOCK_M: tl.constexpr = softmax.top.shape[0]
    # Added what is 0, and no compiler knows it, nothing that follows is kept through the loops.
    task = tl.program_id(0) + (number >> 31)
    row = task % tl.cdiv(rows, BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    slot = ((task // tl.cdiv(rows, BLOCK_M)).to(tl.int64) * parts.splits + number) * rows + row
    tl.store(parts.part_top + slot * 2, softmax.top, row < rows)
    tl.store(parts.part_top + slot * 2 + 1, softmax.total, row < rows)
    tl.store(parts.part + slot[:, None] * head_dim + columns[None, :], softmax.acc,
             (row < rows)[:, None] & (columns < head_dim)[None, :])


@triton.jit
def end_of_split(over, softmax, combined, split, parts, v_scale, columns, head_dim,
                 SPLIT: tl.constexpr, EACH: tl.constexpr):
    if over:
        softmax = Softmax(softmax.top, softmax.total, softmax.acc * v_scale)
        if parts.each:
            keep(softmax, split.number, parts, columns, head_dim)
        combined = combine(combined, softmax)
        softmax = nothing_seen(softmax.acc.shape[0], softmax.acc.shape[1])
        split = Split(split.number + 1,
                      begin_of(split_of(split.end, parts.octaves, SPLIT, EACH) + 1, parts.octaves, SPLIT, EACH))
    return softmax, combined, split


@triton.jit
def attend_whole(begin, end, softmax, combined, split, missing,
                 rows, keys, sight, extent, parts, factor, v_scale, softcap,
                 NATIVE: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                 SPLIT: tl.constexpr, EACH: tl.constexpr, SOFTCAP: tl.constexpr, STAGES: tl.constexpr):
    """As attend, of tiles in the cache that every row sees whole. missing counts keys whose page does not exist."""
    q, head_dim = rows.q, extent.head_dim
    d, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    for tile in tl.range(begin, end, num_stages=STAGES):
        # The tile's positions, and the page of each.
        if BLOCK_N % PAGE == 0:
            slot, row = tile * (BLOCK_N // PAGE) + n // PAGE, n % PAGE
        else:
            slot, row = (tile * BLOCK_N + n) // PAGE, (tile * BLOCK_N + n) % PAGE
        page = tl.load(keys.pages + slot)
        exists = (page >= 0) & (page < extent.num_pages)
        missing += tl.where(exists, 0, 1)
        page, row = page.to(tl.int64), row.to(tl.int64)
        # Scores.
        in_cache = keys.k_cache + row * keys.kc_row + page * keys.kc_page
        key = keys_of(in_cache, in_cache, exists, exists, head_dim, d, q.dtype, "cache", NATIVE)
        score = tl.dot(q, key, input_precision="ieee")
        # Weights, and the softmax so far.
        _, weight, softmax = weigh(score, softmax, sight, (), factor, softcap, False, SOFTCAP)
        # Values.
        at_value = (keys.v_cache + row * keys.vc_row + page * keys.vc_page)[:, None] + d[None, :]
        values = load_rows(at_value, exists[:, None] & (d < head_dim)[None, :], q.dtype, NATIVE)
        acc = tl.dot(weight.to(values.dtype), values, softmax.acc, input_precision="ieee")
        # The split's end.
        over = (tile + 1) * BLOCK_N == split.end
        softmax, combined, split = end_of_split(over, Softmax(softmax.top, softmax.total, acc), combined, split, parts,
                                                v_scale, d, head_dim, SPLIT, EACH)
    return softmax, combined, split, missing


@triton.jit
def attend_all(begin, whole, stop, split,
               rows, keys, sight, extent, parts, factor, k_scale, v_scale, softcap, columns,
               EXACT: tl.constexpr, NATIVE: tl.constexpr, PAGE: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr,
               SPLIT: tl.constexpr, EACH: tl.constexpr, SOFTCAP: tl.constexpr, WHOLE: tl.constexpr,
               STAGES: tl.constexpr):
    """The softmax of the tiles [begin, stop) of keys for some columns of the values, and the largest of its sums as an
    integer: from 0x7F800000 on it is to be taken anew, EXACT. Rows see the tiles from `whole` on whole, up to the last
    one that the context fills. split is that of the first tile."""
    FP8: tl.constexpr = keys.k_cache.dtype.element_ty == tl.uint8
    SOURCE: tl.constexpr = "cache" if FP8 else "both"
    softmax, context, edge = nothing_seen(BLOCK_M, columns.shape[0]), sight.context, stop
    combined, missing = softmax, tl.zeros((BLOCK_N,), tl.int32)
    if FP8:
        edge = tl.minimum(stop, tl.cdiv(context, BLOCK_N))
    if not WHOLE:
        softmax, combined, split = attend(
            begin, edge, softmax, combined, split, rows, keys, sight, extent, parts, factor * k_scale, v_scale, softcap,
            columns, EXACT, SOURCE, NATIVE, PAGE, BLOCK_M, BLOCK_N, BLOCK_D, CHUNK_D, SPLIT, EACH, SOFTCAP, STAGES)
    else:
        whole = tl.minimum(tl.maximum(whole, begin), edge)
        after = tl.maximum(tl.minimum(context // BLOCK_N, edge), whole)
        # The tiles before and those behind are one piece of code. What LLVM would take out of it, the loops in it would
        # have to keep beside their own: that spills.
        for side in tl.range(2, disable_licm=True):
            softmax, combined, split = attend(
                tl.where(side == 0, begin, after), tl.where(side == 0, whole, edge), softmax, combined, split, rows,
                keys, sight, extent, parts, factor * k_scale, v_scale, softcap, columns, False, SOURCE, NATIVE, PAGE,
                BLOCK_M, BLOCK_N, BLOCK_D, CHUNK_D, SPLIT, EACH, SOFTCAP, 2)
            softmax, combined, split, missing = attend_whole(
                whole, tl.where(side == 0, after, whole), softmax, combined, split, missing, rows, keys, sight, extent,
                parts, factor * k_scale, v_scale, softcap, NATIVE, PAGE, BLOCK_N, BLOCK_D, SPLIT, EACH, SOFTCAP, STAGES)
    if FP8:
        softmax, combined, split = attend(
            tl.maximum(begin, context // BLOCK_N), stop, Softmax(softmax.top, softmax.total, softmax.acc * v_scale),
            combined, split, rows, keys, sight, extent, parts, factor, 1.0, softcap, columns, EXACT, "block", NATIVE,
            PAGE, BLOCK_M, BLOCK_N, BLOCK_D, CHUNK_D, SPLIT, EACH, SOFTCAP, 1)
    behind, octaves = stop * BLOCK_N, parts.octaves
    tail = begin_of(split_of(behind, octaves, SPLIT, EACH), octaves, SPLIT, EACH) < behind
    if parts.each & tail:
        keep(softmax, split.number, parts, columns, extent.head_dim)
    softmax = combine(combined, softmax)
    if parts.last:
        keep(softmax, split.number - tl.where(tail, 0, 1), parts, columns, extent.head_dim)
    # As integers: for the same look at booleans Triton 3.9 keeps a stack frame.
    largest = tl.max(tl.max(softmax.acc.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1), 0)
    return softmax, tl.where(tl.max(missing, 0) > 0, 0x7FFFFFFF, largest)
