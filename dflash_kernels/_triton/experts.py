"""expert_mlp: the weights of the experts that were chosen, 3 H I itemsize bytes each, are read once, and 6 H I
operations are done for each row and expert. On an H100 the bytes decide up to about 180 rows an expert.

    1  schedule_kernel  a program an expert: its pairs (a row and one of its slots), in order, behind those of the
                        experts before it
    2  gate_up_kernel   ROWS pairs of one expert and BLOCK_N of I a program: both products, the activation, one rounding
    3  down_kernel      the same pairs and BLOCK_N of H: float32 products, 4 H bytes a pair
    4  sum_kernel       a row's products in the order of its slots, one rounding

Which experts have how many pairs is known on the device alone. So launches 2 and 3 have as many programs as the pairs
could need, and each finds its expert by the experts' counts; those left over do nothing. The sum has a launch of its
own because its terms come from programs in no order. At 8 experts a row it moves 0.3 % of the bytes of the weights.

Programs of one expert and the same outputs are neighbours, so that an expert of more than ROWS rows is read from memory
once and from the second-level cache again. ROWS is 16 or 32, whose products are the same instruction (linear.py), and a
sum runs over k from one end to the other: a row's bits are its own.
Configurations are compiled without a GPU as tools/aot/experts.py launches them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._constants import GATE_ALPHA, GATE_LIMIT
from ._math import NO_SPILLS, PLAIN, exp

PAIRS = 32_768  # at a time: what the memory between the launches is for
ALPHA, LIMIT = tl.constexpr(GATE_ALPHA), tl.constexpr(GATE_LIMIT)


class Config(NamedTuple):
    BLOCK_N: int
    BLOCK_K: int
    warps: int
    stages: int


# By bytes of an element. All estimated: some 70 KB in flight a block, as linear has, of two weights in gate_up.
GATE_UP = {2: Config(64, 64, 4, 4), 4: Config(32, 32, 4, 4)}
DOWN = {2: Config(64, 128, 4, 4), 4: Config(32, 32, 4, 4)}
SCHEDULE_BLOCK, SCHEDULE_WARPS = 1024, 4  # pairs at a time. Estimated: 8 a thread
SUM_BLOCK, SUM_WARPS = 512, 4  # outputs of a program. Estimated: 16-byte accesses


def rows_of_tile(pairs: int, experts: int) -> int:
    """More rows a program read a weight less often, where experts have that many."""
    return 16 if pairs <= 16 * experts else 32


@triton.jit(do_not_specialize=["pairs"])
def schedule_kernel(ids, order, starts, counts, pairs, first_expert, BLOCK: tl.constexpr):
    """order: pairs by expert. starts, counts: where an expert's begin in it, and how many they are."""
    e = tl.program_id(0)
    before = tl.zeros((BLOCK,), tl.int32)
    for at0 in range(0, pairs, BLOCK):
        at = at0 + tl.arange(0, BLOCK)
        place = tl.load(ids + at, at < pairs, -1) - first_expert
        before += ((place >= 0) & (place < e)).to(tl.int32)
    start = tl.sum(before, 0)
    count = start * 0
    for at0 in range(0, pairs, BLOCK):
        at = at0 + tl.arange(0, BLOCK)
        own = (tl.load(ids + at, at < pairs, -1) - first_expert == e) & (at < pairs)
        rank = tl.cumsum(own.to(tl.int32), 0)
        tl.store(order + start + count + rank - 1, at, own)
        count += tl.sum(own.to(tl.int32), 0)
    tl.store(starts + e, start)
    tl.store(counts + e, count)


@triton.jit
def tile_of(starts, counts, experts, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """The expert of this program's tile, and its first place and the end in `order`; past the last tile no place."""
    item, e = tl.program_id(0), tl.arange(0, EXPERTS)
    tiles = (tl.load(counts + e, e < experts, 0) + ROWS - 1) // ROWS
    found = tl.sum((tl.cumsum(tiles, 0) <= item).to(tl.int32), 0)
    own = tl.minimum(found, experts - 1)
    start = tl.load(starts + own)
    first = start + (item - tl.sum(tl.where(e < own, tiles, 0), 0)) * ROWS
    return own, first, tl.where(found < experts, start + tl.load(counts + own), first)


@triton.jit
def weight_at(weight, n, at, outputs, k, dtype: tl.constexpr):
    """(BLOCK_K, BLOCK_N) of an expert's weight; an int8 becomes the rows' type."""
    mask = (n < outputs)[None, :] & (at < k)[:, None]
    return tl.load(weight + n.to(tl.int64)[None, :] * k + at[:, None], mask, 0).to(dtype)


@triton.jit
def finished(total, scales, bias, n, outputs):
    """Scales of an int8 weight, then the bias, in float32."""
    if scales is not None:
        total *= tl.load(scales + n, n < outputs, 0.0)[None, :]
    if bias is not None:
        total += tl.load(bias + n, n < outputs, 0.0).to(tl.float32)[None, :]
    return total


@triton.jit
def times_sigmoid(gate, x):
    """gate * sigmoid(x). Beyond these bounds the exponential is 0 or infinite anyway."""
    e = exp(tl.minimum(tl.maximum(-x, -200.0), 200.0))
    return tl.div_rn(gate, 1.0 + e)


@triton.jit
def gate_up_kernel(x, weight, scales, bias, order, starts, counts, hidden, experts, slots, k, inner, x_stride,
                   CLAMPED: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_K: tl.constexpr):
    own, first, end = tile_of(starts, counts, experts, ROWS, EXPERTS)
    dtype: tl.constexpr = x.dtype.element_ty
    place, n = first + tl.arange(0, ROWS), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = place < end
    x += (tl.load(order + place, live, 0) // slots).to(tl.int64)[:, None] * x_stride
    own = own.to(tl.int64)
    weight += own * 2 * inner * k
    gate, up = tl.zeros((ROWS, BLOCK_N), tl.float32), tl.zeros((ROWS, BLOCK_N), tl.float32)
    for at0 in range(0, tl.where(first < end, k, 0), BLOCK_K):
        at = at0 + tl.arange(0, BLOCK_K)
        rows = tl.load(x + at[None, :], live[:, None] & (at < k)[None, :], 0.0)
        gate = tl.dot(rows, weight_at(weight, n, at, inner, k, dtype), gate, input_precision="ieee")
        up = tl.dot(rows, weight_at(weight + inner.to(tl.int64) * k, n, at, inner, k, dtype), up,
                    input_precision="ieee")
    to = own * 2 * inner
    gate = finished(gate, None if scales is None else scales + to, None if bias is None else bias + to, n, inner)
    to += inner
    up = finished(up, None if scales is None else scales + to, None if bias is None else bias + to, n, inner)
    if CLAMPED:
        # A comparison with NaN is false, which leaves it as it is.
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
        y = times_sigmoid(gate, gate * ALPHA) * (up + 1.0)
    else:
        y = times_sigmoid(gate, gate) * up
    tl.store(hidden + place.to(tl.int64)[:, None] * inner + n[None, :], y.to(dtype),
             live[:, None] & (n < inner)[None, :])


@triton.jit
def down_kernel(hidden, weight, scales, bias, order, starts, counts, products, experts, k, outputs,
                ROWS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    own, first, end = tile_of(starts, counts, experts, ROWS, EXPERTS)
    dtype: tl.constexpr = hidden.dtype.element_ty
    place, n = first + tl.arange(0, ROWS), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live, own = place < end, own.to(tl.int64)
    weight += own * outputs * k
    total = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for at0 in range(0, tl.where(first < end, k, 0), BLOCK_K):
        at = at0 + tl.arange(0, BLOCK_K)
        rows = tl.load(hidden + place.to(tl.int64)[:, None] * k + at[None, :], live[:, None] & (at < k)[None, :], 0.0)
        total = tl.dot(rows, weight_at(weight, n, at, outputs, k, dtype), total, input_precision="ieee")
    to = own * outputs
    total = finished(total, None if scales is None else scales + to, None if bias is None else bias + to, n, outputs)
    pair = tl.load(order + place, live, 0)
    tl.store(products + pair.to(tl.int64)[:, None] * outputs + n[None, :], total,
             live[:, None] & (n < outputs)[None, :])


@triton.jit
def sum_kernel(products, ids, weights, out, slots, first_expert, experts, outputs, out_stride, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for s in range(slots):
        pair = row * slots + s
        place = tl.load(ids + pair) - first_expert
        here = (place >= 0) & (place < experts)
        found = tl.load(products + pair * outputs + at, tl.where(here, at < outputs, False), 0.0)
        total = tl.where(here, total + tl.load(weights + pair) * found, total)
    tl.store(out + row * out_stride + at, total.to(out.dtype.element_ty), at < outputs)


def expert_mlp(x, gate_up, down, gate_up_scales, down_scales, ids, weights, gate_up_bias, down_bias, inner, activation,
               first_expert, out):
    """What lies between its launches it allocates, as a graph may: it belongs to its pool."""
    most = max(1, PAIRS // max(1, ids.shape[1]))
    for begin in range(0, len(x), most):
        rows = slice(begin, begin + most)
        _some_rows(x[rows], gate_up, down, gate_up_scales, down_scales, ids[rows], weights[rows], gate_up_bias,
                   down_bias, inner, activation, first_expert, out[rows])


def _some_rows(x, gate_up, down, gate_up_scales, down_scales, ids, weights, gate_up_bias, down_bias, inner, activation,
               first_expert, out):
    (rows, outputs), slots, experts, device = x.shape, ids.shape[1], len(gate_up), x.device
    pairs = rows * slots
    order = torch.empty(pairs, dtype=torch.int32, device=device)
    starts, counts = torch.empty(2, experts, dtype=torch.int32, device=device)
    hidden = torch.empty(pairs, inner, dtype=x.dtype, device=device)
    products = torch.empty(pairs, outputs, dtype=torch.float32, device=device)
    if pairs:
        schedule_kernel[experts,](ids, order, starts, counts, pairs, first_expert, BLOCK=SCHEDULE_BLOCK,
                                  num_warps=SCHEDULE_WARPS, **PLAIN)
        tile, some = rows_of_tile(pairs, experts), triton.next_power_of_2(experts)
        tiles = min(pairs, min(experts, pairs) + pairs // tile)
        c = GATE_UP[x.element_size()]
        gate_up_kernel[tiles, triton.cdiv(inner, c.BLOCK_N)](
            x, gate_up, gate_up_scales, gate_up_bias, order, starts, counts, hidden, experts, slots, outputs, inner,
            x.stride(0), activation == 1, tile, some, c.BLOCK_N, c.BLOCK_K, num_warps=c.warps, num_stages=c.stages,
            **NO_SPILLS)
        c = DOWN[x.element_size()]
        down_kernel[tiles, triton.cdiv(outputs, c.BLOCK_N)](
            hidden, down, down_scales, down_bias, order, starts, counts, products, experts, inner, outputs, tile, some,
            c.BLOCK_N, c.BLOCK_K, num_warps=c.warps, num_stages=c.stages, **NO_SPILLS)
    sum_kernel[rows, triton.cdiv(outputs, SUM_BLOCK)](
        products, ids, weights, out, slots, first_expert, experts, outputs, out.stride(0), BLOCK=SUM_BLOCK,
        num_warps=SUM_WARPS, **PLAIN)
