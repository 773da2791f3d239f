"""block_attention: context K and V once for each key head, whatever the block's rows and the heads that share them.

Bytes of a request: itemsize * D * (2 Hkv (context + Q) + 2 Hq Q), operations 4 Q Hq D a visible key. A program has a
tile of BLOCK_M rows (row = query * group + member of the group) of one key head, padded, so its tensor cores do
4 BLOCK_M D operations for the 4 D bytes of a key: 32 rows are 110 TFLOP/s at an H100's 3.35 TB/s, a fifth of what
mma.sync reaches there; the floor is the bytes.

More rows than BLOCK_M are more tiles, neighbours in the grid. Memory is read once as long as the second-level cache
keeps what they share, but that cache is read once for each tile: 4 times for 128 rows (16 queries of 8 heads), which
costs time where its bandwidth is under 4 times the memory's. One tile of 64 or 128 rows does not fit:

- Two float32 sums for each row, of the span and of the spans before it, are 128 of a thread's 255 registers for 128
  rows of 128 numbers in 8 warps. Triton 3.7 then spills, with tiles of 64 keys, 3,368 bytes on sm_80, 224 on sm_90,
  1,168 on sm_100 and 2,080 on sm_120; 64 rows with tiles of 32 keys still spill 496 on sm_80 and 620 on sm_120. The
  loop that looks for values which are not finite takes most of it: without it 128 rows by 32 keys spill 12 bytes on
  sm_80 and none on sm_90.
- Two tiles of 32 rows that share each tile of keys need the query in registers twice: with 128 numbers 104 bytes are
  spilled on sm_80, 64 on sm_90, 72 on sm_100 and 144 on sm_120, with 64 numbers none, none, 4 and 68.
- From 64 rows on a product is wgmma on sm_90 and tcgen05 on sm_100. A small block, whose tile must stay small, would
  take mma.sync, and the bits of a row could depend on how many others there are.

A row's bits depend on its query, its position and the keys that it sees, on nothing else:

- The tile is the same for every Q, batch and option, so a product is always the same instruction (mma.sync, in 16 bits)
  in the same layout, which treats rows alike. Tiles of keys start at multiples of BLOCK_N of the ABSOLUTE position, and
  a key that a row does not see has weight 0 and changes no bit.
- SPAN positions are one softmax, from nothing, and spans are merged in order. Whether programs share out the spans and
  a second launch merges them (few requests) or one program does both (many) is chosen by shapes alone and moves no bit.
  Multiply-adds of a merge are fused by name, so that both places round alike.
- Keys come from the cache or from the block through one address; the tile does not know which. Those of an fp8 cache
  have a loop of their own, and the bits of a row also depend on where the context ends.

Shared out, a span costs beside its keys a float32 row of D for each query row, written and read: 2 rows / SPAN of the
keys' bytes in bfloat16. What a program does with a tile of keys is in attention_tile.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._aot import Case
from ._fp8 import as_bytes, native_fp8, scale_kind
from ._math import NO_SPILLS, PLAIN
from .attention_tile import attend_all, merge, nothing_seen

SPAN = 512
FAR = 1 << 29  # a distance that no two positions have; sums of it and a position stay below 2**31
LOG2E = 1.4426950408889634


class Config(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    CHUNK_D: int
    warps: int
    stages: int


# (bytes of an element, head dim at most). All estimated: as many rows as a thread's registers hold beside their sums,
# and as many stages as 99 KB of shared memory, so that every chip runs the same tiles. Two stages are the page table's.
CONFIGS = {
    (2, 64): Config(32, 64, 64, 8, 7),
    (2, 128): Config(32, 64, 128, 8, 5),
    (2, 256): Config(16, 32, 256, 8, 5),
    (4, 64): Config(16, 16, 32, 8, 5),
    (4, 128): Config(16, 16, 32, 8, 5),
    (4, 256): Config(16, 16, 16, 8, 5),
}
MERGE_ROWS, MERGE_AHEAD = 4, 8  # rows a program, and spans of each that it asks for at once. Estimated
# With fewer tiles of rows than SPLIT_BELOW programs share out spans: estimated, two a multiprocessor. Programs and
# memory (256 MB) follow the page table's width then, and each program that finds no span costs a launch's share.
SPLIT_BELOW, SPLIT_PROGRAMS, SPLIT_FLOATS = 256, 1 << 14, 64 << 20


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


@triton.jit(do_not_specialize=["width", "capacity", "table_row", "units"])
def block_attention_kernel(q, k, v, k_cache, v_cache, k_scales, v_scales, page_table, context_lens, block_lens,
                           context_starts, sinks, out, part, part_top, width, group, kv_heads, head_dim, factor,
                           softcap, left, right, num_pages, capacity, table_row, q_b, q_row, q_head, k_b, k_row, k_head,
                           v_b, v_row, v_head, kc_page, kc_row, kc_head, vc_page, vc_row, vc_head, o_b, o_row, o_head,
                           units, unit_size, K_SCALE: tl.constexpr, V_SCALE: tl.constexpr, NATIVE: tl.constexpr,
                           PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                           CHUNK_D: tl.constexpr, SPAN: tl.constexpr, SOFTCAP: tl.constexpr, STAGES: tl.constexpr):
    """Program (task, u) has the u-th unit that a row tile sees; a unit is a span, or the whole context."""
    tiles = tl.cdiv(width * group, BLOCK_M)
    request_head = (tl.program_id(0) // tiles).to(tl.int64)
    b, h, row0 = request_head // kv_heads, request_head % kv_heads, tl.program_id(0) % tiles * BLOCK_M
    context, start, live, lost = lengths(b, context_lens, block_lens, context_starts, width, capacity, num_pages)
    first, end = bounds(row0, context, start, live, group, left, right, BLOCK_M)
    row, d = row0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    ok = row < live * group
    from_q = q + b * q_b + (row // group).to(tl.int64) * q_row + (h * group + row % group) * q_head
    rows = (tl.load(from_q[:, None] + d[None, :], ok[:, None] & (d < head_dim)[None, :], 0.0), from_q, ok,
            context + row // group)
    keys = (k + b * k_b + h * k_head, v + b * v_b + h * v_head, k_row, v_row, k_cache + h * kc_head,
            v_cache + h * vc_head, kc_page, kc_row, vc_page, vc_row, page_table + b * table_row)
    sight, extent, out = (context, first, end, left, right), (head_dim, num_pages), out + b * o_b
    k_scale, v_scale = scale_of(k_scales, h, K_SCALE), scale_of(v_scales, h, V_SCALE)
    unit = first // unit_size + tl.program_id(1)
    if (row0 < live * group) & (unit * unit_size < end):
        begin = tl.maximum(unit * unit_size, first) // BLOCK_N
        stop = tl.cdiv(tl.minimum((unit + 1) * unit_size, end), BLOCK_N)
        softmax = attend_all(begin, stop, rows, keys, sight, extent, factor, k_scale, v_scale, softcap, False, NATIVE,
                             PAGE, BLOCK_M, BLOCK_N, BLOCK_D, CHUNK_D, SPAN, SOFTCAP, STAGES)
        # As integers: for the same look at booleans Triton 3.9 keeps a stack frame.
        if tl.max(tl.max(softmax[2].to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1), 0) >= 0x7F800000:
            softmax = attend_all(begin, stop, rows, keys, sight, extent, factor, k_scale, v_scale, softcap, True,
                                 NATIVE, PAGE, BLOCK_M, BLOCK_N, BLOCK_D, CHUNK_D, SPAN, SOFTCAP, 1)
        if units == 1:
            _finish(out, softmax, sinks, lost, left, row, ok, h, group, d, head_dim, o_row, o_head)
        else:
            slot = (request_head * units + unit) * (width * group) + row
            tl.store(part_top + slot * 2, softmax[0], ok)
            tl.store(part_top + slot * 2 + 1, softmax[1], ok)
            tl.store(part + slot[:, None] * head_dim + d[None, :], softmax[2], ok[:, None] & (d < head_dim)[None, :])


@triton.jit(do_not_specialize=["width", "capacity", "spans"])
def merge_spans_kernel(part, part_top, context_lens, block_lens, context_starts, sinks, out, width, group, kv_heads,
                       head_dim, left, right, num_pages, capacity, o_b, o_row, o_head, spans, BLOCK_M: tl.constexpr,
                       SPAN: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, AHEAD: tl.constexpr):
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
                tl.load(part + slot[:, None] * head_dim + d[None, :], there[:, None] & (d < head_dim)[None, :], 0.0)))
    _finish(out + b * o_b, softmax, sinks, lost, left, row, ok, h, group, d, head_dim, o_row, o_head)


def config(itemsize: int, head_dim: int, fp8: bool) -> Config:
    if not serves(itemsize, head_dim, fp8):
        raise NotImplementedError("block_attention: float32 queries over an fp8 cache have a CUDA kernel only up to "
                                  f"heads of 64; got {head_dim}: use bfloat16 or float16 queries")
    for (width, most), c in CONFIGS.items():
        if width == itemsize and head_dim <= most:
            return c
    raise NotImplementedError(f"block_attention: heads of more than 256 have no CUDA kernel; got {head_dim}")


def serves(itemsize: int, head_dim: int, fp8: bool) -> bool:
    """float32 sums of larger heads, beside what the cache's conversion holds, spill on sm_100 and sm_120."""
    return not (fp8 and itemsize == 4 and head_dim > 64)


def merge_warps(row_bytes: int) -> int:
    """Wider rows are more numbers a thread, and MERGE_AHEAD times those do not fit its registers."""
    return max(4, row_bytes // 128)


def block_attention(q, k, v, k_cache, v_cache, k_scale, v_scale, page_table, context_lens, block_lens, context_starts,
                    scale, causal, left, right, sinks, softcap, out):
    """Where spans are shared out it allocates what they leave to merge, as a graph may: it is in its pool."""
    (batch, width, heads, head_dim), kv_heads = q.shape, k.shape[2]
    c = config(q.element_size(), head_dim, k_cache is not None and k_cache.element_size() == 1)
    if batch == 0 or width == 0:
        return
    left = FAR if left < 0 else min(left, FAR)
    right = 0 if causal else FAR if right < 0 else min(right, FAR)
    factor, softcap = (scale / softcap, softcap * LOG2E) if softcap > 0 else (scale * LOG2E, 0.0)
    page_size, num_pages, capacity, table_row, cache_strides = 1, -1, 0, 0, (0,) * 6
    if k_cache is None:
        k_cache, v_cache, page_table = k, v, context_lens
    else:
        num_pages, page_size = k_cache.shape[:2]
        capacity, table_row = page_table.shape[1] * page_size, page_table.stride(0)
        cache_strides = k_cache.stride()[:3] + v_cache.stride()[:3]
        k_cache, v_cache = as_bytes(k_cache), as_bytes(v_cache)
    group, block_d = heads // kv_heads, max(16, triton.next_power_of_2(head_dim))
    rows, reach = width * group, capacity + width
    tasks, spans = batch * kv_heads * triton.cdiv(rows, c.BLOCK_M), triton.cdiv(reach, SPAN)
    split = (spans > 1 and tasks < SPLIT_BELOW and tasks * spans <= SPLIT_PROGRAMS
             and spans * batch * heads * width * (head_dim + 2) <= SPLIT_FLOATS)
    units, unit_size = (spans, SPAN) if split else (1, FAR)
    slots = batch * kv_heads * units * rows if split else 0
    part, part_top = (torch.empty(slots, n, dtype=torch.float32, device=q.device) for n in (head_dim, 2))
    block_attention_kernel[tasks, units](
        q, k, v, k_cache, v_cache, k_scale, v_scale, page_table, context_lens, block_lens, context_starts, sinks, out,
        part, part_top, width, group, kv_heads, head_dim, factor, softcap, left, right, num_pages, capacity, table_row,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *cache_strides, *out.stride()[:3], units, unit_size,
        scale_kind(k_scale), scale_kind(v_scale), native_fp8(q.device), page_size, c.BLOCK_M, c.BLOCK_N, block_d,
        min(c.CHUNK_D, block_d), SPAN, softcap > 0, c.stages,
        num_warps=c.warps, num_stages=c.stages, **(NO_SPILLS if q.element_size() == 4 else PLAIN))
    if split:
        merge_spans_kernel[batch * kv_heads, triton.cdiv(rows, MERGE_ROWS)](
            part, part_top, context_lens, block_lens, context_starts, sinks, out, width, group, kv_heads, head_dim,
            left, right, num_pages, capacity, *out.stride()[:3], spans, c.BLOCK_M, SPAN, MERGE_ROWS, block_d,
            MERGE_AHEAD, num_warps=merge_warps(block_d * out.element_size()), **PLAIN)


_TYPES = {"context_lens": "*i32", "block_lens": "*i32", "context_starts": "*i32", "page_table": "*i32",
          "part": "*fp32", "part_top": "*fp32", "sinks": "*fp32", "k_scales": "*fp32", "v_scales": "*fp32",
          "factor": "fp32", "softcap": "fp32"}
_TENSORS = {"q", "k", "v", "k_cache", "v_cache", "out"}
_MULTIPLES = {"head_dim", "unit_size", "q_b", "q_row", "q_head", "k_b", "k_row", "k_head", "v_b", "v_row", "v_head",
              "kc_page", "kc_row", "kc_head", "vc_page", "vc_row", "vc_head", "o_b", "o_row", "o_head"}


def _case(name, kernel, dtype, constants, warps, stages, fp8=False):
    kinds = dict.fromkeys(_TENSORS, "*" + dtype) | dict.fromkeys(_MULTIPLES, "i32:16") | _TYPES
    kinds |= dict.fromkeys(("k_cache", "v_cache"), "*u8") if fp8 else {}
    kinds |= dict.fromkeys(constants, "constexpr")
    options = NO_SPILLS if kernel is block_attention_kernel and dtype == "fp32" else PLAIN
    return Case(name, kernel, {n: kinds.get(n, "i32") for n in kernel.arg_names}, constants, warps, stages, options)


def _native(arch):
    return arch >= 89


def cases():
    for (itemsize, dim), c in CONFIGS.items():
        for dtype in ("fp32",) if itemsize == 4 else ("bf16", "fp16"):
            for softcap, fp8 in [(False, False), (False, True)] + [(True, False)] * (dtype == "bf16"):
                if not serves(itemsize, dim, fp8):
                    continue
                constants = {"K_SCALE": fp8 * 2, "V_SCALE": fp8 * 2, "NATIVE": _native if fp8 else False, "PAGE": 16,
                             "BLOCK_M": c.BLOCK_M, "BLOCK_N": c.BLOCK_N, "BLOCK_D": dim, "CHUNK_D": c.CHUNK_D,
                             "SPAN": SPAN, "SOFTCAP": softcap, "STAGES": c.stages}
                constants |= {} if fp8 else {"k_scales": None, "v_scales": None}
                name = f"block_attention {dim} {dtype}" + " fp8 cache" * fp8 + " softcap" * softcap
                yield _case(name, block_attention_kernel, dtype, constants, c.warps, c.stages, fp8)
            constants = {"BLOCK_M": c.BLOCK_M, "SPAN": SPAN, "ROWS": MERGE_ROWS, "BLOCK_D": dim, "AHEAD": MERGE_AHEAD}
            name = f"block_attention merge_spans {dim} {dtype}"
            yield _case(name, merge_spans_kernel, dtype, constants, merge_warps(dim * itemsize), 3)
