"""The language-model head fused with argmax or top-K."""

import torch

from . import linear as _linear
from ._wide import wide


def _logits(x, weight, scales, format, bias, out_features, num_valid, scale, softcap):
    logits = torch.empty(x.shape[0], out_features, dtype=wide(x).dtype, device=x.device)
    _linear.linear(x, weight, scales, format, bias, out_features, logits)
    logits = logits[:, :num_valid] * scale
    if softcap > 0:
        logits = torch.tanh(logits / softcap) * softcap
    return logits.to(x.dtype)


def lm_head_argmax(x, weight, scales, format, bias, out_features, num_valid, scale, softcap, id_offset, out_ids,
                   out_values):
    logits = _logits(x, weight, scales, format, bias, out_features, num_valid, scale, softcap)
    ids = logits.argmax(-1)
    out_values.copy_(logits.gather(-1, ids[:, None])[:, 0])
    out_ids.copy_(ids + id_offset)


def lm_head_topk(x, weight, scales, format, bias, out_features, num_valid, scale, softcap, id_offset, out_ids,
                 out_values, out_lse):
    logits = wide(_logits(x, weight, scales, format, bias, out_features, num_valid, scale, softcap))
    _first(logits, torch.arange(num_valid, device=x.device).expand_as(logits) + id_offset, out_ids, out_values)
    out_lse.copy_(logits.logsumexp(-1))


def _first(values, ids, out_ids, out_values):
    """The first k of each row of values (R, n) in torch.argmax's order."""
    order = ids.argsort(dim=-1)
    values, ids = values.gather(-1, order), ids.gather(-1, order)
    order = torch.where(values.isnan(), torch.inf, values).argsort(dim=-1, descending=True, stable=True)
    nan = values.gather(-1, order).isnan()
    order = order.gather(-1, (~nan).long().argsort(dim=-1, stable=True))[:, :out_ids.shape[-1]]
    out_ids.copy_(ids.gather(-1, order))
    out_values.copy_(values.gather(-1, order))


def combine_argmax(values, ids, out_ids, out_values):
    value, best = values[0], ids[0]
    for other, found in zip(values[1:], ids[1:], strict=True):
        tied = (other == value) | (other.isnan() & value.isnan())
        wins = (other > value) | (other.isnan() & ~value.isnan()) | (tied & (found < best))
        value, best = torch.where(wins, other, value), torch.where(wins, found, best)
    out_ids.copy_(best)
    out_values.copy_(value)


def combine_topk(values, ids, lse, out_ids, out_values, out_lse):
    _first(values.transpose(0, 1).flatten(1), ids.transpose(0, 1).flatten(1), out_ids, out_values)
    out_lse.copy_(lse.logsumexp(0))
