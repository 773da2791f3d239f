"""Sampled verification: the target's distribution, and drafts accepted so that what is emitted follows it.

The distribution p of one row of adjusted logits l, with m = max l and w_v = exp((l_v - m) / temperature):

    min_p:  keep v if w_v >= min_p
    top_k:  of those, keep v if fewer than top_k are larger than l_v
    top_p:  of those, keep v if the mass of the larger ones is < top_p of theirs all
    p_v  =  w_v / sum of the kept w

The most likely is always kept, as with top_p = 0. Equal logits are kept or dropped together, so a row's distribution is
a threshold on its logits, whatever their order.
Greedy rows, and rows where nothing can be drawn, put everything on argmax(l), by torch.argmax's rules. NaN is never
drawn otherwise; +inf takes all.
"""

import math

import torch

from .._constants import ACCEPT, DRAFT, GREEDY, HOTTEST, SAMPLE

_WORD = 0xFFFFFFFF


def _multiply(a: torch.Tensor, constant: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a 32-bit a times a 32-bit constant, without unsigned 64-bit arithmetic."""
    low, high = (a & 0xFFFF) * constant, (a >> 16) * constant
    middle = (low >> 16) + (high & 0xFFFF)
    return (high >> 16) + (middle >> 16), ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(seeds: torch.Tensor, *counter: torch.Tensor) -> torch.Tensor:
    """First word of Philox4x32-10 (Salmon et al. 2011) with key `seeds` and counter (c0, c1, c2, 0), int64 in
    [0, 2**32)."""
    k0, k1 = seeds & _WORD, (seeds >> 32) & _WORD
    c0, c1, c2 = (c & _WORD for c in torch.broadcast_tensors(*counter))
    c3 = torch.zeros_like(c0)
    for _ in range(10):
        (high0, low0), (high1, low1) = _multiply(c0, 0xD2511F53), _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0


def uniform(seeds: torch.Tensor, positions: torch.Tensor, purpose: int, starts: torch.Tensor | None = None):
    """float64 in (0, 1) for the token at `positions` (B, n). SAMPLE's does not depend on where the block starts, as a
    position is decided once; what a later block may ask again, ACCEPT and DRAFT, does: starts (B, 1)."""
    positions = positions.long()
    start = torch.zeros_like(positions) if starts is None else starts.long()
    word = philox(seeds[:, None], positions, torch.full_like(positions, purpose), start)
    return (word.double() + 0.5) / 2**32


def bits(words: torch.Tensor, vocab: int) -> torch.Tensor:
    """(..., ceil(V / 32)) int32 -> (..., V) bool."""
    place = torch.arange(32, device=words.device, dtype=torch.int32)
    return ((words[..., None] >> place) & 1).flatten(-2)[..., :vocab].bool()


def adjusted(logits, seen, repetition_penalty, bias, bitmask) -> torch.Tensor:
    """logits (B, Q, V) after an engine's adjustments, in float32."""
    x, vocab = logits.float(), logits.shape[-1]
    if seen is not None:
        penalty = repetition_penalty[:, None, None]
        x = torch.where(bits(seen, vocab), torch.where(x > 0, x / penalty, x * penalty), x)
    if bias is not None:
        x = x + bias
    return x if bitmask is None else torch.where(bits(bitmask, vocab), x, -math.inf)


def distribution(x, temperature, top_k=None, top_p=None, min_p=None) -> torch.Tensor:
    """The distribution of each row of adjusted logits x (B, n, V), float64; parameters (B,)."""

    def row(t):
        return t.to(torch.float64)[:, None, None]

    usable = ~x.isnan() & (x > -math.inf)
    clean = torch.where(usable, x, -math.inf).double()
    top = clean.amax(-1, keepdim=True)
    temp = row(temperature).clamp_max(HOTTEST)
    w = torch.where(clean == top, 1.0, ((clean - top) / temp.clamp_min(GREEDY)).exp())
    w = torch.where(usable, w, 0.0)
    if min_p is not None:
        w = torch.where((w >= row(min_p)) | (clean == top), w, 0.0)
    if top_k is not None or top_p is not None:
        ordered, order = torch.where(w > 0, clean, -math.inf).sort(dim=-1, descending=True, stable=True)
        larger = torch.searchsorted(-ordered, -ordered)  # how many are larger than each
        mass = w.gather(-1, order)
        if top_k is not None:
            k = torch.where(top_k > 0, top_k.long(), x.shape[-1])[:, None, None]
            mass = torch.where(larger < k, mass, 0.0)
        if top_p is not None:
            above = torch.cat((torch.zeros_like(mass[..., :1]), mass.cumsum(-1)), -1).gather(-1, larger)
            off = row(top_p) >= 1
            mass = torch.where(off | (larger == 0) | (above < row(top_p) * mass.sum(-1, keepdim=True)), mass, 0.0)
        w = torch.zeros_like(w).scatter(-1, order, mass)
    fixed = torch.nn.functional.one_hot(x.argmax(-1), x.shape[-1]).double()
    return torch.where((temp < GREEDY) | ~usable.any(-1, keepdim=True), fixed, w / w.sum(-1, keepdim=True))


def draw(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The first v with weights[0] + ... + weights[v] > u * their sum, for each row (..., V); u (...,)."""
    total = weights.cumsum(-1)
    found = (total <= u[..., None] * total[..., -1:]).sum(-1)
    last = weights.shape[-1] - 1 - (weights.flip(-1) > 0).long().argmax(-1)
    return torch.minimum(found, last)


def proposal(draft_ids, vocab, probs, candidates, draft_logits, temperature):
    """q of each draft (B, Q - 1, V), float64. None of the three: all on the draft itself."""
    b, n = draft_ids.shape[0], draft_ids.shape[1] - 1
    if draft_logits is not None:
        return distribution(draft_logits.float(), temperature)
    if candidates is None and probs is not None:
        return probs.double()
    ids, mass = (draft_ids[:, 1:, None], torch.ones_like(draft_ids[:, 1:, None])) if probs is None else (
        candidates, probs)
    valid = (ids >= 0) & (ids < vocab)
    q = torch.zeros((b, n, vocab), dtype=torch.float64, device=draft_ids.device)
    return q.scatter_add_(-1, ids.clamp(0, vocab - 1), torch.where(valid, mass.double(), 0.0))


def _at(p: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """p (B, n, V) at ids (B, n), 0 for an id outside."""
    inside = (ids >= 0) & (ids < p.shape[-1])
    return torch.where(inside, p.gather(-1, ids.clamp(0, p.shape[-1] - 1)[..., None])[..., 0], 0.0)


def _by_token(px, qx, u, live):
    accept = ((u * qx < px) & live).long().cumprod(1).sum(1)
    return accept, torch.ones_like(accept, dtype=torch.float64)


def _by_block(p, q, px, qx, u, drafts):
    """Block verification (Sun et al., arXiv 2403.10444, algorithm 2): accepted drafts, and the share of the target's
    mass that the last accepted one leaves to its residual. drafts (B,): how many each request has."""
    ratio = torch.where(qx > 0, px / qx, torch.where(px > 0, math.inf, 0.0))
    kept = torch.ones_like(drafts, dtype=torch.float64)
    accept, share = torch.zeros_like(drafts), kept
    for i in range(1, px.shape[1] + 1):
        kept = (kept * ratio[:, i - 1]).clamp_max(1.0)
        last = drafts == i
        if i < px.shape[1]:
            left = (kept[:, None] * p[:, i] - q[:, i]).clamp_min(0.0).sum(-1)
            odds = torch.where(kept >= 1.0, 1.0, left / (left + 1 - kept))
        else:
            odds = kept
        odds = torch.where(last, kept, odds)
        passed = (i <= drafts) & (u[:, i - 1] < odds)
        accept, share = torch.where(passed, i, accept), torch.where(passed, kept, share)
    return accept, share


def verify_sample(draft_ids, logits, context_lens, temperature, seeds, top_k, top_p, min_p, draft_probs,
                  draft_candidates, draft_logits, seen, repetition_penalty, bias, bitmask, block_lens, block_rule,
                  accept_lens, commit_lens, tokens, bonus, new_lens, workspace):
    vocab, width = logits.shape[-1], draft_ids.shape[1]
    i = torch.arange(width, device=draft_ids.device)
    widths = torch.full_like(context_lens, width) if block_lens is None else block_lens.clamp(0, width)
    starts = context_lens[:, None].long()
    positions = starts + 1 + i
    p = distribution(adjusted(logits, seen, repetition_penalty, bias, bitmask), temperature, top_k, top_p, min_p)
    sampled = uniform(seeds, positions, SAMPLE)
    x = draft_ids[:, 1:]
    # A block ends at its first id that is no token: nothing was proposed there.
    live = ((x >= 0) & (x < vocab) & (i[1:] < widths[:, None])).long().cumprod(1).bool()
    if draft_probs is None and draft_logits is None:
        target = draw(p, sampled)
        accept = ((x == target[:, :-1]) & live).long().cumprod(1).sum(1)
        last = target.gather(1, accept[:, None])[:, 0]
    else:
        q = proposal(draft_ids, vocab, draft_probs, draft_candidates, draft_logits, temperature)
        px, qx, u = _at(p, x), _at(q, x), uniform(seeds, positions[:, :-1], ACCEPT, starts)
        drafts = live.sum(1)
        accept, share = _by_block(p, q, px, qx, u, drafts) if block_rule else _by_token(px, qx, u, live)
        where = accept[:, None, None].expand(-1, 1, vocab)
        own = p.gather(1, where)[:, 0]
        padded = torch.cat((q, torch.zeros_like(own)[:, None]), 1)
        left = (share[:, None] * own - padded.gather(1, where)[:, 0]).clamp_min(0.0)
        bonus_row = (accept == drafts) | (left.sum(-1) <= 0)
        last = draw(torch.where(bonus_row[:, None], own, left), sampled.gather(1, accept[:, None])[:, 0])
    alive = widths > 0
    commit = torch.where(alive, accept + 1, 0)
    ahead = torch.cat((x, x[:, :1]), 1) if width > 1 else last[:, None]
    emitted = torch.where(i < accept[:, None], ahead, last[:, None])
    new_tokens = torch.where(i < commit[:, None], emitted, -1)
    bonus.copy_(torch.where(alive, last, -1))
    tokens.copy_(new_tokens)
    accept_lens.copy_(torch.where(alive, accept, 0))
    commit_lens.copy_(commit)
    new_lens.copy_(context_lens + commit)


def sample_draft(values, ids, context_lens, temperature, seeds, top_k, top_p, min_p, out_ids, out_probs):
    starts = context_lens[:, None].long()
    positions = starts + 1 + torch.arange(values.shape[1], device=values.device)
    p = distribution(values, temperature, top_k, top_p, min_p)
    chosen = draw(p, uniform(seeds, positions, DRAFT, starts))
    out_ids.copy_(ids.gather(-1, chosen[..., None])[..., 0])
    out_probs.copy_(p)
