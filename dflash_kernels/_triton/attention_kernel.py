"""The programs of block_attention: one for a tile of rows and a share of its splits, and one that combines splits."""

from typing import NamedTuple

import triton
import triton.language as tl

from .attention_split import begin_of, share_of, split_of
from .attention_tile import Extent, Keys, Parts, Rows, Sight, Softmax, Split, attend_all, combine, nothing_seen


class Strided(NamedTuple):
    """A tensor and its strides: of a request or a page, of a row, of a head."""

    at: tl.tensor
    outer: tl.tensor
    row: tl.tensor
    head: tl.tensor


class Tensors(NamedTuple):
    """Queries, keys and values of all requests; the page table, and the stride of its rows."""

    q: Strided
    k: Strided
    v: Strided
    k_cache: Strided
    v_cache: Strided
    table: tl.tensor
    table_row: tl.tensor


@triton.jit
def lengths(b, context_lens, block_lens, context_starts, block_starts, packed_rows, width, capacity, num_pages):
    """(context, start, rows, lost) of request b. lost: context keys that a row would see have no page in the table."""
    context = tl.maximum(tl.load(context_lens + b), 0)
    start = context * 0
    if context_starts is not None:
        start = tl.minimum(tl.maximum(tl.load(context_starts + b), 0), context)
    rows = context * 0 + width
    if block_lens is not None:
        rows = tl.minimum(tl.maximum(tl.load(block_lens + b), 0), width)
    if block_starts is not None:
        rows = tl.minimum(rows, packed_rows - place(b, block_starts, packed_rows))
    # Without a cache (num_pages < 0, capacity 0), positions count from the block's beginning.
    over = context > capacity
    lost = over & (start < context) & (context * 0 + num_pages >= 0)
    context = tl.minimum(context, capacity)
    return context, tl.where(over, context, start), rows, lost


@triton.jit
def place(b, block_starts, packed_rows):
    """Where request b's rows begin: in requests, or if blocks are packed in rows."""
    at = b
    if block_starts is not None:
        at = tl.minimum(tl.maximum(tl.load(block_starts + b), 0), packed_rows).to(b.dtype)
    return at


@triton.jit
def bounds(row0, context, start, rows, group, left, right, BLOCK_M: tl.constexpr):
    """Positions [first, end) that rows of the tile at row0 see."""
    last_query = (tl.minimum(row0 + BLOCK_M, rows * group) - 1) // group
    return (tl.maximum(start, context + row0 // group - left),
            tl.minimum(context + rows, context + last_query + right + 1))


@triton.jit
def sink_of(sinks, head, mask):
    """Where a row's softmax starts: (top, total). top is in units of log 2."""
    if sinks is None:
        top = tl.full(head.shape, float("-inf"), tl.float32)
    else:
        top = tl.load(sinks + head, mask, 0.0).to(tl.float32) * 1.4426950408889634
    return top, tl.where(top == float("-inf"), 0.0, 1.0)


@triton.jit
def scale_of(scales, h, SCALE: tl.constexpr):
    """An fp8 cache's scale of key head h: see _fp8.stored for SCALE."""
    scale = 1.0
    if SCALE > 0:
        scale = tl.load(scales + h * (SCALE - 1))
    return scale


@triton.jit
def _finish(out, softmax, sinks, lost, left, row, ok, h, group, d, head_dim, o_row, o_head):
    head = h * group + row % group
    sink, one = sink_of(sinks, head, ok)
    top, total, acc = combine(Softmax(sink, one, tl.zeros_like(softmax.acc)), softmax)
    total = tl.where(lost & (row // group < left), float("nan"), tl.where(total == 0.0, 1.0, total))
    to = out + (row // group).to(tl.int64)[:, None] * o_row + head.to(tl.int64)[:, None] * o_head + d[None, :]
    tl.store(to, tl.div_rn(acc, total[:, None]).to(out.dtype.element_ty), ok[:, None] & (d < head_dim)[None, :])


@triton.jit
def _sight(b, row0, lens, group, left, right, shares, octaves,
           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, EACH: tl.constexpr):
    """(live, begin, whole, stop, split, sight): the tiles [begin, stop) of the program's share, of which rows see those
    from `whole` on whole, as far as they are of the context; its first split."""
    context_lens, block_lens, context_starts, block_starts, packed_rows, width, capacity, num_pages = lens
    context, start, live, _ = lengths(b, context_lens, block_lens, context_starts, block_starts, packed_rows, width,
                                      capacity, num_pages)
    first, end = bounds(row0, context, start, live, group, left, right, BLOCK_M)
    split, last = share_of(tl.program_id(1), shares, first, end, octaves, SPLIT, EACH)
    begin = tl.maximum(begin_of(split, octaves, SPLIT, EACH), first) // BLOCK_N
    stop = tl.where(split < last, tl.cdiv(tl.minimum(begin_of(last, octaves, SPLIT, EACH), end), BLOCK_N), begin)
    last_query = (tl.minimum(row0 + BLOCK_M, live * group) - 1) // group
    whole = tl.cdiv(tl.maximum(start, context + last_query - left), BLOCK_N)
    split = Split(split - split_of(first, octaves, SPLIT, EACH), begin_of(split + 1, octaves, SPLIT, EACH))
    return live, begin, whole, stop, split, Sight(context, first, end, left, right)


@triton.jit
def _views(b, at, h, row0, live, context, group, tensors, head_dim, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """The tile's Rows and Keys. at: the request's place among the blocks."""
    q, k, v, k_cache, v_cache = tensors.q, tensors.k, tensors.v, tensors.k_cache, tensors.v_cache
    b, at, h = b.to(tl.int64), at.to(tl.int64), h.to(tl.int64)
    row, d = row0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    ok = row < live * group
    from_q = q.at + at * q.outer + (row // group).to(tl.int64) * q.row + (h * group + row % group) * q.head
    rows = Rows(tl.load(from_q[:, None] + d[None, :], ok[:, None] & (d < head_dim)[None, :], 0.0), from_q, ok,
                context + row // group)
    keys = Keys(k.at + at * k.outer + h * k.head, v.at + at * v.outer + h * v.head, k.row, v.row,
                k_cache.at + h * k_cache.head, v_cache.at + h * v_cache.head,
                k_cache.outer, k_cache.row, v_cache.outer, v_cache.row, tensors.table + b * tensors.table_row)
    return rows, keys


@triton.jit(do_not_specialize=["packed_rows", "width", "capacity", "table_row", "splits", "shares", "octaves"])
def block_attention_kernel(q, k, v, k_cache, v_cache, k_scales, v_scales, page_table,
                           context_lens, block_lens, context_starts, block_starts, sinks, out, part, part_top,
                           packed_rows, width, group, kv_heads, factor, softcap, left, right, num_pages, capacity,
                           table_row,
                           q_b, q_row, q_head, k_b, k_row, k_head, v_b, v_row, v_head,
                           kc_page, kc_row, kc_head, vc_page, vc_row, vc_head, o_b, o_row, o_head,
                           splits, shares, octaves,
                           K_SCALE: tl.constexpr, V_SCALE: tl.constexpr, NATIVE: tl.constexpr, PAGE: tl.constexpr,
                           HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                           CHUNK_D: tl.constexpr, EXACT_D: tl.constexpr, SPLIT: tl.constexpr, EACH: tl.constexpr,
                           SOFTCAP: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr):
    """Program (task, s) has the s-th share of the splits that a row tile sees: all of them and the result, or some and
    for each what combine_splits_kernel reads."""
    tiles = tl.cdiv(width * group, BLOCK_M)
    request_head, row0 = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_M
    b, h = request_head // kv_heads, request_head % kv_heads
    lens = context_lens, block_lens, context_starts, block_starts, packed_rows, width, capacity, num_pages
    tensors = Tensors(Strided(q, q_b, q_row, q_head), Strided(k, k_b, k_row, k_head), Strided(v, v_b, v_row, v_head),
                      Strided(k_cache, kc_page, kc_row, kc_head), Strided(v_cache, vc_page, vc_row, vc_head),
                      page_table, table_row)
    # Nothing is before the first program's splits, so that it combines them itself.
    parts = Parts(part, part_top, splits, width * group, octaves, tl.program_id(1) > 0,
                  (shares > 1) & (tl.program_id(1) == 0))
    live, begin, whole, stop, split, sight = _sight(b, row0, lens, group, left, right, shares, octaves, BLOCK_M,
                                                    BLOCK_N, SPLIT, EACH)
    if (row0 < live * group) & (begin < stop):
        rows, keys = _views(b, place(b, block_starts, packed_rows), h, row0, live, sight.context, group, tensors,
                            HEAD_DIM, BLOCK_M, BLOCK_D)
        softmax, largest = attend_all(
            begin, whole, stop, split, rows, keys, sight, Extent(HEAD_DIM, num_pages), parts, factor,
            scale_of(k_scales, h, K_SCALE), scale_of(v_scales, h, V_SCALE), softcap, tl.arange(0, BLOCK_D), False,
            NATIVE, PAGE, BLOCK_M, BLOCK_N, BLOCK_D, CHUNK_D, SPLIT, EACH, SOFTCAP, WHOLE, STAGES)
        # Added what is 0, and no compiler knows it, none of this is kept through the loops.
        task, tiles = tl.program_id(0) + (largest >> 31), tl.cdiv(width * group + (largest >> 31), BLOCK_M)
        b, h, row0 = task // tiles // kv_heads, task // tiles % kv_heads, task % tiles * BLOCK_M
        row, to = row0 + tl.arange(0, BLOCK_M), out + place(b, block_starts, packed_rows).to(tl.int64) * o_b
        _, _, live, lost = lengths(b, context_lens, block_lens, context_starts, block_starts, packed_rows, width,
                                   capacity, num_pages)
        ok = row < live * group
        if largest >= 0x7F800000:
            tl.debug_barrier()  # what a thread has left to be combined, another may write anew
            _, begin, whole, stop, split, sight = _sight(b, row0, lens, group, left, right, shares, octaves, BLOCK_M,
                                                        BLOCK_N, SPLIT, EACH)
            rows, keys = _views(b, place(b, block_starts, packed_rows), h, row0, live, sight.context, group, tensors,
                                HEAD_DIM, BLOCK_M, BLOCK_D)
            for column in tl.range(0, BLOCK_D, EXACT_D, disable_licm=True):
                some = column + tl.arange(0, EXACT_D)
                exact, _ = attend_all(
                    begin, whole, stop, split, rows, keys, sight, Extent(HEAD_DIM, num_pages), parts, factor,
                    scale_of(k_scales, h, K_SCALE), scale_of(v_scales, h, V_SCALE), softcap, some, True, NATIVE, PAGE,
                    BLOCK_M, BLOCK_N, BLOCK_D, CHUNK_D, SPLIT, EACH, SOFTCAP, False, 1)
                if shares == 1:
                    _finish(to, exact, sinks, lost, left, row, ok, h, group, some, HEAD_DIM, o_row, o_head)
        elif shares == 1:
            _finish(to, softmax, sinks, lost, left, row, ok, h, group, tl.arange(0, BLOCK_D), HEAD_DIM, o_row, o_head)


@triton.jit(do_not_specialize=["packed_rows", "width", "capacity", "splits", "shares", "octaves"])
def combine_splits_kernel(part, part_top, context_lens, block_lens, context_starts, block_starts, sinks, out,
                          packed_rows, width, group, kv_heads, left, right, num_pages, capacity, o_b, o_row, o_head,
                          splits, shares, octaves,
                          HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, SPLIT: tl.constexpr, EACH: tl.constexpr,
                          ROWS: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr):
    request_head = tl.program_id(0).to(tl.int64)
    b, h, row0 = request_head // kv_heads, request_head % kv_heads, tl.program_id(1) * ROWS
    context, start, rows, lost = lengths(b, context_lens, block_lens, context_starts, block_starts, packed_rows, width,
                                         capacity, num_pages)
    first, end = bounds(row0 // BLOCK_M * BLOCK_M, context, start, rows, group, left, right, BLOCK_M)
    row, d = row0 + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    ok, split0 = row < rows * group, split_of(first, octaves, SPLIT, EACH)
    there = split_of(end - 1, octaves, SPLIT, EACH) + 1 - split0
    _, combined = share_of(0, shares, first, end, octaves, SPLIT, EACH)  # into the last of the first program's splits
    softmax = nothing_seen(ROWS, BLOCK_D)
    for split in tl.range(combined - 1 - split0, there, num_stages=STAGES):
        slot = (request_head * splits + split) * (width * group) + row
        softmax = combine(softmax, Softmax(
            tl.load(part_top + slot * 2, ok, float("-inf")), tl.load(part_top + slot * 2 + 1, ok, 0.0),
            tl.load(part + slot[:, None] * HEAD_DIM + d[None, :], ok[:, None] & (d < HEAD_DIM)[None, :], 0.0)))
    to = out + place(b, block_starts, packed_rows) * o_b
    _finish(to, softmax, sinks, lost, left, row, ok, h, group, d, HEAD_DIM, o_row, o_head)
