"""The selector and the Markov head, over all K * K edges between the candidates of neighbouring positions."""

import torch

from .._constants import DRAFT
from ._wide import wide
from .sample import distribution, draw, uniform


def _rows(table, ids):
    """table[ids], zeros for an id outside."""
    inside = (ids >= 0) & (ids < len(table))
    return torch.where(inside[..., None], wide(table)[ids.clamp(0, len(table) - 1)], 0.0)


def edges(values, ids, hidden, anchor_ids, predecessor, successor):
    """The score of candidate c behind candidate p of the position before, (B, n, K, K) by p and c. Behind the anchor,
    all p are the same."""
    def rounded(x):
        return wide(x.to(predecessor.dtype))

    before = torch.cat((anchor_ids[:, None, None].expand_as(ids[:, :1]), ids[:, :-1]), 1)
    step = _rows(predecessor, before)
    step = step if hidden is None else rounded(step * wide(hidden)[:, :, None])
    return wide(values)[:, :, None] + rounded(step @ _rows(successor, ids).transpose(-1, -2))


def select_candidates(values, ids, hidden, anchor_ids, predecessor, successor, context_lens, temperature, seeds, top_k,
                      top_p, min_p, out_ids, out_logprobs, out_probs):
    every = edges(values, ids, hidden, anchor_ids, predecessor, successor)
    starts, place = context_lens[:, None].long(), torch.zeros_like(anchor_ids)
    for i in range(values.shape[1]):
        scores = every[:, i].gather(1, place[:, None, None].expand(-1, 1, values.shape[2]))
        if temperature is None:
            place = scores[:, 0].argmax(-1)
        else:
            p = distribution(scores, temperature, top_k, top_p, min_p)
            place = draw(p, uniform(seeds, starts + 1 + i, DRAFT, starts))[:, 0]
            out_probs[:, i].copy_(p[:, 0])
        out_ids[:, i].copy_(ids[:, i].gather(1, place[:, None])[:, 0])
        out_logprobs[:, i].copy_(scores[:, 0].log_softmax(-1).gather(1, place[:, None])[:, 0])
