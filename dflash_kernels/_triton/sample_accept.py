"""The last two launches of verify_sample: how many drafts of a request are accepted, and the token after them."""

import triton
import triton.language as tl

from .._constants import ROW_STATS
from ._math import tree_sum
from .sample_distribution import (
    ACCEPT,
    CHUNK,
    SAMPLE,
    Distribution,
    Proposal,
    Row,
    adjusted,
    masses,
    pick,
    pick_weight,
    probability,
    uniform,
    weight,
)

# Numbers of a row in the workspace: the target's and the proposal's distribution, the draft's p and q, the u's token.
STATS = tl.constexpr(ROW_STATS)
TARGET, PROPOSAL, PX, QX, TOKEN = (tl.constexpr(i) for i in (0, 5, 10, 11, 12))
RESIDUAL_POINT = tl.constexpr(2.0**50)  # a residual sums to 1 at most
CANDIDATES = tl.constexpr(2)  # of a sparse proposal at a time: four spill on sm_100


@triton.jit
def width_of(b, block_lens, block, RAGGED: tl.constexpr):
    width = block + b.to(tl.int32) * 0
    if RAGGED:
        width = tl.minimum(tl.maximum(tl.load(block_lens + b), 0), block)
    return width


@triton.jit
def store_distribution(stats, distribution):
    tl.store(stats, distribution.top)
    tl.store(stats + 1, distribution.scale)
    tl.store(stats + 2, distribution.cut)
    tl.store(stats + 3, distribution.reciprocal)
    tl.store(stats + 4, distribution.only.to(tl.int32).to(tl.float32, bitcast=True))


@triton.jit
def load_distribution(stats):
    return Distribution(tl.load(stats), tl.load(stats + 1), tl.load(stats + 2), tl.load(stats + 3),
                        tl.load(stats + 4).to(tl.int32, bitcast=True))


@triton.jit
def accepted(stats, seed, start, drafts, BLOCK: tl.constexpr):
    """By rule "token": how many drafts of a request, whose rows begin at stats."""
    i = tl.arange(0, BLOCK)
    px = tl.load(stats + i * STATS + PX, i < drafts, 0.0).to(tl.float64)
    qx = tl.load(stats + i * STATS + QX, i < drafts, 1.0).to(tl.float64)
    passes = (uniform(seed, start + 1 + i, ACCEPT, start) * qx < px) & (i < drafts)
    return tl.min(tl.where(passes, BLOCK, i), 0)


@triton.jit
def kept(share, stats):
    """The share of the target's mass after one more draft (Sun et al., arXiv 2403.10444, algorithm 2)."""
    px, qx = tl.load(stats + PX).to(tl.float64), tl.load(stats + QX).to(tl.float64)
    grown = tl.where(share * px >= qx, 1.0, share * px / tl.where(qx > 0, qx, 1.0))
    return tl.where((share > 0) & (px > 0), grown, 0.0)


@triton.jit(do_not_specialize=["block", "plane"])
def residual_kernel(logits, seen, penalty, bias, bitmask,
                    context_lens, seeds, probs, draft_logits, block_lens, planes, stats,
                    l_b, l_i, s_b, s_i, b_b, b_i, m_b, m_i, p_b, p_i, d_b, d_i, block, vocab, chunks, plane,
                    RAGGED: tl.constexpr, BLOCK_RULE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Sums of (share * p - q)+ of the chunks of the one row where a token may be drawn, or by rule "block" of all."""
    b, i = (tl.program_id(0) // (block - 1)).to(tl.int64), (tl.program_id(0) % (block - 1)).to(tl.int64)
    drafts = width_of(b, block_lens, block, RAGGED) - 1
    if i < drafts:
        stats += b * block * STATS
        # The row whose residual is wanted: the first rejected one, or by rule "block" any, with the share of its mass.
        share = tl.full((), 1.0, tl.float64)
        if BLOCK_RULE:
            wanted = i
            for before in range(0, i):
                share = kept(share, stats + before * STATS)
        else:
            wanted = accepted(stats, tl.load(seeds + b), tl.load(context_lens + b), drafts, BLOCK)
        if wanted == i:
            c = tl.program_id(1) * TILE + tl.arange(0, TILE)
            v = c[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
            row = Row(logits, seen, penalty, bias, bitmask, l_b, l_i, s_b, s_i, b_b, b_i, m_b, m_i, b, i)
            at = planes + (b * block + i) * chunks + c
            # p and q of TILE chunks of tokens, and what p has left.
            top = tl.load(at, c < chunks, float("-inf"))
            p = probability(adjusted(row, v, v < vocab), v, top[:, None], load_distribution(stats + i * STATS + TARGET))
            if probs is not None:
                q = tl.load(probs + b * p_b + i * p_i + v, v < vocab, 0.0)
            else:
                top = tl.load(at + 2 * plane, c < chunks, float("-inf"))
                x = tl.load(draft_logits + b * d_b + i * d_i + v, v < vocab, float("-inf")).to(tl.float32)
                q = probability(x, v, top[:, None], load_distribution(stats + i * STATS + PROPOSAL))
            left = tl.maximum(p * share.to(tl.float32) - q, 0.0)
            tl.store(at + 3 * plane, tl.sum(tree_sum(left), 1), c < chunks)


@triton.jit
def _residual(row, distribution, share, proposal, tops_at, plane, k, vocab, chunks, CHUNKS: tl.constexpr):
    """Integers that are proportional to the sums of (share * p - q)+ of a row's chunks."""
    c = tl.arange(0, CHUNKS)
    if proposal.candidates is not None:
        candidates = proposal.candidates + proposal.b * proposal.c_b + proposal.i * proposal.c_i
        probs = proposal.probs + proposal.b * proposal.p_b + proposal.i * proposal.p_i
        # A chunk's p, of which its candidates' p is taken away; outside them q is 0.
        d = distribution
        sums = tl.load(tops_at + plane + c, c < chunks, 0.0)
        sums *= weight(tl.load(tops_at + c, c < chunks, float("-inf")), d.top, d.scale, float("-inf")) * d.reciprocal
        sums = tl.where(d.only >= 0, (c == d.only // CHUNK).to(tl.float32), sums)
        others, gained = sums, tl.zeros((CHUNKS,), tl.float32)
        for first in range(0, k, CANDIDATES):
            n = first + tl.arange(0, CANDIDATES)
            ids = tl.load(candidates + n, n < k, -1)
            valid = (ids >= 0) & (ids < vocab)
            v = tl.where(valid, ids, 0).to(tl.int32)
            p = probability(adjusted(row, v, valid), v, tl.load(tops_at + v // CHUNK), distribution)
            q = tl.load(probs + n, valid, 0.0)
            here = (v // CHUNK)[None, :] == tl.where(valid[None, :], c[:, None], -1)
            others -= tl.sum(tree_sum(tl.where(here, p[None, :], 0.0)), 1)
            gained += tl.sum(tree_sum(tl.where(here, tl.maximum(p * share - q, 0.0)[None, :], 0.0)), 1)
        # A difference this small is the rounding of a chunk that holds nothing but candidates.
        left = tl.where(others > sums * 2e-6, others * share, 0.0) + gained
    else:
        left = tl.load(tops_at + 3 * plane + c, c < chunks, 0.0)
    return (left * RESIDUAL_POINT).to(tl.int64)


@triton.jit
def _proposed(proposal, v, q_tops, chunk, stats, k, vocab):
    """q of the tokens v of a chunk."""
    d = proposal
    if d.candidates is not None:
        candidates = d.candidates + d.b * d.c_b + d.i * d.c_i
        probs = d.probs + d.b * d.p_b + d.i * d.p_i
        q = tl.zeros((CHUNK,), tl.float32)
        for first in range(0, k, CANDIDATES):
            n = first + tl.arange(0, CANDIDATES)
            ids = tl.load(candidates + n, n < k, -1)
            q += tl.sum(tl.where(ids[None, :] == v[:, None], tl.load(probs + n, n < k, 0.0)[None, :], 0.0), 1)
    elif d.probs is not None:
        q = tl.load(d.probs + d.b * d.p_b + d.i * d.p_i + v, v < vocab, 0.0)
    else:
        x = tl.load(d.logits + d.b * d.d_b + d.i * d.d_i + v, v < vocab, float("-inf")).to(tl.float32)
        q = probability(x, v, tl.load(q_tops + chunk), load_distribution(stats + PROPOSAL))
    return q


@triton.jit
def _last(row, distribution, share, residual, mass, proposal, tops_at, stats, plane, u, k, vocab):
    """The token at u of a row's residual, or of its own distribution; mass are the chunks'."""
    chunk, rest = pick(mass, u)
    v = chunk * CHUNK + tl.arange(0, CHUNK)
    w = probability(adjusted(row, v, v < vocab), v, tl.load(tops_at + chunk), distribution)
    if residual:
        q = _proposed(proposal, v, tops_at + 2 * plane, chunk, stats, k, vocab)
        left = tl.maximum(w * share - q, 0.0)
        w = tl.where(tl.max(left, 0) > 0, left, w)
    return chunk * CHUNK + pick_weight(w, rest)


@triton.jit(do_not_specialize=["x_b", "t_b", "block", "plane"])
def accept_kernel(logits, seen, penalty, bias, bitmask,
                  draft_ids, context_lens, seeds, probs, candidates, draft_logits, block_lens, planes, stats,
                  accept_lens, commit_lens, tokens, bonus, new_lens,
                  l_b, l_i, s_b, s_i, b_b, b_i, m_b, m_i, x_b, p_b, p_i, c_b, c_i, d_b, d_i, t_b,
                  block, vocab, chunks, k, plane,
                  RAGGED: tl.constexpr, BLOCK_RULE: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    width, start = width_of(b, block_lens, block, RAGGED), tl.load(context_lens + b)
    rows, n = b * block, tl.arange(0, BLOCK)
    drafted = tl.load(draft_ids + b * x_b + n + 1, n + 1 < width, -1)
    # A block ends at its first id that is no token: nothing was proposed there.
    drafts = tl.min(tl.where((drafted >= 0) & (drafted < vocab), BLOCK, n), 0)
    accept, last = tl.full((), 0, tl.int32), tl.full((), -1, tl.int32)
    stats += rows * STATS
    # One-hot drafts: accepted while they are the tokens that the rows gave.
    if (probs is None) and (draft_logits is None):
        token = tl.load(stats + n * STATS + TOKEN, n < width, 0.0).to(tl.int32, bitcast=True)
        accept = tl.min(tl.where((drafted == token) & (n < drafts), BLOCK, n), 0)
        last = tl.sum(tl.where(n == accept, token, 0), 0)
    elif width > 0:
        # How many drafts are accepted: the longest block that passes, or one after the other until one fails.
        seed, share = tl.load(seeds + b), tl.full((), 1.0, tl.float64)
        if BLOCK_RULE:
            mass_left = share
            for i in range(1, drafts + 1):
                mass_left = kept(mass_left, stats + (i - 1) * STATS)
                odds = mass_left
                if (i < drafts) & (mass_left < 1.0):
                    row = Row(logits, seen, penalty, bias, bitmask, l_b, l_i, s_b, s_i, b_b, b_i, m_b, m_i, b,
                              b * 0 + i)
                    proposal = Proposal(candidates, probs, draft_logits, c_b, c_i, p_b, p_i, d_b, d_i, b, b * 0 + i)
                    found = _residual(row, load_distribution(stats + i * STATS + TARGET), mass_left.to(tl.float32),
                                      proposal, planes + (rows + i) * chunks, plane, k, vocab, chunks, CHUNKS)
                    left = tl.sum(found, 0).to(tl.float64) / RESIDUAL_POINT
                    odds = left / (left + 1.0 - mass_left)
                if uniform(seed, start + i, ACCEPT, start) < odds:
                    accept, share = accept * 0 + i, mass_left
        else:
            accept = accepted(stats, seed, start, drafts, BLOCK)
        # The token after them, at the first row that is not accepted: out of its residual, or after a whole block
        # out of its distribution.
        stats += accept * STATS
        distribution, tops_at = load_distribution(stats + TARGET), planes + (rows + accept) * chunks
        last = distribution.only
        if last < 0:
            here = accept.to(tl.int64)
            row = Row(logits, seen, penalty, bias, bitmask, l_b, l_i, s_b, s_i, b_b, b_i, m_b, m_i, b, here)
            proposal = Proposal(candidates, probs, draft_logits, c_b, c_i, p_b, p_i, d_b, d_i, b, here)
            c = tl.arange(0, CHUNKS)
            tops = tl.load(tops_at + c, c < chunks, float("-inf"))
            mass = masses(tl.load(tops_at + plane + c, c < chunks, 0.0), tops, distribution.top,
                          distribution.scale)
            residual = accept < drafts
            if residual:
                left = _residual(row, distribution, share.to(tl.float32), proposal, tops_at, plane, k, vocab, chunks,
                                 CHUNKS)
                residual = tl.sum(left, 0) > 0
                mass = tl.where(residual, left, mass)
            u = uniform(seed, start + 1 + accept, SAMPLE, start * 0)
            last = _last(row, distribution, share.to(tl.float32), residual, mass, proposal, tops_at, stats, plane, u,
                         k, vocab)
    # Accepted drafts, the last token, and -1 for the rest.
    commit = tl.where(width > 0, accept + 1, 0)
    emitted = tl.where(n < accept, drafted, last.to(tl.int64))
    tl.store(tokens + b * t_b + n, tl.where(n < commit, emitted, -1), n < block)
    tl.store(bonus + b, tl.where(width > 0, last, -1))
    tl.store(accept_lens + b, tl.where(width > 0, accept, 0))
    tl.store(commit_lens + b, commit)
    tl.store(new_lens + b, start + commit)
