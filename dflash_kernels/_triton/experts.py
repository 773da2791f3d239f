"""expert_mlp: the weights of the experts that were chosen, 3 H I itemsize bytes each, are read once, and 6 H I
operations are done for each row and expert. On an H100 the bytes decide up to about 180 rows an expert.

    gate_up_kernel  a tile, ROWS pairs of one expert (a row and one of its slots), and BLOCK_N of I a program: both
                    products, the activation, one rounding
    down_kernel     the same pairs and BLOCK_N of H: float32 products, 4 H bytes a pair. Of the programs with a row's
                    products the last to arrive adds them, weighted, in the order of the row's slots, one rounding

Which experts have how many pairs is known on the device alone. So there are as many programs as the pairs could need,
and those left over do nothing. gate_up's find their tiles, each from all ids, and write them down for down_kernel. For
256 pairs that is some 800 instructions, 1 to 2 us, which delay only the first programs: later ones scan while others
read. A launch of its own (schedule_kernel) takes 2 to 3 us before it scans, of the 22 us in which one row reads 8
experts of Qwen3-30B-A3B. For 2,048 pairs, 256 rows of 8, the scan is 4,300 instructions and takes as long as a launch
that scans: more have one. The sum needs none, because whoever comes last adds. All times estimated, for an H100.

Arrivals are counted for each row and BLOCK_N of H. gate_up sets the counts to zero in every call: nothing is left over
from a call before, in the same graph or one that failed, and streams share nothing. A pair whose expert is elsewhere
arrives too, with nothing to add, so that a row has as many arrivals as slots. Nobody waits for one. The counts' atomic
additions acquire and release, and barriers on either side extend that to all threads of a program.

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
FOUND_WITHIN = 2048  # pairs of which gate_up's programs find their tiles, FIND_BLOCK at a time. Estimated
FIND_BLOCK, SCHEDULE_BLOCK, SCHEDULE_WARPS = 256, 512, 4  # Estimated: 2 a thread, and 4
AT_ONCE = tl.constexpr(4)  # slots whose products are on their way from the second-level cache together


def rows_of_tile(pairs: int, experts: int) -> int:
    """More rows a program read a weight less often, where experts have that many."""
    return 16 if pairs <= 16 * experts else 32


@triton.jit
def local(ids, at, mask, first_expert, experts):
    """Places among the experts that are here; `experts` for one that is not. A difference that wraps is far beyond."""
    place = tl.load(ids + at, mask, None if mask is None else -1) - first_expert
    return tl.where((place >= 0) & (place < experts), place, experts)


@triton.jit
def find_tile(ids, pairs, first_expert, experts, ROWS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """The expert of this program's tile, and its pairs in order, -1 past the last. Behind the experts' tiles are those
    of the pairs whose expert is elsewhere, `experts` in its place: every row has all its pairs in some tile."""
    item, e = tl.program_id(0), tl.arange(0, EXPERTS)
    counts = tl.zeros((EXPERTS,), tl.int32)
    for at0 in range(0, pairs, BLOCK):
        at = at0 + tl.arange(0, BLOCK)
        place = local(ids, at, at < pairs, first_expert, experts)
        counts += tl.histogram(place, EXPERTS, place < experts)
    tiles = (counts + ROWS - 1) // ROWS
    own = tl.minimum(tl.sum((tl.cumsum(tiles, 0) <= item).to(tl.int32), 0), experts)
    # Of the expert's pairs that come before the tile's, those not seen yet.
    before = (item - tl.sum(tl.where(e < own, tiles, 0), 0)) * ROWS
    found = tl.full((ROWS,), -1, tl.int32)
    for at0 in range(0, pairs, BLOCK):
        at = at0 + tl.arange(0, BLOCK)
        mine = (local(ids, at, at < pairs, first_expert, experts) == own) & (at < pairs)
        rank = tl.cumsum(mine.to(tl.int32), 0) - 1 - before
        here = mine[None, :] & (rank[None, :] == tl.arange(0, ROWS)[:, None])
        found = tl.maximum(found, tl.max(tl.where(here, at[None, :], -1), 1))
        before -= tl.sum(mine.to(tl.int32), 0)
    return own, found


@triton.jit(do_not_specialize=["pairs"])
def schedule_kernel(ids, owners, members, pairs, first_expert, experts, ROWS: tl.constexpr, EXPERTS: tl.constexpr,
                    BLOCK: tl.constexpr):
    item = tl.program_id(0)
    own, pair = find_tile(ids, pairs, first_expert, experts, ROWS, EXPERTS, BLOCK)
    tl.store(owners + item, own)
    tl.store(members + item * ROWS + tl.arange(0, ROWS), pair)


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


@triton.jit(do_not_specialize=["pairs"])
def gate_up_kernel(x, weight, scales, bias, ids, owners, members, arrivals, hidden, pairs, first_expert, experts, slots,
                   columns, k, inner, x_stride, CLAMPED: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr,
                   BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """ids: None where schedule_kernel has written owners and members."""
    item = tl.program_id(0)
    place = item * ROWS + tl.arange(0, ROWS)
    if ids is None:
        own, pair = tl.load(owners + item), tl.load(members + place)
    else:
        own, pair = find_tile(ids, pairs, first_expert, experts, ROWS, EXPERTS, BLOCK)
        if tl.program_id(1) == 0:
            tl.store(owners + item, own)
            tl.store(members + place, pair)
    row = tl.maximum(pair, 0) // slots
    for column in range(tl.program_id(1), columns, tl.num_programs(1)):
        tl.store(arrivals + row * columns + column, tl.zeros((ROWS,), tl.int32), (pair >= 0) & (pair % slots == 0))

    dtype: tl.constexpr = x.dtype.element_ty
    end, live = tl.where(own < experts, k, 0), (pair >= 0) & (own < experts)
    own, n = tl.minimum(own, experts - 1).to(tl.int64), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x += row.to(tl.int64)[:, None] * x_stride
    weight += own * 2 * inner * k
    gate, up = tl.zeros((ROWS, BLOCK_N), tl.float32), tl.zeros((ROWS, BLOCK_N), tl.float32)
    for at0 in range(0, end, BLOCK_K):
        at = at0 + tl.arange(0, BLOCK_K)
        rows = tl.load(x + at[None, :], live[:, None] & (at < k)[None, :], 0.0)
        gate = tl.dot(rows, weight_at(weight, n, at, inner, k, dtype), gate, input_precision="ieee")
        up = tl.dot(rows, weight_at(weight + tl.cast(inner, tl.int64) * k, n, at, inner, k, dtype), up,
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
def down_kernel(hidden, weight, scales, bias, ids, weights, owners, members, arrivals, products, out, first_expert,
                experts, slots, k, outputs, out_stride, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
                BLOCK_K: tl.constexpr):
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dtype: tl.constexpr = hidden.dtype.element_ty
    own, pair = tl.load(owners + tl.program_id(0)), tl.load(members + place)
    end, live = tl.where(own < experts, k, 0), (pair >= 0) & (own < experts)
    own, n = tl.minimum(own, experts - 1).to(tl.int64), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight += own * outputs * k
    total = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for at0 in range(0, end, BLOCK_K):
        at = at0 + tl.arange(0, BLOCK_K)
        rows = tl.load(hidden + place.to(tl.int64)[:, None] * k + at[None, :], live[:, None] & (at < k)[None, :], 0.0)
        total = tl.dot(rows, weight_at(weight, n, at, outputs, k, dtype), total, input_precision="ieee")
    to = own * outputs
    total = finished(total, None if scales is None else scales + to, None if bias is None else bias + to, n, outputs)
    inside = (n < outputs)[None, :]
    tl.store(products + pair.to(tl.int64)[:, None] * outputs + n[None, :], total, live[:, None] & inside)

    # All threads have stored before one says so; none reads before all have heard.
    tl.debug_barrier()
    row = tl.maximum(pair, 0) // slots
    arrived = tl.atomic_add(arrivals + row * tl.num_programs(1) + tl.program_id(1), 1, pair >= 0, sem="acq_rel")
    last = (pair >= 0) & (arrived == slots - 1)
    tl.debug_barrier()
    if tl.max(last.to(tl.int32), 0) > 0:
        total = tl.zeros((ROWS, BLOCK_N), tl.float32)
        for s in tl.range(0, slots, loop_unroll_factor=AT_ONCE):
            of = row * slots + s
            here = (local(ids, of, None, first_expert, experts) < experts)[:, None]
            found = tl.load(products + of.to(tl.int64)[:, None] * outputs + n[None, :], last[:, None] & inside & here,
                            0.0, cache_modifier=".cg")
            total = tl.where(here, total + tl.load(weights + of)[:, None] * found, total)
        tl.store(out + row.to(tl.int64)[:, None] * out_stride + n[None, :], total.to(dtype), last[:, None] & inside)


def expert_mlp(x, gate_up, down, gate_up_scales, down_scales, ids, weights, gate_up_bias, down_bias, inner, activation,
               first_expert, out):
    """What lies between its launches it allocates, as a graph may: it belongs to its pool."""
    if ids.shape[1] == 0:
        out.zero_()
        return
    most = max(1, PAIRS // ids.shape[1])
    for begin in range(0, len(x), most):
        rows = slice(begin, begin + most)
        _some_rows(x[rows], gate_up, down, gate_up_scales, down_scales, ids[rows], weights[rows], gate_up_bias,
                   down_bias, inner, activation, first_expert, out[rows])


def _some_rows(x, gate_up, down, gate_up_scales, down_scales, ids, weights, gate_up_bias, down_bias, inner, activation,
               first_expert, out):
    (rows, outputs), slots, experts, device = x.shape, ids.shape[1], len(gate_up), x.device
    pairs = rows * slots
    tile, some = rows_of_tile(pairs, experts), triton.next_power_of_2(experts)
    owned = min(pairs, experts + 1)  # at most so many experts have a first tile; one more takes ROWS more pairs
    tiles = owned + (pairs - owned) // tile
    wide, narrow = GATE_UP[x.element_size()], DOWN[x.element_size()]
    columns = triton.cdiv(outputs, narrow.BLOCK_N)
    owners, members = (torch.empty(tiles * n, dtype=torch.int32, device=device) for n in (1, tile))
    arrivals = torch.empty(rows * columns, dtype=torch.int32, device=device)
    hidden = torch.empty(tiles * tile, inner, dtype=x.dtype, device=device)
    products = torch.empty(pairs, outputs, dtype=torch.float32, device=device)
    apart = pairs > FOUND_WITHIN
    if apart:
        schedule_kernel[tiles,](ids, owners, members, pairs, first_expert, experts, tile, some, SCHEDULE_BLOCK,
                                num_warps=SCHEDULE_WARPS, **PLAIN)
    gate_up_kernel[tiles, triton.cdiv(inner, wide.BLOCK_N)](
        x, gate_up, gate_up_scales, gate_up_bias, None if apart else ids, owners, members, arrivals, hidden, pairs,
        first_expert, experts, slots, columns, outputs, inner, x.stride(0), activation == 1, tile, some, FIND_BLOCK,
        wide.BLOCK_N, wide.BLOCK_K, num_warps=wide.warps, num_stages=wide.stages, **NO_SPILLS)
    down_kernel[tiles, columns](
        hidden, down, down_scales, down_bias, ids, weights, owners, members, arrivals, products, out, first_expert,
        experts, slots, inner, outputs, out.stride(0), tile, narrow.BLOCK_N, narrow.BLOCK_K, num_warps=narrow.warps,
        num_stages=narrow.stages, **NO_SPILLS)
