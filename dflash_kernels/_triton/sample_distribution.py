"""The distribution of one row of logits, as the kernels of sample.py share it.

A row of V logits is read in chunks of CHUNK tokens. A chunk has its largest logit and the sum of its exponentials
relative to that, so that it is finished in one reading, before the row's largest is known; the weight of token v in
chunk c is

    exp((l_v - top_c) / T) * exp((top_c - top) / T)        zero below the row's cut

wherever it is computed. Sums inside a chunk are tree sums of float32. Sums of chunks, running totals and the masses
that a cut is found by are integers, weights times 2**40: they have one value in any order, so nothing depends on how
programs or threads share a row, and a running total ends exactly at its sum.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .. import _constants as shared
from ._math import of_order_key, order_key, tree_sum

CHUNK, GREEDY = tl.constexpr(shared.SAMPLE_CHUNK), tl.constexpr(shared.GREEDY)
SAMPLE, ACCEPT, DRAFT = (tl.constexpr(purpose) for purpose in (shared.SAMPLE, shared.ACCEPT, shared.DRAFT))
FIXED_POINT, LARGEST = tl.constexpr(2.0**40), tl.constexpr(shared.HOTTEST)
LOWEST = tl.constexpr(-(1 << 31))  # below the key of minus infinity


class Row(NamedTuple):
    """Logits of request b at position i of its block, and what adjusts them, None where nothing does. Each tensor that
    has rows has a stride of a request and of a row. b and i are int64: a stride may be large."""

    logits: tl.tensor
    seen: tl.tensor
    penalty: tl.tensor
    bias: tl.tensor
    bitmask: tl.tensor
    l_b: tl.tensor
    l_i: tl.tensor
    s_b: tl.tensor
    s_i: tl.tensor
    b_b: tl.tensor
    b_i: tl.tensor
    m_b: tl.tensor
    m_i: tl.tensor
    b: tl.tensor
    i: tl.tensor


class Proposal(NamedTuple):
    """What the draft after row i of request b was drawn from: probabilities, of candidates or of all tokens, or logits;
    with strides as in Row."""

    candidates: tl.tensor
    probs: tl.tensor
    logits: tl.tensor
    c_b: tl.tensor
    c_i: tl.tensor
    p_b: tl.tensor
    p_i: tl.tensor
    d_b: tl.tensor
    d_i: tl.tensor
    b: tl.tensor
    i: tl.tensor


class Distribution(NamedTuple):
    """top: the row's largest logit. scale: log2(e) / temperature. cut: below it weights are zero. reciprocal: of the
    weights' sum. only: the one token that has all the mass, or -1."""

    top: tl.tensor
    scale: tl.tensor
    cut: tl.tensor
    reciprocal: tl.tensor
    only: tl.tensor


@triton.jit
def uniform(seed, position, PURPOSE: tl.constexpr, start):
    """float64 in (0, 1): the first word of Philox4x32-10 with key `seed` and counter (position, PURPOSE, start, 0)."""
    c0 = position.to(tl.uint32)
    zero = c0 * 0
    word, _, _, _ = tl.philox(seed, c0, zero + PURPOSE, zero + start.to(tl.uint32), zero)
    return (word.to(tl.float64) + 0.5) * (2.0**-32)


@triton.jit
def adjusted(row, v, mask):
    """Logits of tokens v in float32, minus infinity outside of mask. row: a Row."""
    x = tl.load(row.logits + row.b * row.l_b + row.i * row.l_i + v, mask, float("-inf")).to(tl.float32)
    # The repetition penalty of tokens that the request has seen, a bit each.
    if row.seen is not None:
        word = tl.load(row.seen + row.b * row.s_b + row.i * row.s_i + v // 32, mask, 0)
        factor = tl.load(row.penalty + row.b)
        x = tl.where((word >> (v % 32)) & 1 != 0, tl.where(x > 0, tl.div_rn(x, factor), x * factor), x)
    if row.bias is not None:
        x += tl.load(row.bias + row.b * row.b_b + row.i * row.b_i + v, mask, 0.0)
    # Tokens that a grammar allows, a bit each.
    if row.bitmask is not None:
        word = tl.load(row.bitmask + row.b * row.m_b + row.i * row.m_i + v // 32, mask, 0)
        x = tl.where((word >> (v % 32)) & 1 != 0, x, float("-inf"))
    return x


@triton.jit
def weight(x, top, scale, cut):
    """exp((x - top) / temperature), zero below cut; scale is log2(e) / temperature. An infinite top has 1 as well."""
    w = tl.where(x == top, 1.0, tl.exp2((x - top) * scale))
    return tl.where((x >= cut) & (x > float("-inf")), w, 0.0)


@triton.jit
def probability(x, v, chunk_top, distribution):
    """Of tokens v with logits x under a Distribution. chunk_top: the largest logit of v's chunk."""
    d = distribution
    p = weight(x, chunk_top, d.scale, d.cut) * weight(chunk_top, d.top, d.scale, float("-inf")) * d.reciprocal
    return tl.where(d.only >= 0, tl.where(v == d.only, 1.0, 0.0), p)


@triton.jit
def temperature_of(temperature, b):
    """Finite: over an infinite one the distance from +inf would be NaN."""
    return tl.minimum(tl.load(temperature + b), LARGEST)


@triton.jit
def scale_of(temp):
    return 1.4426950408889634 / tl.maximum(temp, GREEDY)


@triton.jit
def reciprocal_of(mass):
    return (1.0 / (tl.sum(mass, 0).to(tl.float64) * (2.0**-40))).to(tl.float32)


@triton.jit
def masses(sums, tops, top, scale):
    """Chunks' weights as integers."""
    return (sums * weight(tops, top, scale, float("-inf")) * FIXED_POINT).to(tl.int64)


@triton.jit
def argmax(row, tops, nans, vocab, CHUNKS: tl.constexpr):
    """torch.argmax of a row, out of its chunks' largest usable logits and whether they have a NaN."""
    c, v = tl.arange(0, CHUNKS), tl.arange(0, CHUNK)
    top, has_nan = tl.max(tops, 0), tl.max(nans, 0) > 0
    # The first chunk with a NaN, or else with the largest logit; then the first such token in it.
    v += tl.min(tl.where(tl.where(has_nan, nans, (tops == top).to(tl.float32)) > 0, c, CHUNKS - 1), 0) * CHUNK
    x = adjusted(row, v, v < vocab)
    hit = tl.where(has_nan, x != x, x == top)
    return tl.min(tl.where(hit & (v < vocab), v, vocab), 0)


@triton.jit
def pick(mass, u):
    """The first place of (N,) integers where their running total is above u of their sum, which is not 0, and how far
    into that place u is, in [0, 1)."""
    running = tl.cumsum(mass, 0)
    at = (u * tl.sum(mass, 0).to(tl.float64)).to(tl.int64)
    place = tl.sum((running <= at).to(tl.int32), 0)
    size = tl.sum(tl.where(tl.arange(0, mass.shape[0]) == place, mass, 0), 0)
    return place, (at - tl.max(tl.where(running <= at, running, 0), 0)).to(tl.float64) / size.to(tl.float64)


@triton.jit
def pick_weight(w, u):
    """pick for float32 weights, of which one is not 0."""
    total = tl.sum(tree_sum(w[None, :]), 1)
    place, _ = pick((tl.div_rn(w, total) * FIXED_POINT).to(tl.int64), u)
    return place


@triton.jit
def draw(row, tops_at, mass, scale, cut, u, vocab):
    """The token at u of the running total over the vocabulary; mass are the chunks'."""
    chunk, rest = pick(mass, u)
    v = chunk * CHUNK + tl.arange(0, CHUNK)
    x = adjusted(row, v, v < vocab)
    return chunk * CHUNK + pick_weight(weight(x, tl.load(tops_at + chunk), scale, cut), rest)


@triton.jit
def smallest(key, mass, limit, low, high):
    """The smallest t in (low, high] such that the mass of the keys above it is below limit, as at high."""
    while high - low > 1:
        middle = (low + high) >> 1
        if tl.sum(tl.where(key > middle, mass, 0), 0).to(tl.float64) < limit:
            high = middle
        else:
            low = middle
    return high


@triton.jit
def smallest_in_row(row, tops_at, top, scale, limit, low, high, vocab, chunks, COUNT: tl.constexpr,
                    SHIFT: tl.constexpr, TILE: tl.constexpr):
    """smallest, over a row of logits, in quarters: each reading of the chunks that reach above low takes two bits off
    the interval. COUNT: the mass of a token is 1. SHIFT: low bits of a key that say nothing."""
    kind: tl.constexpr = tl.int32 if COUNT else tl.int64
    while high - low > 1:
        # Three thresholds cut the interval into quarters.
        step = tl.maximum((high - low) >> 2, 1)
        t1, t2, t3 = low + step, tl.minimum(low + 2 * step, high), tl.minimum(low + 3 * step, high)
        above1, above2, above3 = (tl.zeros((CHUNK,), kind), tl.zeros((CHUNK,), kind), tl.zeros((CHUNK,), kind))
        for first in range(0, chunks, TILE):
            c = first + tl.arange(0, TILE)
            # Chunks whose largest logit is at low or under it have nothing above any threshold.
            chunk_top = tl.load(tops_at + c, c < chunks, float("-inf"))
            reaches = (order_key(chunk_top) >> SHIFT) > low
            if tl.max(reaches.to(tl.int32), 0) > 0:
                v = c[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
                x = adjusted(row, v, reaches[:, None] & (v < vocab))
                if COUNT:
                    mass = (x > float("-inf")).to(tl.int32)
                else:
                    w = weight(x, chunk_top[:, None], scale, float("-inf"))
                    mass = (w * weight(chunk_top, top, scale, float("-inf"))[:, None] * FIXED_POINT).to(tl.int64)
                # The mass above each threshold.
                key = order_key(x) >> SHIFT
                above1 += tl.sum(tl.where(key > t1, mass, 0), 0)
                above2 += tl.sum(tl.where(key > t2, mass, 0), 0)
                above3 += tl.sum(tl.where(key > t3, mass, 0), 0)
        # The quarter in which the mass above falls below the limit.
        less1 = tl.sum(above1, 0).to(tl.float64) < limit
        less2 = tl.sum(above2, 0).to(tl.float64) < limit
        less3 = tl.sum(above3, 0).to(tl.float64) < limit
        high = tl.where(less1, t1, tl.where(less2, t2, tl.where(less3, t3, high)))
        low = tl.where(less1, low, tl.where(less2, t1, tl.where(less3, t2, t3)))
    return high


@triton.jit
def kept_sums(row, tops_at, sums_at, scale, cut, vocab, chunks, CHUNKS: tl.constexpr, TILE: tl.constexpr):
    """Chunks' sums of the weights that are not cut, also stored; chunks below the cut are not read."""
    tl.debug_barrier()  # the sums that are there have been read
    for first in range(0, chunks, TILE):
        c = first + tl.arange(0, TILE)
        chunk_top = tl.load(tops_at + c, c < chunks, float("-inf"))
        reaches, sums = chunk_top >= cut, tl.zeros((TILE,), tl.float32)
        if tl.max(reaches.to(tl.int32), 0) > 0:
            v = c[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
            x = adjusted(row, v, reaches[:, None] & (v < vocab))
            sums = tl.sum(tree_sum(weight(x, chunk_top[:, None], scale, cut)), 1)
        tl.store(sums_at + c, sums, c < chunks)
    tl.debug_barrier()  # and those stored now are there for every thread
    c = tl.arange(0, CHUNKS)
    return tl.load(sums_at + c, c < chunks, 0.0)


@triton.jit
def filtered(row, tops_at, sums_at, tops, sums, top, temp, top_k, top_p, min_p, vocab, chunks, SHIFT: tl.constexpr,
             CHUNKS: tl.constexpr, TILE: tl.constexpr):
    """The row's cut, minus infinity for none, and its chunks' sums above it. Filters are this request's, or None."""
    cut, high = tl.full((), float("-inf"), tl.float32), (order_key(top) >> SHIFT).to(tl.int64)
    scale = scale_of(temp)
    # min-p is a logit below the largest.
    if min_p is not None:
        cut = tl.where(min_p > 0, tl.minimum(top + temp * tl.log(min_p), top), cut)
    # top-k is the k-th largest logit.
    if top_k is not None:  # noqa: SIM102
        if (top_k > 0) & (top_k < vocab):
            # The k-th largest of the chunks' tops is at most the row's k-th largest logit.
            low = smallest(order_key(tops) >> SHIFT, tl.full((CHUNKS,), 1, tl.int32), top_k,
                           high * 0 + (LOWEST >> SHIFT), high) - 1
            key = smallest_in_row(row, tops_at, top, scale, top_k, low, high, vocab, chunks, True, SHIFT, TILE)
            cut = tl.maximum(cut, of_key(key, SHIFT))
    # The sums of what is left, which top-p is a share of.
    if (min_p is not None) or (top_k is not None):  # noqa: SIM102
        if cut > float("-inf"):
            sums = kept_sums(row, tops_at, sums_at, scale, cut, vocab, chunks, CHUNKS, TILE)
    # top-p is the logit above which the mass falls below the share.
    if top_p is not None:  # noqa: SIM102
        if top_p < 1:
            total = tl.sum(masses(sums, tops, top, scale), 0).to(tl.float64)
            # All V logits at this one, or below, are too few to matter, by a factor of four.
            spare = (total * (2.0**-40)).to(tl.float32) * (1.0 - top_p) / (4.0 * vocab)
            low = tl.maximum(order_key(cut), order_key(top + temp * tl.log(spare))) >> SHIFT
            key = smallest_in_row(row, tops_at, top, scale, top_p.to(tl.float64) * total,
                                  tl.minimum(low.to(tl.int64), high) - 1, high, vocab, chunks, False, SHIFT, TILE)
            cut = tl.maximum(cut, of_key(key, SHIFT))
            sums = kept_sums(row, tops_at, sums_at, scale, cut, vocab, chunks, CHUNKS, TILE)
    return cut, sums


@triton.jit
def of_key(key, SHIFT: tl.constexpr):
    """The lowest float32 of a key without its SHIFT low bits, or minus infinity where that is a NaN's."""
    value = of_order_key((key << SHIFT).to(tl.int32))
    return tl.where(value == value, value, float("-inf"))
