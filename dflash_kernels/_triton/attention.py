"""block_attention: context K and V once for each key head, whatever the block's rows and the heads that share them.

Bytes of a request: itemsize * D * (2 Hkv (context + Q) + 2 Hq Q), operations 4 Q Hq D a visible key. A program has a
tile of BLOCK_M rows (row = query * group + member of the group) of one key head, padded, so its tensor cores do
4 BLOCK_M D operations for the 4 D bytes of a key: 64 rows are 214 TFLOP/s at an H100's 3.35 TB/s, a fifth of what its
wgmma reaches. Neither that nor the bytes is where a kernel like this is slow, but the instructions: in the time that 64
keys of 128 bfloat16 numbers take to arrive, one multiprocessor of 132 issues 9,000 of them.

- Nearly all tiles lie in the cache and are seen whole by every row. They have a loop with no mask and one source of
  addresses (WHOLE). It is 514 instructions for each of 8 warps on sm_90, 4,100 for 64 rows, beside the end of a split;
  with masks, and with the block's keys as the other source, it was 848 for 32 rows, two tiles of which were 13,600.
- 64 rows are one tile where a product of 64 rows is one instruction of a warp group (wgmma, tcgen05), which reads the
  query from shared memory. mma.sync has it in registers, and two float32 sums for each row, of the split and of the
  splits before it, beside it: there 64 rows of 128 numbers spill, and more than 32 rows are more tiles. They are
  neighbours in the grid, so memory is read once for them all and the second-level cache once for each.

A row's bits depend on its query, its position and the keys that it sees, on nothing else:

- On one chip the tile is the same for every Q, batch and option but the soft cap, which is the model's own. A product
  is always the same instruction in the same layout, which treats rows alike. Tiles of keys start at multiples of
  BLOCK_N of the ABSOLUTE position, and a key that a row does not see has weight 0 and changes no bit: whether a tile
  was masked does not show.
- Splits of positions, fixed by the window alone (attention_split.py), are a softmax each, from nothing, and are
  combined in order. How many programs share out the splits of a tile of rows, and a second launch combines (few
  requests), or whether one does both (many), moves no bit. Multiply-adds of a combine are fused by name, so that both
  places round alike.
- Keys come from the cache or from the block through one address; the tile does not know which. Those of an fp8 cache
  have a loop of their own, and the bits of a row also depend on where the context ends.

There are as many programs as the chip runs at once, whatever the page tables have room for. A program reads the lengths
and takes the splits that begin in its part of the positions, one after another in one loop. The first of a tile's
combines its own; of the others a split costs beside its keys a float32 row of D for each query row, written and read: 2
rows / length of the keys' bytes in bfloat16. With 64 rows that is as much as the keys in splits of 128, which short
contexts have and the second-level cache holds, and 1/8 in splits of 1,024, from 8,192 positions on. What a program does
with a tile of keys is in attention_tile.py.

Known limit: programs are shared out before lengths are known, as if contexts were alike. 13 to 16 requests of 8 key
heads nearly fill an H100, and 20 and more in tables for 40,960 would leave more to combine than SHARED_FLOATS: these
have one program for a tile of rows, and of contexts that are not alike the longest takes as long as its program.
Configurations are compiled without a GPU as tools/aot/launched.py launches them.
"""

from typing import NamedTuple

import torch
import triton

from ..limits import check_gpu_attention
from ._chip import generation, multiprocessors
from ._fp8 import as_bytes, native_fp8, scale_kind
from ._math import NO_SPILLS, PLAIN
from .attention_kernel import block_attention_kernel, combine_splits_kernel
from .attention_split import EACH, SPLIT, octaves_of, splits_in

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
# An fp8 cache with heads of 128 has tiles of 32 keys, and one ahead; of 64 it spills with that: a thread holds its
# tile's numbers as bytes, as 16 bits, and on their way through shared memory.
CONFIGS = {
    (2, 2, 64): {8: Config(32, 64, 64, 64, True, 8, 7), 9: Config(64, 64, 64, 16, True, 4, 5),
                 10: Config(64, 64, 64, 16, True, 8, 5)},
    (2, 2, 128): {8: Config(32, 32, 128, 128, True, 8, 7), 9: Config(64, 64, 128, 16, True, 8, 8)},
    (2, 2, 256): {8: Config(16, 32, 256, 64, True, 8, 5)},
    (2, 1, 64): {8: Config(32, 64, 64, 64, False, 8, 7), 9: Config(64, 64, 64, 16, True, 8, 5)},
    (2, 1, 128): {8: Config(32, 32, 128, 128, True, 8, 7), 9: Config(64, 32, 128, 16, True, 8, 5)},
    (2, 1, 256): {8: Config(16, 32, 256, 64, False, 8, 5)},
    (4, 4, 64): {8: Config(16, 16, 32, 16, False, 8, 5)},
    (4, 4, 128): {8: Config(16, 16, 64, 16, False, 8, 5)},
    (4, 4, 256): {8: Config(8, 16, 16, 64, False, 8, 5), 10: Config(8, 16, 16, 32, False, 8, 5),
                  12: Config(8, 16, 128, 64, False, 8, 5)},
    (4, 1, 64): {8: Config(16, 16, 32, 16, False, 8, 5)},
}
# A soft cap takes registers too.
SOFTCAPPED = {(2, 2, 128): {9: Config(64, 32, 128, 16, True, 8, 5)}}
# Where a generation has no entry it takes another's: 64 rows are wgmma on 9 and tcgen05 on 10 and 11; 8 and 12 have
# mma.sync alone.
LIKE = {8: (8,), 9: (9, 8), 10: (10, 9, 8), 11: (10, 9, 8), 12: (12, 8)}
# Rows a program, its warps, and stages of its loop over splits: two fewer are on their way while one is waited for, as
# each is a trip to the second-level cache. Estimated.
COMBINE_ROWS, COMBINE_WARPS, COMBINE_STAGES = 4, 4, 8
SHARED_FLOATS = 64 << 20  # what programs leave to combine at most, 256 MB; else one has all splits of its rows


def blocks_of(warps: int) -> int:
    """That a multiprocessor holds: every configuration takes more than 128 of the 256 registers that a thread may have,
    where a multiprocessor has them for 8 warps."""
    return max(8 // warps, 1)


def shares_of(tasks: int, splits: int, at_once: int) -> int:
    """Programs a task: with how many the chip ends soonest if all contexts are alike, a tenth added for the second
    launch that more than one need. As many as it runs at once, or up to 4 and more than one round of them: who finds
    no split costs a launch's share."""
    most = min(splits, max(at_once // tasks, 4))
    return min(range(1, most + 1), key=lambda n: (triton.cdiv(tasks * n, at_once) / n * (1 + 0.1 * (n > 1)), n))


def config(itemsize: int, cached: int, head_dim: int, softcap: bool, major: int) -> Config:
    """The caller has checked that there is one (limits.py, check_gpu_attention)."""
    key = next(key for key in CONFIGS if key[:2] == (itemsize, cached) and head_dim <= key[2])
    by = CONFIGS[key] | (SOFTCAPPED.get(key, {}) if softcap else {})
    return next(by[found] for found in LIKE.get(major, (8,)) if found in by)


def block_attention(q, k, v, k_cache, v_cache, k_scale, v_scale, page_table, context_lens, block_lens, context_starts,
                    block_starts, max_block, scale, causal, left, right, sinks, softcap, out):
    """Where splits are shared out it allocates what they leave to combine, as a graph may: it is in its pool."""
    (_, packed_rows, heads, head_dim), kv_heads, batch, width = q.shape, k.shape[2], len(context_lens), max_block
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

    def outer(t):  # a packed block begins at a row
        strides = t.stride()[:3]
        return strides if block_starts is None else (strides[1], *strides[1:])

    rows, octaves = width * group, octaves_of(left, SPLIT, EACH)
    tasks = batch * kv_heads * triton.cdiv(rows, c.BLOCK_M)
    splits = min(splits_in(capacity + width, octaves, SPLIT, EACH), splits_in(left + width, octaves, SPLIT, EACH) + 1)
    shares = shares_of(tasks, splits, multiprocessors(q.device) * blocks_of(c.warps))
    if splits * batch * heads * width * (head_dim + 2) > SHARED_FLOATS:
        shares = 1
    slots = batch * kv_heads * splits * rows if shares > 1 else 0
    part, part_top = (torch.empty(slots, n, dtype=torch.float32, device=q.device) for n in (head_dim, 2))
    block_attention_kernel[tasks, shares](
        q, k, v, k_cache, v_cache, k_scale, v_scale, page_table, context_lens, block_lens, context_starts, block_starts,
        sinks, out, part, part_top, packed_rows, width, group, kv_heads, factor, softcap, left, right, num_pages,
        capacity, table_row, *outer(q), *outer(k), *outer(v), *cache_strides, *outer(out), splits, shares, octaves,
        BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N, CHUNK_D=min(c.CHUNK_D, block_d), EXACT_D=min(c.EXACT_D, block_d),
        WHOLE=c.WHOLE, K_SCALE=scale_kind(k_scale), V_SCALE=scale_kind(v_scale),
        NATIVE=cached == torch.float8_e4m3fn and native_fp8(q.device), PAGE=page_size, HEAD_DIM=head_dim,
        BLOCK_D=block_d, SPLIT=SPLIT, EACH=EACH, SOFTCAP=softcap > 0, STAGES=c.stages,
        num_warps=c.warps, num_stages=c.stages, **(NO_SPILLS if q.element_size() == 4 else PLAIN))
    if shares > 1:
        combine_splits_kernel[batch * kv_heads, triton.cdiv(rows, COMBINE_ROWS)](
            part, part_top, context_lens, block_lens, context_starts, block_starts, sinks, out, packed_rows, width,
            group, kv_heads, left, right, num_pages, capacity, *outer(out), splits, shares, octaves, head_dim,
            c.BLOCK_M, SPLIT, EACH, COMBINE_ROWS, block_d, COMBINE_STAGES, num_warps=COMBINE_WARPS,
            num_stages=COMBINE_STAGES, **PLAIN)
