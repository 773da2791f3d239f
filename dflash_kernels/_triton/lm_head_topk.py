"""lm_head_topk: the weight once, as lm_head_argmax, and K candidates of 8 bytes for each row and BLOCK_N logits.

The logits are lm_head_argmax's. A program takes the K first of its BLOCK_N one after the other, each a maximum over a
tile in registers, and the sum of exponentials below the first: for 16 candidates, 56 rows and 64 logits of 4,096
products a program, 1.5 % of the weight's bytes. A second launch, a program a row, finds the K blocks whose first is
among the K best firsts: nothing outside those blocks can be among the K best. It reads their candidates, K by K, and
takes the K first of them. No two candidates are equal, so none of this depends on the order of comparing; the sums are
added as a tree in the blocks' order, whatever the rows, the tile or the pointers' alignment.

combine_topk: 12 bytes a candidate; a launch, at any size that occurs.
Configurations are compiled without a GPU as tools/aot/products.py launches them.
"""

import torch
import triton
import triton.language as tl

from ..formats import EXACT
from ._math import NO_SPILLS, PLAIN, exp, of_order_key, order_key, tree_sum
from .linear import CHUNK, config, options, product
from .lm_head import candidates, logits_of, output_of, value_of

BLOCKS, BLOCKS_WARPS = 4096, 8  # of a row's blocks at a time. Estimated: a vocabulary of 262,144 in one step
# ptxas, left alone, spills some bytes of a thread for the sake of more programs, whose number is that of the rows.
BLOCKS_OPTIONS = PLAIN | {"maxnreg": 128}
COMBINE_WARPS = 4  # Estimated
TALLEST = {2: 128, 4: 16}  # rows of a tile, by bytes of an element: 64 with float32 sums spill on sm_80
TAKEN = tl.constexpr(-0x8000000000000000)  # below every candidate
TAKEN_KEY = tl.constexpr(-0x80000000)  # below every key
LAST_ID = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.jit
def base_of(top):
    """What exponentials are taken relative to: nothing is subtracted from an infinity."""
    return tl.where(tl.abs(top) < float("inf"), top, 0.0)


@triton.jit
def exp_below(x, base):
    """exp(x - base) for any x: exp itself makes NaN of an infinity."""
    d = x - base
    return exp(tl.where(d < -200.0, -200.0, tl.where(d > 200.0, 200.0, d)))


@triton.jit
def _first(total, scales, bias, lists, firsts, sums, row0, n0, rows, num_valid, blocks, wanted, scale, softcap,
           ROWS: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, DTYPE: tl.constexpr):
    row, at = row0 + tl.arange(0, ROWS), n0 + tl.arange(0, BLOCK_N)
    logits = logits_of(total, scales, bias, at, num_valid, scale, softcap, SOFTCAP, DTYPE)
    place, mask = row.to(tl.int64) * blocks + tl.program_id(1), row < rows
    valid = tl.where((at < num_valid)[None, :], logits, float("-inf"))
    # The sum of exponentials below the block's first.
    # Where a logit is NaN the maximum may be anything, and the sum is NaN.
    below = exp_below(valid, base_of(tl.max(valid, 1))[:, None])
    tl.store(sums + place, tl.reshape(tree_sum(below), (ROWS,)), mask)
    # The K first, one after the other.
    left = candidates(logits, at, num_valid)
    tl.store(firsts + place, tl.max(left, 1), mask)
    for i in range(wanted):
        found = tl.max(left, 1)
        tl.store(lists + place * wanted + i, found, mask)
        left = tl.where(left == found[:, None], TAKEN, left)


@triton.jit(do_not_specialize=["rows"])
def lm_head_topk_kernel(x, weight, scales, bias, lists, firsts, sums, rows, num_valid, k, x_stride, w_stride, blocks,
                        wanted, scale, softcap, ROWS: tl.constexpr, TILES: tl.constexpr, BLOCK_N: tl.constexpr,
                        BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, FORMAT: tl.constexpr, SOFTCAP: tl.constexpr):
    row0, n0 = tl.program_id(0) * ROWS * TILES, tl.program_id(1) * BLOCK_N
    dtype: tl.constexpr = x.dtype.element_ty
    sum0, sum1, sum2, sum3 = product(x, weight, row0, n0, 0, k, rows, num_valid, x_stride, w_stride, ROWS, TILES,
                                     BLOCK_N, BLOCK_K, CHUNK, FORMAT)
    _first(sum0, scales, bias, lists, firsts, sums, row0, n0, rows, num_valid, blocks, wanted, scale, softcap, ROWS,
           BLOCK_N, SOFTCAP, dtype)
    if TILES > 1:
        _first(sum1, scales, bias, lists, firsts, sums, row0 + ROWS, n0, rows, num_valid, blocks, wanted, scale,
               softcap, ROWS, BLOCK_N, SOFTCAP, dtype)
    if TILES > 2:
        _first(sum2, scales, bias, lists, firsts, sums, row0 + 2 * ROWS, n0, rows, num_valid, blocks, wanted, scale,
               softcap, ROWS, BLOCK_N, SOFTCAP, dtype)
        _first(sum3, scales, bias, lists, firsts, sums, row0 + 3 * ROWS, n0, rows, num_valid, blocks, wanted, scale,
               softcap, ROWS, BLOCK_N, SOFTCAP, dtype)


@triton.jit
def first_of_blocks_kernel(lists, firsts, sums, out_ids, out_values, out_lse, blocks, wanted, id_offset,
                           BLOCK_N: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr):
    """K: a power of two, at least `wanted`."""
    row, at, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK), tl.arange(0, K)
    lists, firsts, sums = lists + row * blocks * wanted, firsts + row * blocks, sums + row * blocks
    # The blocks of the K best firsts.
    chosen = tl.full((K,), -1, tl.int64)
    last = tl.full((), LAST_ID, tl.int64)
    for i in range(tl.minimum(wanted, blocks)):
        best = tl.full((BLOCK,), TAKEN, tl.int64)
        for begin in range(0, blocks, BLOCK):
            first = tl.load(firsts + begin + at, begin + at < blocks, TAKEN)
            best = tl.maximum(best, tl.where(first < last, first, TAKEN))
        last = tl.max(best, 0)
        chosen = tl.where(lane == i, output_of(last) // BLOCK_N, chosen)

    # The K best of those blocks' candidates.
    listed = (chosen >= 0)[:, None] & (lane < wanted)[None, :]
    left = tl.ravel(tl.load(lists + chosen[:, None] * wanted + lane[None, :], listed, TAKEN))
    base = base_of(value_of(tl.max(left, 0)))
    for i in range(wanted):
        found = tl.max(left, 0)
        tl.store(out_ids + row * wanted + i, output_of(found) + id_offset)
        tl.store(out_values + row * wanted + i, value_of(found))
        left = tl.where(left == found, TAKEN, left)

    # The log-sum-exp, of all blocks' sums relative to the row's first.
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, blocks, BLOCK):
        inside = begin + at < blocks
        part = tl.load(sums + begin + at, inside, 0.0)
        total += tl.where(inside, part * exp_below(value_of(tl.load(firsts + begin + at, inside, TAKEN)), base), 0.0)
    tl.store(out_lse + row + tl.arange(0, 1), base + tl.log(tl.reshape(tree_sum(total[None, :]), (1,))))


@triton.jit(do_not_specialize=["rows"])
def combine_topk_kernel(values, ids, lse, out_ids, out_values, out_lse, shards, rows, wanted, BLOCK: tl.constexpr,
                        SHARDS: tl.constexpr):
    """BLOCK, SHARDS: powers of two, at least shards * wanted and shards."""
    row, at, shard = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK), tl.arange(0, SHARDS)
    # All shards' candidates of a row.
    mask = at < shards * wanted
    place = ((at // wanted) * rows + row) * wanted + at % wanted
    key = tl.where(mask, order_key(tl.load(values + place, mask, 0.0)), TAKEN_KEY)
    candidate = tl.load(ids + place, mask, LAST_ID)
    for i in range(wanted):
        best = tl.max(key, 0)
        found = tl.min(tl.where(key == best, candidate, LAST_ID), 0)
        tl.store(out_ids + row * wanted + i, found)
        tl.store(out_values + row * wanted + i, of_order_key(best))
        # By its place: the same candidate twice counts twice.
        taken = tl.min(tl.where((key == best) & (candidate == found), at, BLOCK), 0)
        key = tl.where(at == taken, TAKEN_KEY, key)

    # The log-sum-exp of the shards'.
    each = tl.load(lse + shard * rows + row, shard < shards, float("-inf"))
    base = base_of(of_order_key(tl.max(order_key(each), 0)))
    total = tree_sum(exp_below(each, base)[None, :])
    tl.store(out_lse + row + tl.arange(0, 1), base + tl.log(tl.reshape(total, (1,))))


def lm_head_topk(x, weight, scales, format, bias, out_features, num_valid, scale, softcap, id_offset, out_ids,
                 out_values, out_lse):
    """Allocates 8 K + 12 bytes a row and block of the vocabulary, as a graph may: they belong to its pool."""
    (rows, k), wanted, format = x.shape, out_ids.shape[1], format % EXACT
    if rows == 0:
        return
    # With blocks a candidate list beside 32 rows spills on some architectures, and 16 do where ptxas is left alone.
    c = config(min(rows, 16 if format else TALLEST[x.element_size()]), x.element_size(), format)
    chosen = NO_SPILLS if format else options(c, scales, format)
    blocks = triton.cdiv(num_valid, c.BLOCK_N)
    lists = torch.empty((rows, blocks, wanted), dtype=torch.int64, device=x.device)
    firsts = torch.empty((rows, blocks), dtype=torch.int64, device=x.device)
    sums = torch.empty((rows, blocks), dtype=torch.float32, device=x.device)
    lm_head_topk_kernel[triton.cdiv(rows, c.ROWS * c.TILES), blocks](
        x, weight, scales, bias, lists, firsts, sums, rows, num_valid, k, x.stride(0), weight.stride(0), blocks, wanted,
        scale, softcap, c.ROWS, c.TILES, c.BLOCK_N, c.BLOCK_K, CHUNK, format, softcap > 0, num_warps=c.warps,
        num_stages=c.stages, **chosen)
    first_of_blocks_kernel[rows,](lists, firsts, sums, out_ids, out_values, out_lse, blocks, wanted, id_offset,
                                  BLOCK_N=c.BLOCK_N, BLOCK=BLOCKS, K=triton.next_power_of_2(wanted),
                                  num_warps=BLOCKS_WARPS, **BLOCKS_OPTIONS)


def combine_topk(values, ids, lse, out_ids, out_values, out_lse):
    shards, rows, wanted = values.shape
    if rows:
        combine_topk_kernel[rows,](values, ids, lse, out_ids, out_values, out_lse, shards, rows, wanted,
                                   BLOCK=triton.next_power_of_2(shards * wanted),
                                   SHARDS=triton.next_power_of_2(shards), num_warps=COMBINE_WARPS, **PLAIN)
