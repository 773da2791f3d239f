"""select_candidates: itemsize * (K + 2) * R bytes of the codebooks and of hidden, and 12 K + 12 of candidates and
drafts, move for a slot of K candidates: 9 KB with 16 of them and R = 256 in bfloat16. A slot waits for the choice
before it, so that the floor is one read from memory a slot, that of the chosen token's row of the predecessor codebook.

A program walks one request's block. The candidates of a slot are known before its predecessor is: their products come
chunk by chunk of R, each in registers of its own, and are summed once at the end.
Configurations are compiled without a GPU as tools/aot/launched.py launches them.
"""

import triton
import triton.language as tl

from ._math import NO_SPILLS, exp, tree_sum
from .sample import drawn, first_largest

CONFIGS = {16: (64, 4), 64: (32, 8)}  # most candidates: (numbers of R at a time, warps). Estimated: 8 a thread.


@triton.jit(do_not_specialize=["slots", "a_b", "o_b"])
def select_candidates_kernel(values, ids, hidden, anchors, predecessor, successor, context_lens, temperature, seeds,
                             top_k, top_p, min_p, out_ids, out_logprobs, out_probs, slots, k, rank, vocab, a_b, o_b,
                             K: tl.constexpr, CHUNK: tl.constexpr):
    b, n = tl.program_id(0).to(tl.int64), tl.arange(0, K)
    dtype: tl.constexpr = predecessor.dtype.element_ty
    before = tl.load(anchors + b * a_b)
    for i in range(slots):
        at = (b * slots + i) * k
        own = tl.load(ids + at + n, n < k, -1)
        inside, known = (own >= 0) & (own < vocab), (before >= 0) & (before < vocab)
        # Products of the predecessor's row and hidden, rounded, with the candidates' rows.
        products = tl.zeros((K, CHUNK), tl.float32)
        for start in range(0, rank, CHUNK):
            r = start + tl.arange(0, CHUNK)
            step = tl.load(predecessor + before * rank + r, tl.where(known, r < rank, False), 0.0).to(tl.float32)
            if hidden is not None:
                h = tl.load(hidden + (b * slots + i) * rank + r, r < rank, 0.0).to(tl.float32)
                step = (step * h).to(dtype).to(tl.float32)
            rows = tl.load(successor + own[:, None] * rank + r[None, :], inside[:, None] & (r < rank)[None, :], 0.0)
            products += step[None, :] * rows.to(tl.float32)
        fit = tl.sum(tree_sum(products), 1).to(dtype).to(tl.float32)
        x = tl.load(values + at + n, n < k, float("-inf")) + fit
        # One of them, and its share at temperature 1.
        top = tl.max(tl.where(x > float("-inf"), x, float("-inf")), 0)
        if temperature is None:
            place = first_largest(x, n, top)
        else:
            place, p = drawn(x, n, k, b, i, context_lens, temperature, seeds, top_k, top_p, min_p)
            tl.store(out_probs + at + n, p.to(tl.float32), n < k)
        weights = tl.where(x == float("-inf"), 0.0, exp(x - top))
        chosen = tl.sum(tl.where(n == place, x, 0.0), 0)
        total = tl.sum(tree_sum(weights[None, :]), 1)
        tl.store(out_logprobs + b * slots + i + tl.arange(0, 1), (chosen - top) - tl.log(total))
        before = tl.sum(tl.where(n == place, own, 0), 0)
        tl.store(out_ids + b * o_b + i, before)


def select_candidates(values, ids, hidden, anchor_ids, predecessor, successor, context_lens, temperature, seeds, top_k,
                      top_p, min_p, out_ids, out_logprobs, out_probs):
    requests, slots, k = values.shape
    if not requests * slots:
        return
    chunk, warps = next(config for most, config in CONFIGS.items() if k <= most)
    select_candidates_kernel[requests,](
        values, ids, hidden, anchor_ids, predecessor, successor, context_lens, temperature, seeds, top_k, top_p, min_p,
        out_ids, out_logprobs, out_probs, slots, k, predecessor.shape[1], len(predecessor), anchor_ids.stride(0),
        out_ids.stride(0), K=triton.next_power_of_2(k), CHUNK=chunk, num_warps=warps, **NO_SPILLS)
