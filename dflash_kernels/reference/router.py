"""The router of a mixture of experts. Scoring by its number: 0 softmax, 1 sigmoid."""

import torch

from .._constants import TINY
from ._wide import wide


def _largest(x, k):
    """Indices of the k largest, largest first: of equal ones the first, and a NaN before any number."""
    return torch.sort(x, dim=-1, descending=True, stable=True).indices[..., :k]


def route_experts(logits, bias, scoring, groups, top_groups, group_best, normalize, scale, out_ids, out_weights):
    x, k = wide(logits), out_ids.shape[1]
    scores = torch.sigmoid(x) if scoring else torch.softmax(x, -1)
    # Without a bias and sums the order is that of the logits, which no rounding has made equal.
    alone = top_groups == groups or group_best == 1
    choice = scores + wide(bias) if bias is not None else x if alone else scores
    if top_groups < groups:
        grouped = choice.unflatten(-1, (groups, -1))
        best = grouped.gather(-1, _largest(grouped, group_best)).sum(-1)
        left_out = torch.ones_like(best, dtype=torch.bool).scatter(-1, _largest(best, top_groups), False)
        # Behind all others, also behind experts at -inf, and in order among themselves.
        inside = torch.sort(left_out.repeat_interleave(grouped.shape[-1], -1), dim=-1, stable=True)
        order = inside.indices[..., :top_groups * grouped.shape[-1]]
        ids = order.gather(-1, _largest(choice.gather(-1, order), k))
    else:
        ids = _largest(choice, k)
    if normalize and not scoring:
        weights = torch.softmax(x.gather(-1, ids), -1)
    else:
        weights = scores.gather(-1, ids)
        if normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + TINY)
    out_ids.copy_(ids)
    out_weights.copy_(weights * scale)
