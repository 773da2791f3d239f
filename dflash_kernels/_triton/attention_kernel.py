"""The programs of block_attention: one for a tile of rows and a unit of keys, and one that merges rows' spans."""

import triton
import triton.language as tl

from .attention_tile import attend_all, merge, nothing_seen


@triton.jit
def lengths(b, context_lens, block_lens, context_starts, width, capacity, num_pages):
    """(context, start, rows, lost) of request b. lost: context keys that a row would see have no page in the table."""
    context = tl.maximum(tl.load(context_lens + b), 0)
    start = context * 0
    if context_starts is not None:
        start = tl.minimum(tl.maximum(tl.load(context_starts + b), 0), context)
    rows = context * 0 + width
    if block_lens is not None:
        rows = tl.minimum(tl.maximum(tl.load(block_lens + b), 0), width)
    # Without a cache (num_pages < 0, capacity 0), positions count from the block's beginning.
    over = context > capacity
    lost = over & (start < context) & (context * 0 + num_pages >= 0)
    context = tl.minimum(context, capacity)
    return context, tl.where(over, context, start), rows, lost


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
    top, total, acc = merge((sink, one, tl.zeros_like(softmax[2])), softmax)
    total = tl.where(lost & (row // group < left), float("nan"), tl.where(total == 0.0, 1.0, total))
    to = out + (row // group).to(tl.int64)[:, None] * o_row + head.to(tl.int64)[:, None] * o_head + d[None, :]
    tl.store(to, tl.div_rn(acc, total[:, None]).to(out.dtype.element_ty), ok[:, None] & (d < head_dim)[None, :])


@triton.jit
def _put(softmax, d, parts, sinks, lost, left, place, out, o_row, o_head, units):
    """Columns d of what a program found: the result, or its part of it."""
    part, part_top, slot = parts
    row, ok, h, group, head_dim = place
    if units == 1:
        _finish(out, softmax, sinks, lost, left, row, ok, h, group, d, head_dim, o_row, o_head)
    else:
        tl.store(part_top + slot * 2, softmax[0], ok)
        tl.store(part_top + slot * 2 + 1, softmax[1], ok)
        tl.store(part + slot[:, None] * head_dim + d[None, :], softmax[2], ok[:, None] & (d < head_dim)[None, :])


@triton.jit
def _sight(b, row0, lens, group, left, right, unit_size, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(live, lost, unit, begin, whole, stop, sight): the tiles [begin, stop) of the program's unit, of which rows see
    those from `whole` on whole, as far as they are of the context."""
    context_lens, block_lens, context_starts, width, capacity, num_pages = lens
    context, start, live, lost = lengths(b, context_lens, block_lens, context_starts, width, capacity, num_pages)
    first, end = bounds(row0, context, start, live, group, left, right, BLOCK_M)
    unit = first // unit_size + tl.program_id(1)
    begin = tl.maximum(unit * unit_size, first) // BLOCK_N
    stop = tl.cdiv(tl.minimum((unit + 1) * unit_size, end), BLOCK_N)
    last_query = (tl.minimum(row0 + BLOCK_M, live * group) - 1) // group
    whole = tl.cdiv(tl.maximum(start, context + last_query - left), BLOCK_N)
    return live, lost, unit, begin, whole, stop, (context, first, end, left, right)


@triton.jit
def _views(b, h, row0, live, context, group, tensors, head_dim, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows and the keys of attention_tile.py."""
    q, k, v, k_cache, v_cache, table = tensors
    b, h, row, d = b.to(tl.int64), h.to(tl.int64), row0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    ok = row < live * group
    from_q = q[0] + b * q[1] + (row // group).to(tl.int64) * q[2] + (h * group + row % group) * q[3]
    rows = (tl.load(from_q[:, None] + d[None, :], ok[:, None] & (d < head_dim)[None, :], 0.0), from_q, ok,
            context + row // group)
    return rows, (k[0] + b * k[1] + h * k[3], v[0] + b * v[1] + h * v[3], k[2], v[2], k_cache[0] + h * k_cache[3],
                  v_cache[0] + h * v_cache[3], k_cache[1], k_cache[2], v_cache[1], v_cache[2],
                  table[0] + b * table[1])


@triton.jit(do_not_specialize=["width", "capacity", "table_row", "units"])
def block_attention_kernel(q, k, v, k_cache, v_cache, k_scales, v_scales, page_table, context_lens, block_lens,
                           context_starts, sinks, out, part, part_top, width, group, kv_heads, factor, softcap, left,
                           right, num_pages, capacity, table_row, q_b, q_row, q_head, k_b, k_row, k_head, v_b, v_row,
                           v_head, kc_page, kc_row, kc_head, vc_page, vc_row, vc_head, o_b, o_row, o_head, units,
                           unit_size, K_SCALE: tl.constexpr, V_SCALE: tl.constexpr, NATIVE: tl.constexpr,
                           PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                           BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr, EXACT_D: tl.constexpr, SPAN: tl.constexpr,
                           SOFTCAP: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr):
    """Program (task, u) has the u-th unit that a row tile sees; a unit is a span, or the whole context."""
    tiles = tl.cdiv(width * group, BLOCK_M)
    request_head, row0 = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_M
    b, h = request_head // kv_heads, request_head % kv_heads
    lens = context_lens, block_lens, context_starts, width, capacity, num_pages
    tensors = ((q, q_b, q_row, q_head), (k, k_b, k_row, k_head), (v, v_b, v_row, v_head),
               (k_cache, kc_page, kc_row, kc_head), (v_cache, vc_page, vc_row, vc_head), (page_table, table_row))
    live, lost, unit, begin, whole, stop, sight = _sight(b, row0, lens, group, left, right, unit_size, BLOCK_M, BLOCK_N)
    if (row0 < live * group) & (begin < stop):
        rows, keys = _views(b, h, row0, live, sight[0], group, tensors, HEAD_DIM, BLOCK_M, BLOCK_D)
        softmax, largest = attend_all(
            begin, whole, stop, rows, keys, sight, (HEAD_DIM, num_pages), factor, scale_of(k_scales, h, K_SCALE),
            scale_of(v_scales, h, V_SCALE), softcap, tl.arange(0, BLOCK_D), False, NATIVE, PAGE, BLOCK_M, BLOCK_N,
            BLOCK_D, CHUNK_D, SPAN, SOFTCAP, WHOLE, STAGES)
        # Added what is 0, and no compiler knows it, what follows from b, h and row0 is not kept through the loops.
        zero = largest >> 31
        b, h, row0 = b + zero, h + zero, row0 + zero
        row, to = row0 + tl.arange(0, BLOCK_M), out + b.to(tl.int64) * o_b
        parts = part, part_top, ((b * kv_heads + h).to(tl.int64) * units + unit) * (width * group) + row
        place = row, row < live * group, h, group, HEAD_DIM
        if largest >= 0x7F800000:
            live, lost, _, begin, whole, stop, sight = _sight(b, row0, lens, group, left, right, unit_size, BLOCK_M,
                                                              BLOCK_N)
            rows, keys = _views(b, h, row0, live, sight[0], group, tensors, HEAD_DIM, BLOCK_M, BLOCK_D)
            for column in tl.range(0, BLOCK_D, EXACT_D):
                some = column + tl.arange(0, EXACT_D)
                exact, _ = attend_all(
                    begin, whole, stop, rows, keys, sight, (HEAD_DIM, num_pages), factor,
                    scale_of(k_scales, h, K_SCALE), scale_of(v_scales, h, V_SCALE), softcap, some, True, NATIVE, PAGE,
                    BLOCK_M, BLOCK_N, BLOCK_D, CHUNK_D, SPAN, SOFTCAP, False, 1)
                _put(exact, some, parts, sinks, lost, left, place, to, o_row, o_head, units)
        else:
            _put(softmax, tl.arange(0, BLOCK_D), parts, sinks, lost, left, place, to, o_row, o_head, units)


@triton.jit(do_not_specialize=["width", "capacity", "spans"])
def merge_spans_kernel(part, part_top, context_lens, block_lens, context_starts, sinks, out, width, group, kv_heads,
                       left, right, num_pages, capacity, o_b, o_row, o_head, spans, HEAD_DIM: tl.constexpr,
                       BLOCK_M: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
                       AHEAD: tl.constexpr):
    request_head = tl.program_id(0).to(tl.int64)
    b, h, row0 = request_head // kv_heads, request_head % kv_heads, tl.program_id(1) * ROWS
    context, start, rows, lost = lengths(b, context_lens, block_lens, context_starts, width, capacity, num_pages)
    first, end = bounds(row0 // BLOCK_M * BLOCK_M, context, start, rows, group, left, right, BLOCK_M)
    row, d = row0 + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    ok, last_span = row < rows * group, tl.cdiv(end, SPAN)
    softmax = nothing_seen(ROWS, BLOCK_D)
    for begin in range(first // SPAN, last_span, AHEAD):
        for span in tl.static_range(AHEAD):
            there = tl.where(begin + span < last_span, ok, False)
            slot = (request_head * spans + begin + span) * (width * group) + row
            softmax = merge(softmax, (
                tl.load(part_top + slot * 2, there, float("-inf")), tl.load(part_top + slot * 2 + 1, there, 0.0),
                tl.load(part + slot[:, None] * HEAD_DIM + d[None, :], there[:, None] & (d < HEAD_DIM)[None, :], 0.0)))
    _finish(out + b * o_b, softmax, sinks, lost, left, row, ok, h, group, d, HEAD_DIM, o_row, o_head)
