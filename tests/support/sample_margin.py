"""Whether a sampled verification is right in exact arithmetic, up to a margin.

A kernel adds in float32 and float64 in an order of its own, so its token may differ from the reference's, but only
where the random number lies within rounding of a boundary. These functions take a request's outcome apart, decision by
decision, and ask of each whether float64 distributions allow it with the random number moved by no more than MARGIN; a
filter's boundary may move by as much.
"""

import torch

from dflash_kernels import reference, verify_sample
from dflash_kernels.types import LogitAdjustments, Proposal, Verified

distribution = reference.sample
MARGIN = 1e-6
FIELDS = ("accept_lens", "commit_lens", "tokens", "bonus", "new_lens")
PARAMS = ("temperature", "seeds", "top_k", "top_p", "min_p")
ADJUSTMENTS = ("seen", "repetition_penalty", "bias", "bitmask")


def from_reference(draft, logits, lens, params, proposal=None, adjustments=None, rule="token", block_lens=None):
    b, q = draft.shape
    ints = [torch.full((b,), -7, dtype=torch.int32) for _ in range(3)]
    out = Verified(ints[0], ints[1], torch.full((b, q), -7), torch.full((b,), -7), ints[2])
    proposal, adjustments = proposal or Proposal(), adjustments or LogitAdjustments()
    distribution.verify_sample(draft, logits, lens, *(getattr(params, n) for n in PARAMS), proposal.probs, proposal.ids,
                      proposal.logits, *(getattr(adjustments, n) for n in ADJUSTMENTS), block_lens, rule == "block",
                      *(getattr(out, f) for f in FIELDS), None)
    return out


def one(record, b):
    """A record's tensors for request b alone."""
    return None if record is None else type(record)(**{n: None if t is None else t[b:b + 1]
                                                       for n, t in vars(record).items()})


def agree(draft, logits, lens, params, proposal=None, adjustments=None, rule="token", block_lens=None, **more) -> int:
    """Runs the op and the reference. A request that differs must be one that the margin explains; how many did."""
    got = verify_sample(draft, logits, lens, params, proposal=proposal, adjustments=adjustments, rule=rule,
                        block_lens=block_lens, **more)
    want = from_reference(draft, logits, lens, params, proposal, adjustments, rule, block_lens)
    differ = torch.stack([(getattr(got, f) != getattr(want, f)).view(len(lens), -1).any(1) for f in FIELDS]).any(0)
    for b in differ.nonzero()[:, 0].tolist():
        widths = draft.shape[1] if block_lens is None else min(int(block_lens[b]), draft.shape[1])
        wrong = objection(draft[b:b + 1], logits[b:b + 1], lens[b:b + 1], one(params, b), one(proposal, b),
                          one(adjustments, b), rule, widths, one(got, b))
        assert not wrong, f"request {b}: {wrong}; {one(got, b)} instead of {one(want, b)}"
    return int(differ.sum())


def drawn(weights, token, u) -> bool:
    """token could be the draw from weights (V,) with u, or one within MARGIN of it."""
    total = weights.sum()
    below, own = weights[:token].sum(), weights[token]
    slack = MARGIN * max(1.0, 1.0 / float(total))
    return bool(own > 0) and float(below / total) - slack <= u <= float((below + own) / total) + slack


def distributions(x, params):
    """The request's distributions (Q, V), with filters as they are and moved by MARGIN either way."""
    found = []
    for moved in (0.0, -MARGIN, MARGIN):
        shares = {n: None if getattr(params, n) is None else getattr(params, n).double() * (1 + moved)
                  for n in ("top_p", "min_p")}
        if shares["top_p"] is not None and bool(params.top_p >= 1):
            shares["top_p"] = params.top_p
        found.append(distribution.distribution(x, params.temperature, params.top_k, **shares)[0])
    return found


def objection(draft, logits, lens, params, proposal, adjustments, rule, width, got):
    """What is wrong with request `got` beyond the margin, or None. Everything is of one request, B = 1."""
    a, n = int(got.accept_lens), width - 1
    last, tokens = int(got.bonus), got.tokens[0].tolist()
    if width <= 0:
        return None if (a, int(got.commit_lens), last) == (0, 0, -1) else "a padded request commits"
    ended = [i for i, x in enumerate(draft[0, :width].tolist()) if i and not 0 <= x < logits.shape[-1]]
    width, n = (ended[0], ended[0] - 1) if ended else (width, n)
    if tokens != draft[0, 1:a + 1].tolist() + [last] + [-1] * (draft.shape[1] - a - 1):
        return "tokens are not the accepted drafts and the last one"
    if int(got.commit_lens) != a + 1 or int(got.new_lens) != int(lens) + a + 1 or a > n:
        return "lengths do not fit"
    adjustments = adjustments or LogitAdjustments()
    x = distribution.adjusted(logits, *(getattr(adjustments, f) for f in ADJUSTMENTS))[:, :width]
    rows = distributions(x, params)
    start = lens[:, None].long()
    positions = start + 1 + torch.arange(width)
    sample = distribution.uniform(params.seeds, positions, distribution.SAMPLE)[0].tolist()
    one_hot = proposal is None or float(params.temperature) < distribution.GREEDY
    if one_hot:
        wrong = [i for i in range(a + 1) if not any(drawn(p[i], tokens[i], sample[i]) for p in rows)]
        return f"row {wrong[0]} does not give {tokens[wrong[0]]}" if wrong else None
    q = distribution.proposal(draft[:, :width], logits.shape[-1], proposal.probs, proposal.ids, proposal.logits,
                     params.temperature)[0]
    accept = distribution.uniform(params.seeds, positions, distribution.ACCEPT, start)[0].tolist()
    check = _by_block if rule == "block" else _by_token
    if not any(check(p, q, draft[0, 1:].tolist(), accept, a, n, last, sample[a]) for p in rows):
        return f"{rule}: accepted {a}, last {last}"
    return None


def _last(p, q, a, n, last, u, share):
    left = (share * p[a] - q[a]).clamp_min(0) if a < n else p[a]
    return drawn(left, last, u) or (float(left.sum()) < MARGIN and drawn(p[a], last, u))


def _px_qx(p, q, i, x):
    return float(p[i, x]), float(q[i, x])


def _by_token(p, q, x, u, a, n, last, sample):
    for i in range(min(a + 1, n)):
        px, qx = _px_qx(p, q, i, x[i])
        if (u[i] * qx >= px + MARGIN) if i < a else (u[i] * qx < px - MARGIN):
            return False
    return _last(p, q, a, n, last, sample, 1.0)


def _by_block(p, q, x, u, a, n, last, sample):
    kept = share = 1.0
    for i in range(1, n + 1):
        px, qx = _px_qx(p, q, i - 1, x[i - 1])
        kept = min(1.0, kept * (px / qx if qx > 0 else float("inf") if px > 0 else 0.0)) if kept > 0 else 0.0
        odds, slack = kept, MARGIN
        if i < n and kept < 1:
            left = float((kept * p[i] - q[i]).clamp_min(0).sum())
            odds, slack = left / (left + 1 - kept), MARGIN / (left + 1 - kept)
        if (i == a and u[i - 1] >= odds + slack) or (i > a and u[i - 1] < odds - slack):
            return False
        share = kept if i == a else share
    return _last(p, q, a, n, last, sample, share)
