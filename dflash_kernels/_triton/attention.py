"""block_attention: context K and V once for each key head, whatever the block's rows and the heads that share them.

Bytes of a request: itemsize * D * (2 Hkv (context + Q) + 2 Hq Q), operations 4 Q Hq D a visible key. A program has a
tile of BLOCK_M rows (row = query * group + member of the group) of one key head, padded, so its tensor cores do
4 BLOCK_M D operations for the 4 D bytes of a key: 64 rows are 214 TFLOP/s at an H100's 3.35 TB/s, a fifth of what its
wgmma reaches. Neither that nor the bytes is where a kernel like this is slow, but the instructions: in the time that 64
keys of 128 bfloat16 numbers take to arrive, one multiprocessor of 132 issues 9,000 of them.

- Nearly all tiles lie in the cache and are seen whole by every row. They have a loop with no mask and one source of
  addresses (WHOLE). It is 650 instructions for each of 8 warps on sm_90, 5,200 for 64 rows; with masks, and with the
  block's keys as the other source, it was 848 for 32 rows, two tiles of which were 13,600.
- 64 rows are one tile where a product of 64 rows is one instruction of a warp group (wgmma, tcgen05), which reads the
  query from shared memory. mma.sync has it in registers, and two float32 sums for each row, of the span and of the
  spans before it, beside it: there 64 rows of 128 numbers spill, and more than 32 rows are more tiles. They are
  neighbours in the grid, so memory is read once for them all and the second-level cache once for each.

A row's bits depend on its query, its position and the keys that it sees, on nothing else:

- On one chip the tile is the same for every Q, batch and option but the soft cap, which is the model's own. A product
  is always the same instruction in the same layout, which treats rows alike. Tiles of keys start at multiples of
  BLOCK_N of the ABSOLUTE position, and a key that a row does not see has weight 0 and changes no bit: whether a tile
  was masked does not show.
- SPAN positions are one softmax, from nothing, and spans are merged in order. Whether programs share out the spans and
  a second launch merges them (few requests) or one program does both (many) is chosen by shapes alone and moves no bit.
  Multiply-adds of a merge are fused by name, so that both places round alike.
- Keys come from the cache or from the block through one address; the tile does not know which. Those of an fp8 cache
  have a loop of their own, and the bits of a row also depend on where the context ends.

Shared out, a span costs beside its keys a float32 row of D for each query row, written and read: 2 rows / SPAN of the
keys' bytes in bfloat16. What a program does with a tile of keys is in attention_tile.py.
"""

import functools
from typing import NamedTuple

import torch
import triton

from ..limits import check_gpu_attention
from ._case import Case
from ._fp8 import as_bytes, native_fp8, scale_kind
from ._math import NO_SPILLS, PLAIN
from .attention_kernel import block_attention_kernel, merge_spans_kernel

SPAN = 512
FAR = 1 << 29  # a distance that no two positions have; sums of it and a position stay below 2**31
LOG2E = 1.4426950408889634


class Config(NamedTuple):
    """CHUNK_D numbers of a key, and EXACT_D of a value, at a time. WHOLE: tiles that rows see whole have a loop of
    their own."""

    BLOCK_M: int
    BLOCK_N: int
    CHUNK_D: int
    EXACT_D: int
    WHOLE: bool
    warps: int
    stages: int


# (bytes of a query's number, of a cached one, head dim at most): by generation. All estimated: as many rows as a
# thread's registers hold beside their sums, and as many stages as 99 KB of shared memory, of which the first is the
# page table's. On sm_90, where heads of 128 leave a multiprocessor one block, they take as many as have two tiles
# ahead: a tile is two stages, the page table's copy is asked for last and waited for first, so that 4 have none.
# An fp8 cache with heads of 128 has none there either. With 6 stages it would, and spills: a thread holds its tile's
# numbers as bytes, as 16 bits, and on their way through shared memory. What would give it the registers is a product
# that takes fp8 as it lies (wgmma of e4m3, queries in fp8 too), or keys for rows of the product and queries for its
# columns, so that the 64 rows, mostly padding, are not held twice.
CONFIGS = {
    (2, 2, 64): {8: Config(32, 64, 64, 64, True, 8, 7), 9: Config(64, 64, 64, 16, True, 4, 5)},
    (2, 2, 128): {8: Config(32, 64, 128, 128, True, 8, 5), 9: Config(64, 64, 128, 16, True, 8, 8),
                  12: Config(32, 32, 128, 128, True, 8, 7)},
    (2, 2, 256): {8: Config(16, 32, 256, 64, True, 8, 5)},
    (2, 1, 64): {8: Config(32, 64, 64, 64, False, 8, 7), 9: Config(64, 64, 64, 16, True, 8, 5)},
    (2, 1, 128): {8: Config(32, 32, 128, 128, True, 8, 7), 9: Config(64, 64, 128, 16, True, 8, 4),
                  10: Config(64, 32, 128, 16, True, 8, 5)},
    (2, 1, 256): {8: Config(16, 32, 256, 64, False, 8, 5)},
    (4, 4, 64): {8: Config(16, 16, 32, 16, False, 8, 5)},
    (4, 4, 128): {8: Config(16, 16, 32, 16, False, 8, 5)},
    (4, 4, 256): {8: Config(8, 16, 16, 64, False, 8, 5), 10: Config(8, 16, 16, 256, False, 8, 5)},
    (4, 1, 64): {8: Config(16, 16, 32, 16, False, 8, 5)},
}
# A soft cap takes registers too.
SOFTCAPPED = {(2, 2, 128): {9: Config(64, 32, 128, 16, True, 8, 5)}}
# Where a generation has no entry it takes another's: 64 rows are wgmma on 9 and tcgen05 on 10 and 11; 8 and 12 have
# mma.sync alone.
LIKE = {8: (8,), 9: (9, 8), 10: (10, 9, 8), 11: (10, 9, 8), 12: (12, 8)}
MERGE_ROWS, MERGE_AHEAD = 4, 8  # rows a program, and spans of each that it asks for at once. Estimated
# With fewer tiles of rows than SPLIT_BELOW programs share out spans: estimated, two a multiprocessor. Programs and
# memory (256 MB) follow the page table's width then, and each program that finds no span costs a launch's share.
SPLIT_BELOW, SPLIT_PROGRAMS, SPLIT_FLOATS = 256, 1 << 14, 64 << 20


@functools.cache
def generation(device: torch.device) -> int:
    """The major compute capability; the oldest one's where kernels are interpreted."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8


def config(itemsize: int, cached: int, head_dim: int, softcap: bool, major: int) -> Config:
    """The caller has checked that there is one (limits.py, check_gpu_attention)."""
    key = next(key for key in CONFIGS if key[:2] == (itemsize, cached) and head_dim <= key[2])
    by = CONFIGS[key] | (SOFTCAPPED.get(key, {}) if softcap else {})
    return next(by[found] for found in LIKE.get(major, (8,)) if found in by)


def merge_warps(row_bytes: int) -> int:
    """Wider rows are more numbers a thread, and MERGE_AHEAD times those do not fit its registers."""
    return max(4, row_bytes // 128)


def block_attention(q, k, v, k_cache, v_cache, k_scale, v_scale, page_table, context_lens, block_lens, context_starts,
                    scale, causal, left, right, sinks, softcap, out):
    """Where spans are shared out it allocates what they leave to merge, as a graph may: it is in its pool."""
    (batch, width, heads, head_dim), kv_heads = q.shape, k.shape[2]
    cached = (k if k_cache is None else k_cache).dtype
    check_gpu_attention(q.dtype, cached, head_dim)
    c = config(q.element_size(), cached.itemsize, head_dim, softcap > 0, generation(q.device))
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
        part, part_top, width, group, kv_heads, factor, softcap, left, right, num_pages, capacity, table_row,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *cache_strides, *out.stride()[:3], units, unit_size,
        scale_kind(k_scale), scale_kind(v_scale), native_fp8(q.device), page_size, head_dim, c.BLOCK_M, c.BLOCK_N,
        block_d, min(c.CHUNK_D, block_d), min(c.EXACT_D, block_d), SPAN, softcap > 0, c.WHOLE,
        c.stages,
        num_warps=c.warps, num_stages=c.stages, **(NO_SPILLS if q.element_size() == 4 else PLAIN))
    if split:
        merge_spans_kernel[batch * kv_heads, triton.cdiv(rows, MERGE_ROWS)](
            part, part_top, context_lens, block_lens, context_starts, sinks, out, width, group, kv_heads, left, right,
            num_pages, capacity, *out.stride()[:3], spans, head_dim, c.BLOCK_M, SPAN, MERGE_ROWS, block_d,
            MERGE_AHEAD, num_warps=merge_warps(block_d * out.element_size()), **PLAIN)


_TYPES = {"context_lens": "*i32", "block_lens": "*i32", "context_starts": "*i32", "page_table": "*i32",
          "part": "*fp32", "part_top": "*fp32", "sinks": "*fp32", "k_scales": "*fp32", "v_scales": "*fp32",
          "factor": "fp32", "softcap": "fp32"}
_TENSORS = {"q", "k", "v", "k_cache", "v_cache", "out"}
_MULTIPLES = {"unit_size", "q_b", "q_row", "q_head", "k_b", "k_row", "k_head", "v_b", "v_row", "v_head",
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
    for itemsize, cached, dim in CONFIGS:
        def of(field, softcap=False, key=(itemsize, cached, dim)):
            return lambda arch: getattr(config(*key, softcap, arch // 10), field)

        fp8 = cached == 1
        for dtype in ("fp32",) if itemsize == 4 else ("bf16", "fp16"):
            for softcap in (False, True) if dtype == "bf16" and not fp8 else (False,):
                constants = {n: of(n, softcap) for n in ("BLOCK_M", "BLOCK_N", "CHUNK_D", "EXACT_D", "WHOLE")} | {
                    "K_SCALE": fp8 * 2, "V_SCALE": fp8 * 2, "NATIVE": _native if fp8 else False, "PAGE": 16,
                    "HEAD_DIM": dim, "BLOCK_D": dim, "SPAN": SPAN, "SOFTCAP": softcap,
                    "STAGES": of("stages", softcap)} | ({} if fp8 else {"k_scales": None, "v_scales": None})
                name = f"block_attention {dim} {dtype}" + " fp8 cache" * fp8 + " softcap" * softcap
                yield _case(name, block_attention_kernel, dtype, constants, of("warps", softcap),
                            of("stages", softcap), fp8)
            if not fp8:
                constants = {"HEAD_DIM": dim, "BLOCK_M": of("BLOCK_M"), "SPAN": SPAN, "ROWS": MERGE_ROWS,
                             "BLOCK_D": dim, "AHEAD": MERGE_AHEAD}
                name = f"block_attention merge_spans {dim} {dtype}"
                yield _case(name, merge_spans_kernel, dtype, constants, merge_warps(dim * itemsize), 3)
