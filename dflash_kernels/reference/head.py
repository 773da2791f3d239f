"""The language-model head fused with argmax."""

import torch

from . import linear as _linear
from ._wide import wide


def lm_head_argmax(x, weight, bias, out_features, num_valid, scale, softcap, id_offset, out_ids, out_values):
    logits = torch.empty(x.shape[0], out_features, dtype=wide(x).dtype, device=x.device)
    _linear.linear(x, weight, bias, out_features, logits)
    logits = logits[:, :num_valid] * scale
    if softcap > 0:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.to(x.dtype)
    ids = logits.argmax(-1)
    out_values.copy_(logits.gather(-1, ids[:, None])[:, 0])
    out_ids.copy_(ids + id_offset)


def merge_argmax(values, ids, out_ids, out_values):
    value, best = values[0], ids[0]
    for other, found in zip(values[1:], ids[1:], strict=True):
        tied = (other == value) | (other.isnan() & value.isnan())
        wins = (other > value) | (other.isnan() & ~value.isnan()) | (tied & (found < best))
        value, best = torch.where(wins, other, value), torch.where(wins, found, best)
    out_ids.copy_(best)
    out_values.copy_(value)
