"""The language-model head fused with argmax or top-K: no logits in memory.

    logit(r, v) = round(cap * tanh(scale * (x W^T + bias) / cap)),   ids[r] = argmax over v < num_valid

The logit is rounded to the model dtype before it is compared, as it is when an engine stores logits, so the answer is
`linear(x, W).argmax(-1)` exactly, ties included: the first index wins, and NaN is above everything. Where each device
has a shard of the vocabulary, every shard gives an id and a value a row, and `combine_argmax` picks by the same rule.
lm_head_topk gives the K first in that order and the log-sum-exp of all, from which the probability of each follows.
"""

import torch

from .. import reference
from .._library import define
from ..types import PackedWeight
from ._checks import Checker, describe
from .linear import weight_of

_lm_head_argmax_check = Checker("lm_head_argmax")
_combine_argmax_check = Checker("combine_argmax")
_lm_head_topk_check = Checker("lm_head_topk")
_combine_topk_check = Checker("combine_topk")


def lm_head_argmax(x: torch.Tensor, weight: torch.Tensor | PackedWeight, *, bias: torch.Tensor | None = None,
                   num_valid: int | None = None, scale: float = 1.0, softcap: float = 0.0, id_offset: int = 0,
                   out_ids: torch.Tensor | None = None, out_values: torch.Tensor | None = None,
                   ) -> tuple[torch.Tensor, torch.Tensor]:
    """The most likely token of each row, and its logit.

    x (..., H): float32, bfloat16 or float16, last dimension contiguous, rows at any one stride.
    weight: a PackedWeight of the (V, H) head, of x's dtype or in 8 bits, or the (V, H) tensor itself (slower).
    bias (V,): dtype of x, or None.
    num_valid: rows of the head from this one on are padding and never win. Default V.
    scale, softcap: logit <- cap * tanh(scale * logit / cap); softcap 0 means none. Multiplier first, then the cap.
    id_offset: added to the ids: the first row's id of a vocabulary shard.
    out_ids (...): int64, contiguous. out_values (...): float32, contiguous. Allocated when None.

    Returns (ids, values). Raises TypeError for a dtype, ValueError for a shape, layout or device. Graph-safe.
    Source: reference/head.py; the tie rule is torch.argmax's.
    """
    check = _lm_head_argmax_check
    data, scales, n = weight_of(check, x, weight, bias)
    options = _check_logits(check, n, num_valid, scale, softcap, id_offset)
    ids = check.contiguous_output("out_ids", out_ids, x, x.shape[:-1], torch.int64)
    values = check.contiguous_output("out_values", out_values, x, x.shape[:-1], torch.float32)
    _lm_head_argmax(check.as_rows("x", x), data, scales, bias, n, *options, ids.view(-1), values.view(-1))
    return ids, values


def _check_logits(check, rows, num_valid, scale, softcap, id_offset):
    """(num_valid, scale, softcap, id_offset) of a head of `rows` rows, as the schemas take them."""
    num_valid = rows if num_valid is None else check.integer("num_valid", num_valid, 1)
    id_offset = check.integer("id_offset", id_offset, 0)
    scale, softcap = check.number("scale", scale), check.number("softcap", softcap)
    if num_valid > rows:
        raise ValueError(f"{check.op}: num_valid must be between 1 and {rows}; got {num_valid}")
    if not softcap >= 0:
        raise ValueError(f"{check.op}: softcap must be 0 (none) or positive; got {softcap}")
    return num_valid, scale, softcap, id_offset


_lm_head_argmax = define(
    "lm_head_argmax(Tensor x, Tensor weight, Tensor? scales, Tensor? bias, int out_features, int num_valid,"
    " float scale, float softcap, int id_offset, Tensor(a!) out_ids, Tensor(b!) out_values) -> ()",
    reference.lm_head.lm_head_argmax,
)


def combine_argmax(values: torch.Tensor, ids: torch.Tensor, *, out_ids: torch.Tensor | None = None,
                 out_values: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The most likely token of each row, from the winners of S shards of the vocabulary.

    values (S, R): float32, contiguous: what lm_head_argmax gave for each shard, shards in any order.
    ids (S, R): int64, contiguous, with each shard's id_offset already in them.
    out_ids (R,): int64, contiguous. out_values (R,): float32, contiguous. Allocated when None.

    Returns (ids, values): the largest value of each column, NaN above everything, and of equal ones that with the
    lowest id. Raises TypeError for a dtype, ValueError for a shape, layout or device. Graph-safe.
    Source: reference/head.py; the tie rule is torch.argmax's over the whole vocabulary.
    """
    check = _combine_argmax_check
    check.contiguous("values", values, torch.float32, "(S, R)", (None, None))
    check.contiguous("ids", ids, torch.int64, "(S, R)", values.shape, values.device)
    if values.shape[0] == 0:
        raise ValueError(f"{check.op}: values must have at least one shard; got {describe(values)}")
    rows = values.shape[1:]
    out_ids = check.contiguous_output("out_ids", out_ids, values, rows, torch.int64)
    out_values = check.contiguous_output("out_values", out_values, values, rows, torch.float32)
    _combine_argmax(values, ids, out_ids, out_values)
    return out_ids, out_values


_combine_argmax = define("combine_argmax(Tensor values, Tensor ids, Tensor(a!) out_ids, Tensor(b!) out_values) -> ()",
                       reference.lm_head.combine_argmax)


MAX_K = 64


def lm_head_topk(x: torch.Tensor, weight: torch.Tensor | PackedWeight, k: int, *, bias: torch.Tensor | None = None,
                 num_valid: int | None = None, scale: float = 1.0, softcap: float = 0.0, id_offset: int = 0,
                 out_ids: torch.Tensor | None = None, out_values: torch.Tensor | None = None,
                 out_lse: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k most likely tokens of each row, their logits, and the log-sum-exp of the row's logits.

    x, weight, bias, num_valid, scale, softcap, id_offset: as for lm_head_argmax. k: 1 to 64, at most num_valid.
    out_ids (..., k): int64, contiguous. out_values (..., k): float32, contiguous. out_lse (...): float32, contiguous.
        Allocated when None.

    Returns (ids, values, lse), ids in the order of values: NaN first, then falling, of equal ones the lowest id first.
    lse is natural, over the rounded logits below num_valid; NaN where one of them is. Raises TypeError for a dtype,
    ValueError for a shape, layout or device. Graph-safe. Source: reference/head.py.
    """
    check = _lm_head_topk_check
    data, scales, n = weight_of(check, x, weight, bias)
    options, k = _check_logits(check, n, num_valid, scale, softcap, id_offset), check.integer("k", k, 1)
    if k > (most := min(MAX_K, options[0])):
        raise ValueError(f"{check.op}: k must be between 1 and {most}; got {k}")
    shape = (*x.shape[:-1], k)
    ids = check.contiguous_output("out_ids", out_ids, x, shape, torch.int64)
    values = check.contiguous_output("out_values", out_values, x, shape, torch.float32)
    lse = check.contiguous_output("out_lse", out_lse, x, shape[:-1], torch.float32)
    _lm_head_topk(check.as_rows("x", x), data, scales, bias, n, *options, ids.view(-1, k), values.view(-1, k),
                  lse.view(-1))
    return ids, values, lse


_lm_head_topk = define(
    "lm_head_topk(Tensor x, Tensor weight, Tensor? scales, Tensor? bias, int out_features, int num_valid, float scale,"
    " float softcap, int id_offset, Tensor(a!) out_ids, Tensor(b!) out_values, Tensor(c!) out_lse) -> ()",
    reference.lm_head.lm_head_topk,
)


def combine_topk(values: torch.Tensor, ids: torch.Tensor, lse: torch.Tensor, *, out_ids: torch.Tensor | None = None,
               out_values: torch.Tensor | None = None, out_lse: torch.Tensor | None = None,
               ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k most likely tokens of each row, from those of S shards of the vocabulary.

    values (S, R, k): float32, ids (S, R, k): int64, lse (S, R): float32, contiguous: what lm_head_topk gave for each
        shard, with its id_offset; shards in any order.
    out_ids (R, k): int64. out_values (R, k): float32. out_lse (R,): float32. Contiguous; allocated when None.

    Returns (ids, values, lse) as lm_head_topk over the whole vocabulary does. Raises TypeError for a dtype, ValueError
    for a shape, layout or device. Graph-safe. Source: reference/head.py.
    """
    check = _combine_topk_check
    check.contiguous("values", values, torch.float32, "(S, R, k)", (None,) * 3)
    (shards, rows, k), device = values.shape, values.device
    check.contiguous("ids", ids, torch.int64, "(S, R, k)", values.shape, device)
    check.contiguous("lse", lse, torch.float32, "(S, R)", (shards, rows), device)
    if shards < 1 or not 1 <= k <= MAX_K:
        raise ValueError(f"{check.op}: values must have at least one shard and 1 to {MAX_K} candidates; "
                         f"got {describe(values)}")
    out_ids = check.contiguous_output("out_ids", out_ids, values, (rows, k), torch.int64)
    out_values = check.contiguous_output("out_values", out_values, values, (rows, k))
    out_lse = check.contiguous_output("out_lse", out_lse, values, (rows,))
    _combine_topk(values, ids, lse, out_ids, out_values, out_lse)
    return out_ids, out_values, out_lse


_combine_topk = define("combine_topk(Tensor values, Tensor ids, Tensor lse, Tensor(a!) out_ids, Tensor(b!) out_values,"
                     " Tensor(c!) out_lse) -> ()", reference.lm_head.combine_topk)
