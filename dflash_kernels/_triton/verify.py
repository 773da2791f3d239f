"""verify_greedy: from ids, 16 bytes a token and the launch is the floor; from logits, B * Q * V * itemsize bytes are
read once, and the floor is that over the read bandwidth.

From logits there are two launches: few long rows fill the chip only in parts, and a part's winner has to wait for the
others. They meet in 8 bytes a part that are allocated for the call, from the graph's own pool when it is captured.
Configurations are compiled without a GPU as tools/aot/launched.py launches them.
"""

import torch
import triton
import triton.language as tl

from ._math import order_key

CONFIGS = {"ids": 1, "logits": (4096, 8)}  # warps; (logits a program reads at a time, warps). Estimated.
PROGRAMS = 528  # rows are cut into parts until there are so many: four for each multiprocessor of an H100. Estimated.
LAST = tl.constexpr(0x7FFFFFFF)


@triton.jit(do_not_specialize=["block", "parts"])
def argmax_parts_kernel(logits, block_lens, keys, outer_stride, row_stride, block, vocab, part, parts,
                        RAGGED: tl.constexpr, BLOCK: tl.constexpr):
    """Each part's winner as a key that orders as torch.argmax does: NaN above all, then the value, then lower ids."""
    row = tl.program_id(0).to(tl.int64)
    b, i = row // block, row % block
    live = i >= 0
    if RAGGED:
        live = i < tl.load(block_lens + b)
    if live:
        # This program's part of the row; every lane keeps the best of its columns, the first of equal ones.
        start = tl.program_id(1) * part
        stop = tl.minimum(start + part, vocab)
        lanes = tl.arange(0, BLOCK)
        source = logits + b * outer_stride + i * row_stride
        best = tl.load(source + start + lanes, start + lanes < stop, float("-inf")).to(tl.float32)
        best_id = start + lanes
        for first in range(start + BLOCK, stop, BLOCK):
            x = tl.load(source + first + lanes, first + lanes < stop, float("-inf")).to(tl.float32)
            wins = (x > best) | ((x != x) & (best == best))
            best = tl.where(wins, x, best)
            best_id = tl.where(wins, first + lanes, best_id)
        # The part's winner: the value's order above the id, counted downwards.
        key = (order_key(best).to(tl.int64) << 32) | (best_id ^ LAST).to(tl.int64)
        tl.store(keys + row * parts + tl.program_id(1), tl.max(key, axis=0))


@triton.jit(do_not_specialize=["draft_stride", "target_stride", "tokens_stride", "block", "parts"])
def verify_kernel(draft_ids, target_ids, keys, context_lens, block_lens,
                  accept_lens, commit_lens, tokens, bonus, new_lens,
                  draft_stride, target_stride, tokens_stride, block, parts,
                  RAGGED: tl.constexpr, FROM_KEYS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    width = block
    if RAGGED:
        width = tl.minimum(tl.maximum(tl.load(block_lens + b), 0), block)
    # The target's own token of each row: the best of its parts, or as given.
    i = tl.arange(0, BLOCK)
    if FROM_KEYS:
        p = tl.arange(0, PARTS)[None, :]
        key = tl.load(keys + (b * block + i[:, None]) * parts + p, (i[:, None] < width) & (p < parts), -(1 << 63))
        target = (tl.max(key, axis=1) & LAST) ^ LAST
    else:
        target = tl.load(target_ids + b * target_stride + i, i < width, -1)
    # Drafts are accepted up to the first that is not the target's token; that one follows them.
    drafted = tl.load(draft_ids + b * draft_stride + i + 1, i + 1 < width, -1)
    stops = (drafted < 0) | (drafted != target)  # what is past the block is -1
    accept = tl.min(tl.where(stops, i, BLOCK), axis=0)
    commit = tl.where(width > 0, accept + 1, 0)
    tl.store(tokens + b * tokens_stride + i, tl.where(i < commit, target, -1), i < block)
    tl.store(bonus + b, tl.where(width > 0, tl.sum(tl.where(i == accept, target, 0), axis=0), -1))
    tl.store(accept_lens + b, tl.where(width > 0, accept, 0))
    tl.store(commit_lens + b, commit)
    tl.store(new_lens + b, tl.load(context_lens + b) + commit)


def _parts(rows: int, vocab: int) -> tuple[int, int]:
    """Length and number of the parts of a row."""
    tile = CONFIGS["logits"][0]  # type: ignore[index]
    wanted = min(triton.cdiv(PROGRAMS, rows), triton.cdiv(vocab, tile))
    part = triton.cdiv(triton.cdiv(vocab, wanted), tile) * tile
    return part, triton.cdiv(vocab, part)


def verify_greedy(draft_ids, target_ids, logits, context_lens, block_lens, accept_lens, commit_lens, tokens, bonus,
                  new_lens):
    requests, block = draft_ids.shape
    if not requests:
        return
    keys, parts = None, 1
    if target_ids is None:
        part, parts = _parts(requests * block, logits.shape[2])
        keys = torch.empty(requests * block * parts, dtype=torch.int64, device=logits.device)
        tile, warps = CONFIGS["logits"]
        argmax_parts_kernel[requests * block, parts](logits, block_lens, keys, *logits.stride()[:2], block,
                                                     logits.shape[2], part, parts, RAGGED=block_lens is not None,
                                                     BLOCK=tile, num_warps=warps)
    verify_kernel[requests,](
        draft_ids, target_ids, keys, context_lens, block_lens, accept_lens, commit_lens, tokens, bonus, new_lens,
        draft_ids.stride(0), 0 if target_ids is None else target_ids.stride(0), tokens.stride(0), block, parts,
        RAGGED=block_lens is not None, FROM_KEYS=keys is not None, BLOCK=triton.next_power_of_2(block),
        PARTS=triton.next_power_of_2(parts), num_warps=CONFIGS["ids"])
