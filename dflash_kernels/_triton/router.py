"""route_experts: itemsize * E bytes of a row's logits and 8 k of its experts move: kilobytes, whose floor is a launch.

A program has a row's scores in registers and takes the largest k times, each a maximum over the row. Experts lie there
by group, (groups, experts of a group) filled up to powers of two, and in order.
Configurations are compiled without a GPU as tools/aot/experts.py launches them.
"""

import triton
import triton.language as tl

from .._constants import TINY
from ._math import NO_SPILLS, exp, of_order_key, order_key, tree_sum

WARPS = {256: 1, 1 << 62: 4}  # by the most experts. Estimated: 8 a thread, and few exchanges between warps
TAKEN = tl.constexpr(-0x80000000)  # below every key
SMALL = tl.constexpr(TINY)


@triton.jit
def _softmax(x):
    """Of a vector, whose sum has one order. An infinity that is subtracted from itself is NaN, as in torch."""
    x = x - tl.max(x, 0)
    e = tl.where(x < -200.0, 0.0, exp(tl.where(x < -200.0, -200.0, x)))
    return tl.div_rn(e, _sum(e) + tl.zeros_like(e))


@triton.jit
def _sigmoid(x):
    e = exp(tl.minimum(tl.maximum(-x, -200.0), 200.0))
    return tl.where(x == x, tl.div_rn(tl.zeros_like(x) + 1.0, 1.0 + e), x)


@triton.jit
def _sum(x):
    return tl.sum(tl.sum(tree_sum(x[None, :]), 1), 0)


@triton.jit
def _first(key, at):
    """The first place of the largest key."""
    return tl.min(tl.where(key == tl.max(key, 0), at, key.shape[0]), 0)


@triton.jit
def _of_best_groups(key, groups, top_groups, BEST: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """key, TAKEN outside the groups whose BEST best experts have the largest sums."""
    key = tl.reshape(key, (GROUPS, SIZE))
    g, s = tl.arange(0, GROUPS), tl.arange(0, SIZE)
    best = tl.max(key, 1)
    if BEST == 2:
        place = tl.min(tl.where(key == best[:, None], s[None, :], SIZE), 1)
        second = tl.max(tl.where(s[None, :] == place[:, None], TAKEN, key), 1)
        best = order_key(of_order_key(best) + of_order_key(second))
    best = tl.where(g < groups, best, TAKEN)
    kept = g < 0
    for _ in range(top_groups):
        at = _first(best, g)
        kept = kept | (g == at)
        best = tl.where(g == at, TAKEN, best)
    return tl.reshape(tl.where(kept[:, None], key, TAKEN), (GROUPS * SIZE,))


@triton.jit
def route_experts_kernel(logits, bias, out_ids, out_weights, experts, k, groups, top_groups, scale, stride,
                         SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr, BEST: tl.constexpr, GROUPS: tl.constexpr,
                         SIZE: tl.constexpr, K: tl.constexpr):
    row, place, slot = tl.program_id(0).to(tl.int64), tl.arange(0, GROUPS * SIZE), tl.arange(0, K)
    size = experts // groups
    expert, inside = place // SIZE * size + place % SIZE, (place // SIZE < groups) & (place % SIZE < size)
    x = tl.load(logits + row * stride + expert, inside, float("-inf")).to(tl.float32)
    # Scores, where the choice or the weights need those of all experts.
    WHOLE: tl.constexpr = not SIGMOID and not NORMALIZE
    SCORED: tl.constexpr = bias is not None or GROUPS > 1 and BEST == 2
    source, choice = x, x
    if SCORED or WHOLE:
        scores = _sigmoid(x) if SIGMOID else _softmax(x)
        if WHOLE:
            source = scores
        if SCORED:
            choice = scores
        if bias is not None:
            choice = scores + tl.load(bias + expert, inside, 0.0)
    key = tl.where(inside, order_key(choice), TAKEN)
    if GROUPS > 1:
        key = _of_best_groups(key, groups, top_groups, BEST, GROUPS, SIZE)
    # The k largest, one after the other.
    chosen = tl.full((K,), float("-inf"), tl.float32)
    for i in range(k):
        at = _first(key, place)
        chosen = tl.where(slot == i, tl.sum(tl.where(place == at, source, 0.0), 0), chosen)
        tl.store(out_ids + row * k + i, at // SIZE * size + at % SIZE)
        key = tl.where(place == at, TAKEN, key)
    weights = chosen
    if SIGMOID:
        weights = tl.where(slot < k, _sigmoid(chosen), 0.0)
        if NORMALIZE:
            weights = tl.div_rn(weights, _sum(weights) + SMALL + tl.zeros_like(weights))
    elif NORMALIZE:
        weights = _softmax(chosen)
    tl.store(out_weights + row * k + slot, weights * scale, slot < k)


def route_experts(logits, bias, scoring, groups, top_groups, group_best, normalize, scale, out_ids, out_weights):
    (rows, experts), k = logits.shape, out_ids.shape[1]
    if not rows:
        return
    if top_groups == groups:
        groups = top_groups = 1
    warps = next(warps for most, warps in WARPS.items() if experts <= most)
    route_experts_kernel[rows,](
        logits, bias, out_ids, out_weights, experts, k, groups, top_groups, scale, logits.stride(0), scoring == 1,
        normalize, group_best, triton.next_power_of_2(groups), triton.next_power_of_2(experts // groups),
        triton.next_power_of_2(k), num_warps=warps, **NO_SPILLS)
