"""lm_head_argmax: the weight once, itemsize * (V H + rows H) bytes and 2 rows V H operations, and no logits.

The product is `linear`'s, tile for tile, so the logits compared here are the ones that it would write. A program keeps
the best of its BLOCK_N logits of each row, 8 bytes a row and BLOCK_N logits (a thousandth of the weight's bytes for 16
rows), and a second launch keeps the best of those. Which is best does not depend on the order of comparing: value and
id are one 64-bit number, the value's bits ordered as torch.argmax orders floats and the id counted downwards.

combine_argmax: 12 (S + 1) bytes a row; a launch, at any size that occurs.
Configurations are compiled without a GPU as tools/aot/products.py launches them.
"""

import torch
import triton
import triton.language as tl

from ..formats import EXACT
from ._math import of_order_key, order_key, tanh
from .linear import CHUNK, config, options, product

BEST_BLOCK, BEST_WARPS = 1024, 4  # candidates of a row at a time. Estimated: a vocabulary in three steps
COMBINE_BLOCK, COMBINE_WARPS = 128, 4  # rows a program. Estimated


@triton.jit
def logits_of(total, scales, bias, at, num_valid, scale, softcap, SOFTCAP: tl.constexpr, DTYPE: tl.constexpr):
    """The sums (ROWS, BLOCK_N) of outputs `at` as the model has its logits, in float32."""
    if scales is not None:
        total *= tl.load(scales + at, at < num_valid, 0.0)[None, :]
    if bias is not None:
        total += tl.load(bias + at, at < num_valid, 0.0).to(tl.float32)[None, :]
    total *= scale
    if SOFTCAP:
        total = tanh(total / softcap) * softcap
    return total.to(DTYPE).to(tl.float32)


@triton.jit
def candidates(logits, at, num_valid):
    """int64 in torch.argmax's order, no two equal: the value's key above the output, counted downwards."""
    # Padding is below minus infinity, whose key is larger than the smallest integer.
    key = tl.where((at < num_valid)[None, :], order_key(logits).to(tl.int64), -0x80000000)
    return key * 0x100000000 + (0x7FFFFFFF - at)[None, :]


@triton.jit
def output_of(candidate):
    return 0x7FFFFFFF - (candidate & 0xFFFFFFFF)


@triton.jit
def value_of(candidate):
    return of_order_key((candidate >> 32).to(tl.int32))


@triton.jit
def _best(total, scales, bias, best, row0, n0, rows, num_valid, blocks, scale, softcap, ROWS: tl.constexpr,
          BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, DTYPE: tl.constexpr):
    # A tile's sums become logits, and one candidate a row.
    row, at = row0 + tl.arange(0, ROWS), n0 + tl.arange(0, BLOCK_N)
    logits = logits_of(total, scales, bias, at, num_valid, scale, softcap, SOFTCAP, DTYPE)
    found = tl.max(candidates(logits, at, num_valid), 1)
    tl.store(best + row.to(tl.int64) * blocks + tl.program_id(1), found, row < rows)


@triton.jit(do_not_specialize=["rows"])
def lm_head_argmax_kernel(x, weight, scales, bias, best, rows, num_valid, k, x_stride, w_stride, blocks, scale,
                          softcap, ROWS: tl.constexpr, TILES: tl.constexpr, BLOCK_N: tl.constexpr,
                          BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, FORMAT: tl.constexpr,
                          SOFTCAP: tl.constexpr):
    row0, n0 = tl.program_id(0) * ROWS * TILES, tl.program_id(1) * BLOCK_N
    dtype: tl.constexpr = x.dtype.element_ty
    sum0, sum1, sum2, sum3 = product(x, weight, row0, n0, 0, k, rows, num_valid, x_stride, w_stride, ROWS, TILES,
                                     BLOCK_N, BLOCK_K, CHUNK, FORMAT)
    _best(sum0, scales, bias, best, row0, n0, rows, num_valid, blocks, scale, softcap, ROWS, BLOCK_N, SOFTCAP, dtype)
    if TILES > 1:
        _best(sum1, scales, bias, best, row0 + ROWS, n0, rows, num_valid, blocks, scale, softcap, ROWS, BLOCK_N,
              SOFTCAP, dtype)
    if TILES > 2:
        _best(sum2, scales, bias, best, row0 + 2 * ROWS, n0, rows, num_valid, blocks, scale, softcap, ROWS, BLOCK_N,
              SOFTCAP, dtype)
        _best(sum3, scales, bias, best, row0 + 3 * ROWS, n0, rows, num_valid, blocks, scale, softcap, ROWS, BLOCK_N,
              SOFTCAP, dtype)


@triton.jit
def best_of_blocks_kernel(best, out_ids, out_values, blocks, id_offset, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    # The best of every BLOCK-th candidate, then of those.
    found = tl.full((BLOCK,), -0x8000000000000000, tl.int64)
    for begin in range(0, blocks, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        found = tl.maximum(found, tl.load(best + row * blocks + at, at < blocks, -0x8000000000000000))
    top = tl.max(found, 0)
    tl.store(out_ids + row, output_of(top) + id_offset)
    tl.store(out_values + row, value_of(top))


@triton.jit(do_not_specialize=["rows"])
def combine_argmax_kernel(values, ids, out_ids, out_values, shards, rows, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    key, best = order_key(tl.load(values + row, mask, 0.0)), tl.load(ids + row, mask, 0)
    for _ in range(1, shards):
        # The next shard's; of equal values the lower id wins.
        values += rows
        ids += rows
        other, found = order_key(tl.load(values + row, mask, 0.0)), tl.load(ids + row, mask, 0)
        wins = (other > key) | ((other == key) & (found < best))
        key, best = tl.where(wins, other, key), tl.where(wins, found, best)
    tl.store(out_ids + row, best, mask)
    tl.store(out_values + row, of_order_key(key), mask)


def lm_head_argmax(x, weight, scales, format, bias, out_features, num_valid, scale, softcap, id_offset, out_ids,
                   out_values):
    """Allocates 8 bytes a row and block of the vocabulary, as a graph may: they belong to its pool."""
    (rows, k), format = x.shape, format % EXACT
    if rows == 0:
        return
    c = config(rows, x.element_size(), format)
    blocks = triton.cdiv(num_valid, c.BLOCK_N)
    best = torch.empty((rows, blocks), dtype=torch.int64, device=x.device)
    lm_head_argmax_kernel[triton.cdiv(rows, c.ROWS * c.TILES), blocks](
        x, weight, scales, bias, best, rows, num_valid, k, x.stride(0), weight.stride(0), blocks, scale, softcap,
        c.ROWS, c.TILES, c.BLOCK_N, c.BLOCK_K, CHUNK, format, softcap > 0, num_warps=c.warps, num_stages=c.stages,
        **options(c, scales, format, head=True))
    best_of_blocks_kernel[rows,](best, out_ids, out_values, blocks, id_offset, BLOCK=BEST_BLOCK, num_warps=BEST_WARPS)


def combine_argmax(values, ids, out_ids, out_values):
    shards, rows = values.shape
    if rows:
        combine_argmax_kernel[triton.cdiv(rows, COMBINE_BLOCK),](values, ids, out_ids, out_values, shards, rows,
                                                                 BLOCK=COMBINE_BLOCK, num_warps=COMBINE_WARPS)
