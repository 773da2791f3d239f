"""verify_sample: B * Q * V * itemsize bytes of logits are read once from memory, and the floor is that over the read
bandwidth; the bytes of adjustments and of a dense q are added where there are some. 4 operations a logit.

    1  chunks_kernel    every chunk's largest logit and sum of exponentials; 16 bytes for 1024 logits are written
       (again for the logits of a proposal)
    2  rows_kernel      a row: sum, cut of its filters, p and q of its draft, or the token that its u gives
    3  residual_kernel  only where q is dense: every chunk's sum of (share * p - q)+
    4  accept_kernel    a request: accepted length, and the token after it out of one chunk

Rows after the first rejection are in launches 1 and 2 like the others: at that time nobody knows which they are, and
one launch over all rows is shorter than Q after each other. They cost V * itemsize bytes a row. Launch 3 reads
(itemsize + 4) V bytes for one row of each request by rule "token", for all by rule "block". Padded rows are not read.

Launch 2 reads no logits again without filters, but for one chunk. With a filter, one program reads the chunks of its
row that may hold the cut, from the second-level cache: two bits of the cut a reading, of 32 (float32, adjusted logits)
or 16 (bfloat16), fewer by what bounds the cut; some 5 readings for top-p of bfloat16 logits, and one for the sum of
what is left. min-p needs the last one only. That is longer than launch 1 and does not grow with the batch until rows
outnumber multiprocessors. None of this is measured.
sample_draft: 24 bytes a candidate; the launch is its floor.
Configurations are compiled without a GPU as tools/aot/launched.py launches them.
"""

import torch
import triton
import triton.language as tl

from .._constants import CHUNK_SUMS
from ._math import NO_SPILLS, PLAIN, order_key, tree_sum
from .sample_accept import (
    PROPOSAL,
    PX,
    QX,
    STATS,
    TARGET,
    TOKEN,
    accept_kernel,
    residual_kernel,
    store_distribution,
    width_of,
)
from .sample_distribution import (
    CHUNK,
    DRAFT,
    FIXED_POINT,
    GREEDY,
    SAMPLE,
    Distribution,
    Proposal,
    Row,
    adjusted,
    argmax,
    draw,
    filtered,
    masses,
    pick,
    probability,
    reciprocal_of,
    scale_of,
    smallest,
    temperature_of,
    uniform,
    weight,
)

# (chunks that a program reads at a time, warps). Estimated: 16 to 32 logits a thread.
CONFIGS = {"chunks": (4, 8), "rows": (4, 8), "residual": (2, 8), "accept": (1, 4), "draft": (1, 1)}
KEY_SHIFT = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}  # low bits of a float32 that are always 0


@triton.jit(do_not_specialize=["block", "columns", "plane", "first"])
def chunks_kernel(logits, seen, penalty, bias, bitmask, temperature, block_lens, planes,
                  l_b, l_i, s_b, s_i, b_b, b_i, m_b, m_i,
                  block, columns, vocab, chunks, plane, first, RAGGED: tl.constexpr, TILE: tl.constexpr):
    """planes: from `first` on tops, and `plane` elements on, sums. Of chunks with nothing to draw, and of greedy
    requests, the sum is instead how many NaN there are. The last block - columns live rows of a block have no logits.
    """
    b, i = (tl.program_id(0) // columns).to(tl.int64), (tl.program_id(0) % columns).to(tl.int64)
    if i < width_of(b, block_lens, block, RAGGED) - (block - columns):
        # TILE chunks of the row.
        c = tl.program_id(1) * TILE + tl.arange(0, TILE)
        v = c[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
        row = Row(logits, seen, penalty, bias, bitmask, l_b, l_i, s_b, s_i, b_b, b_i, m_b, m_i, b, i)
        x = adjusted(row, v, v < vocab)
        # Each chunk's largest logit, and whether there is something to draw.
        temp = temperature_of(temperature, b)
        top = tl.max(tl.where(x > float("-inf"), x, float("-inf")), 1)
        drawn = tl.where(temp < GREEDY, float("-inf"), top) > float("-inf")
        w = weight(x, top[:, None], scale_of(temp), float("-inf"))
        # One sum for both: Triton 3.6 makes a second reduction that meets this one spill 16 KB a thread.
        total = tl.sum(tree_sum(tl.where(drawn[:, None], w, (x != x).to(tl.float32))), 1)
        # Where launch 2 finds the two numbers of a chunk.
        to = planes + first + (b * block + i) * chunks + c
        tl.store(to, top, c < chunks)
        tl.store(to + plane, total, c < chunks)


@triton.jit
def _draft(x, distribution, greedy, row, proposal, stats, tops_at, plane, k, vocab, chunks, CHUNKS: tl.constexpr,
           K: tl.constexpr):
    """Stores p and q of a row's draft x, and the distribution of the proposal's logits."""
    # p, from the draft's own logit and its chunk's largest.
    valid = (x >= 0) & (x < vocab)
    v = tl.where(valid, x, 0).to(tl.int32)
    px = probability(adjusted(row, v, valid), v, tl.load(tops_at + v // CHUNK), distribution)
    # q: a candidate's, a row's, or out of the proposal's logits, which have planes of their own.
    n, d = tl.arange(0, K), proposal
    if d.candidates is not None:
        ids = tl.load(d.candidates + d.b * d.c_b + d.i * d.c_i + n, n < k, -1)
        q = tl.load(d.probs + d.b * d.p_b + d.i * d.p_i + n, n < k, 0.0)
        qx = tl.sum(tl.where(ids == x, q, 0.0), 0)
    elif d.probs is not None:
        qx = tl.load(d.probs + d.b * d.p_b + d.i * d.p_i + v)
    else:
        c, q_tops, scale = tl.arange(0, CHUNKS), tops_at + 2 * plane, distribution.scale
        tops = tl.load(q_tops + c, c < chunks, float("-inf"))
        sums = tl.load(q_tops + plane + c, c < chunks, 0.0)
        top = tl.max(tops, 0)
        q_row = Row(d.logits, None, None, None, None, d.d_b, d.d_i, 0, 0, 0, 0, 0, 0, d.b, d.i)
        only, reciprocal = tl.full((), -1, tl.int32), tl.full((), 0.0, tl.float32)
        if greedy | (top == float("-inf")):
            only = argmax(q_row, tops, sums, vocab, CHUNKS)
        else:
            reciprocal = reciprocal_of(masses(sums, tops, top, scale))
        uncut = Distribution(top, scale, tl.full((), float("-inf"), tl.float32), reciprocal, only)
        store_distribution(stats + PROPOSAL, uncut)
        qx = probability(adjusted(q_row, v, valid), v, tl.load(q_tops + v // CHUNK), uncut)
    tl.store(stats + PX, tl.where(valid, px, 0.0))
    tl.store(stats + QX, tl.where(valid, qx, 0.0))


@triton.jit(do_not_specialize=["x_b", "block", "plane"])
def rows_kernel(logits, seen, penalty, bias, bitmask,
                draft_ids, context_lens, temperature, seeds, top_k, top_p, min_p,
                probs, candidates, draft_logits, block_lens, planes, stats,
                l_b, l_i, s_b, s_i, b_b, b_i, m_b, m_i, x_b, p_b, p_i, c_b, c_i, d_b, d_i,
                block, vocab, chunks, k, plane, RAGGED: tl.constexpr, SHIFT: tl.constexpr, CHUNKS: tl.constexpr,
                K: tl.constexpr, TILE: tl.constexpr):
    b, i = (tl.program_id(0) // block).to(tl.int64), (tl.program_id(0) % block).to(tl.int64)
    width = width_of(b, block_lens, block, RAGGED)
    if i < width:
        # What launch 1 found of the row's chunks.
        tops_at, stats = planes + (b * block + i) * chunks, stats + (b * block + i) * STATS
        row = Row(logits, seen, penalty, bias, bitmask, l_b, l_i, s_b, s_i, b_b, b_i, m_b, m_i, b, i)
        c = tl.arange(0, CHUNKS)
        tops = tl.load(tops_at + c, c < chunks, float("-inf"))
        sums = tl.load(tops_at + plane + c, c < chunks, 0.0)
        top, temp = tl.max(tops, 0), temperature_of(temperature, b)
        # The distribution: one token for a greedy request, or where nothing is usable; or a cut, and the sum above it.
        greedy, temp = temp < GREEDY, tl.maximum(temp, GREEDY)
        scale, cut = scale_of(temp), tl.full((), float("-inf"), tl.float32)
        only, reciprocal = tl.full((), -1, tl.int32), tl.full((), 0.0, tl.float32)
        token = only
        if greedy | (top == float("-inf")):
            only = argmax(row, tops, sums, vocab, CHUNKS)
            token = only
        else:
            own_k, own_p, floor = top_k, top_p, min_p
            if top_k is not None:
                own_k = tl.load(top_k + b)
            if top_p is not None:
                own_p = tl.load(top_p + b)
            if min_p is not None:
                floor = tl.load(min_p + b)
            cut, sums = filtered(row, tops_at, tops_at + plane, tops, sums, top, temp, own_k, own_p, floor, vocab,
                                 chunks, SHIFT, CHUNKS, TILE)
            mass = masses(sums, tops, top, scale)
            reciprocal = reciprocal_of(mass)
            # Drafts that are one-hot need no p: the row's own token is compared with them.
            if (probs is None) and (draft_logits is None):
                u = uniform(tl.load(seeds + b), tl.load(context_lens + b) + 1 + i, SAMPLE, i * 0)
                token = draw(row, tops_at, mass, scale, cut, u, vocab)
        if (probs is None) and (draft_logits is None):
            tl.store(stats + TOKEN, token.to(tl.float32, bitcast=True))
        else:
            found = Distribution(top, scale, cut, reciprocal, only)
            store_distribution(stats + TARGET, found)
            if i + 1 < width:
                proposal = Proposal(candidates, probs, draft_logits, c_b, c_i, p_b, p_i, d_b, d_i, b, i)
                _draft(tl.load(draft_ids + b * x_b + i + 1), found, greedy, row, proposal, stats, tops_at, plane, k,
                       vocab, chunks, CHUNKS, K)


@triton.jit
def drawn(x, n, k, b, i, context_lens, temperature, seeds, top_k, top_p, min_p):
    """Draft i of request b out of its candidates' logits x (K,), of which k are there: the place of one, and the
    distribution that it was drawn from, float64. n: 0 to K - 1."""
    temp = temperature_of(temperature, b)
    top = tl.max(tl.where(x > float("-inf"), x, float("-inf")), 0)
    place = tl.full((), 0, tl.int32)
    # Greedy: the first NaN, or else the first of the largest.
    if (temp < GREEDY) | (top == float("-inf")):
        place = first_largest(x, n, top)
        p = (n == place).to(tl.float64)
    else:
        # Weights of the candidates, and the filters as in a row, over the candidates alone.
        w = tl.where(x == top, 1.0, tl.exp((x.to(tl.float64) - top) / temp.to(tl.float64)))
        w = tl.where(x > float("-inf"), w, 0.0)
        if min_p is not None:
            w = tl.where((w >= tl.load(min_p + b).to(tl.float64)) | (x == top), w, 0.0)
        key, high = order_key(x), order_key(top).to(tl.int64)
        low = tl.min(tl.where(x > float("-inf"), key, 0x7FFFFFFF), 0).to(tl.int64) - 1
        if top_k is not None:
            kept = tl.load(top_k + b)
            if (kept > 0) & (kept < k):
                w = tl.where(key >= smallest(key, (x > float("-inf")).to(tl.int32), kept, low, high), w, 0.0)
        if top_p is not None:
            share = tl.load(top_p + b)
            if share < 1:
                mass = (w * FIXED_POINT).to(tl.int64)
                limit = share.to(tl.float64) * tl.sum(mass, 0).to(tl.float64)
                w = tl.where(key >= smallest(key, mass, limit, low, high), w, 0.0)
        # One candidate, by the request's random number for this position.
        start = tl.load(context_lens + b)
        place, _ = pick((w * FIXED_POINT).to(tl.int64), uniform(tl.load(seeds + b), start + 1 + i, DRAFT, start))
        p = w / tl.sum(tree_sum(w[None, :]), 1)
    return place, p


@triton.jit
def first_largest(x, n, top):
    """The place of the first NaN, or else of the first that is `top`."""
    has_nan = tl.max((x != x).to(tl.int32), 0) > 0
    return tl.min(tl.where(tl.where(has_nan, x != x, x == top), n, x.shape[0] - 1), 0)


@triton.jit(do_not_specialize=["slots", "o_b"])
def sample_draft_kernel(values, ids, context_lens, temperature, seeds, top_k, top_p, min_p, out_ids, out_probs, slots,
                        k, o_b, K: tl.constexpr):
    b, i = (tl.program_id(0) // slots).to(tl.int64), tl.program_id(0) % slots
    at, n = (b * slots + i) * k, tl.arange(0, K)
    x = tl.load(values + at + n, n < k, float("-inf"))
    place, p = drawn(x, n, k, b, i, context_lens, temperature, seeds, top_k, top_p, min_p)
    tl.store(out_ids + b * o_b + i, tl.load(ids + at + place))
    tl.store(out_probs + at + n, p.to(tl.float32), n < k)


def _strides(*tensors):
    return [s for t in tensors for s in ((0, 0) if t is None else t.stride()[:2])]


def verify_sample(draft_ids, logits, context_lens, temperature, seeds, top_k, top_p, min_p, draft_probs,
                  draft_candidates, draft_logits, seen, repetition_penalty, bias, bitmask, block_lens, block_rule,
                  accept_lens, commit_lens, tokens, bonus, new_lens, workspace):
    requests, block, vocab = logits.shape
    if not requests:
        return
    rows, chunks, ragged = requests * block, triton.cdiv(vocab, CHUNK.value), block_lens is not None
    plane, stats = rows * chunks, workspace[CHUNK_SUMS * rows * chunks:]
    k = 1 if draft_candidates is None else draft_candidates.shape[2]
    raw, strides = (logits, seen, repetition_penalty, bias, bitmask), _strides(logits, seen, bias, bitmask)
    proposal = (draft_probs, draft_candidates, draft_logits)
    p_strides, c_strides, d_strides = (_strides(t) for t in proposal)
    shift = KEY_SHIFT[logits.dtype] if seen is None and bias is None else 0
    every = triton.next_power_of_2(chunks)
    sizes = {name: (min(tile, every), warps) for name, (tile, warps) in CONFIGS.items()}

    tile, warps = sizes["chunks"]
    chunks_kernel[rows, triton.cdiv(chunks, tile)](
        *raw, temperature, block_lens, workspace, *strides, block, block, vocab, chunks, plane, 0, RAGGED=ragged,
        TILE=tile, num_warps=warps, **PLAIN)
    if draft_logits is not None and block > 1:
        chunks_kernel[rows - requests, triton.cdiv(chunks, tile)](
            draft_logits, None, None, None, None, temperature, block_lens, workspace, *d_strides, *(0,) * 6, block,
            block - 1, vocab, chunks, plane, 2 * plane, RAGGED=ragged, TILE=tile, num_warps=warps, **PLAIN)
    tile, warps = sizes["rows"]
    rows_kernel[rows,](
        *raw, draft_ids, context_lens, temperature, seeds, top_k, top_p, min_p, *proposal, block_lens, workspace, stats,
        *strides, draft_ids.stride(0), *p_strides, *c_strides, *d_strides, block, vocab, chunks, k, plane,
        RAGGED=ragged, SHIFT=shift, CHUNKS=every, K=triton.next_power_of_2(k), TILE=tile, num_warps=warps, **NO_SPILLS)
    constants = {"RAGGED": ragged, "BLOCK_RULE": block_rule, "BLOCK": triton.next_power_of_2(block)}
    if draft_candidates is None and (draft_probs is not None or draft_logits is not None) and block > 1:
        tile, warps = sizes["residual"]
        residual_kernel[rows - requests, triton.cdiv(chunks, tile)](
            *raw, context_lens, seeds, draft_probs, draft_logits, block_lens, workspace, stats, *strides, *p_strides,
            *d_strides, block, vocab, chunks, plane, **constants, TILE=tile, num_warps=warps, **PLAIN)
    accept_kernel[requests,](
        *raw, draft_ids, context_lens, seeds, *proposal, block_lens, workspace, stats, accept_lens, commit_lens, tokens,
        bonus, new_lens, *strides, draft_ids.stride(0), *p_strides, *c_strides, *d_strides, tokens.stride(0), block,
        vocab, chunks, k, plane, **constants, CHUNKS=every, num_warps=sizes["accept"][1], **NO_SPILLS)


def sample_draft(values, ids, context_lens, temperature, seeds, top_k, top_p, min_p, out_ids, out_probs):
    requests, slots, k = values.shape
    if requests * slots:
        sample_draft_kernel[requests * slots,](
            values, ids, context_lens, temperature, seeds, top_k, top_p, min_p, out_ids, out_probs, slots, k,
            out_ids.stride(0), K=triton.next_power_of_2(k), num_warps=CONFIGS["draft"][1], **PLAIN)
