"""The LM head fused with argmax or top-k. No logits are stored.

    logit(r, v) = round(cap * tanh(scale * (x W^T + bias) / cap)),   ids[r] = argmax over v < num_valid

A logit is rounded to x's dtype before it is compared, as it is when an engine stores logits. So the answer is
`linear(x, W).argmax(-1)` exactly, ties included: the first index wins, and NaN is above everything.

Where each device has a shard of the vocabulary, every shard gives an id and a value per row, and `combine_argmax` picks
by the same rule. `lm_head_topk` gives the first k in that order and the log-sum-exp of all logits, from which the
probability of each follows.
"""

import torch

from .. import reference
from .._library import define
from ..limits import FLOAT32_MAX, MAX_K, check_k
from ..storage import PackedWeight
from ._checks import Checker, describe
from .linear import weight_of

_lm_head_argmax_check = Checker("lm_head_argmax")
_combine_argmax_check = Checker("combine_argmax")
_lm_head_topk_check = Checker("lm_head_topk")
_combine_topk_check = Checker("combine_topk")


def lm_head_argmax(x: torch.Tensor, weight: torch.Tensor | PackedWeight, *, bias: torch.Tensor | None = None,
                   num_valid: int | None = None, scale: float = 1.0, softcap: float = 0.0, id_offset: int = 0,
                   out_ids: torch.Tensor | None = None, out_values: torch.Tensor | None = None,
                   out_lse: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The most likely token of each row, and its logit.

    Parameters
    ----------
    x : (..., H) float32, bfloat16 or float16
        Last dimension contiguous, rows at any one stride.
    weight : PackedWeight, or (V, H) dtype of x
        A PackedWeight has x's dtype, 8 bits or blocks. A tensor needs a contiguous last dimension and is slower.
    bias : (V,) dtype of x, optional
        Contiguous.
    num_valid : int, optional
        Rows of the head from this one on are padding and never win. None: V.
    scale : float
        Factor of the logits, applied before softcap.
    softcap : float
        Cap: a logit becomes softcap * tanh(logit / softcap). 0: none.
    id_offset : int
        Added to the ids: the id of a vocabulary shard's first row.
    out_ids : (...) int64, optional
        Written. Contiguous.
    out_values : (...) float32, optional
        Written. Contiguous.
    out_lse : (...) float32, optional
        Written if given, in the same pass over the weight: the natural log-sum-exp of the row's logits, as
        `lm_head_topk` gives it. exp(values - lse) is the probability of ids. Contiguous.

    Returns
    -------
    ids : (...) int64
    values : (...) float32

    Raises
    ------
    TypeError
        Wrong dtype.
    ValueError
        Wrong shape, layout, device or number.

    Notes
    -----
    Graph-safe. Source: reference/lm_head.py; the tie rule is that of torch.argmax.

    Cost: `w * V * H + T * (e * H + 12)` bytes. Launches on a GPU: 2.

    With out_lse it is `lm_head_topk` with k = 1, in kernels too.

    Replaces `_greedy_sample` of vLLM's DFlash proposer and SGLang's `_DflashDraftSampler`.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels import lm_head_argmax
    >>> head = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
    >>> ids, values = lm_head_argmax(torch.eye(2), head)
    >>> ids.tolist(), values.tolist()
    ([2, 1], [3.0, 2.0])
    """
    check = _lm_head_argmax_check
    data, scales, number, n = weight_of(check, x, weight, bias)
    options = _check_logits(check, n, num_valid, scale, softcap, id_offset)
    ids = check.contiguous_output("out_ids", out_ids, x, x.shape[:-1], torch.int64)
    values = check.contiguous_output("out_values", out_values, x, x.shape[:-1], torch.float32)
    if out_lse is not None:
        lse = check.contiguous_output("out_lse", out_lse, x, x.shape[:-1], torch.float32)
        _lm_head_topk(check.as_rows("x", x), data, scales, number, bias, n, *options, ids.view(-1, 1),
                      values.view(-1, 1), lse.view(-1))
        return ids, values
    _lm_head_argmax(check.as_rows("x", x), data, scales, number, bias, n, *options, ids.view(-1), values.view(-1))
    return ids, values


def _check_logits(check, rows, num_valid, scale, softcap, id_offset):
    """(num_valid, scale, softcap, id_offset) of a head of `rows` rows, as the schemas take them."""
    num_valid = rows if num_valid is None else check.integer("num_valid", num_valid, 1)
    id_offset = check.integer("id_offset", id_offset, 0)
    scale, softcap = check.number("scale", scale), check.number("softcap", softcap)
    if num_valid > rows:
        raise ValueError(f"{check.op}: num_valid must be between 1 and {rows}; got {num_valid}")
    if not 0 <= softcap <= FLOAT32_MAX:
        raise ValueError(f"{check.op}: softcap must be 0 (none) or positive, and finite; got {softcap}")
    return num_valid, scale, softcap, id_offset


_lm_head_argmax = define(
    "lm_head_argmax(Tensor x, Tensor weight, Tensor? scales, int format, Tensor? bias, int out_features,"
    " int num_valid, float scale, float softcap, int id_offset, Tensor(a!) out_ids, Tensor(b!) out_values) -> ()",
    reference.lm_head.lm_head_argmax,
)


def combine_argmax(values: torch.Tensor, ids: torch.Tensor, *, out_ids: torch.Tensor | None = None,
                 out_values: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The most likely token of each row, from the winners of S vocabulary shards.

    Parameters
    ----------
    values : (S, R) float32
        Values that `lm_head_argmax` returned for each shard, in any order of shards. Contiguous.
    ids : (S, R) int64
        Its ids, with each shard's id_offset included. Contiguous.
    out_ids : (R,) int64, optional
        Written. Contiguous.
    out_values : (R,) float32, optional
        Written. Contiguous.

    Returns
    -------
    ids : (R,) int64
        Id of the largest value in each column. NaN is above everything, and of equal values the lowest id wins.
    values : (R,) float32

    Raises
    ------
    TypeError
        Wrong dtype.
    ValueError
        Wrong shape, layout or device.

    Notes
    -----
    Graph-safe. Source: reference/lm_head.py; the tie rule is that of torch.argmax over the whole vocabulary.

    Cost: `12 * R * (S + 1)` bytes. Launches on a GPU: 1.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels import combine_argmax
    >>> values = torch.tensor([[1.0, 4.0], [2.0, 4.0]])
    >>> ids, values = combine_argmax(values, torch.tensor([[10, 11], [70, 71]]))
    >>> ids.tolist(), values.tolist()
    ([70, 11], [2.0, 4.0])
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


def lm_head_topk(x: torch.Tensor, weight: torch.Tensor | PackedWeight, k: int, *, bias: torch.Tensor | None = None,
                 num_valid: int | None = None, scale: float = 1.0, softcap: float = 0.0, id_offset: int = 0,
                 out_ids: torch.Tensor | None = None, out_values: torch.Tensor | None = None,
                 out_lse: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k most likely tokens of each row, their logits, and the log-sum-exp of all the row's logits.

    Parameters
    ----------
    x : (..., H) float32, bfloat16 or float16
        Last dimension contiguous, rows at any one stride.
    weight, bias, num_valid, scale, softcap, id_offset
        As for `lm_head_argmax`.
    k : int
        1 to 64, and at most num_valid.
    out_ids : (..., k) int64, optional
        Written. Contiguous.
    out_values : (..., k) float32, optional
        Written. Contiguous.
    out_lse : (...) float32, optional
        Written. Contiguous.

    Returns
    -------
    ids : (..., k) int64
        In the order of values. Of equal values the lowest id comes first.
    values : (..., k) float32
        NaN first, then descending.
    lse : (...) float32
        Natural logarithm, over the rounded logits below num_valid. NaN if one of them is NaN.

    Raises
    ------
    TypeError
        Wrong dtype.
    ValueError
        Wrong shape, layout, device or number.

    Notes
    -----
    Graph-safe. Source: reference/lm_head.py.

    Cost: `w * V * H + T * (e * H + 12 * k + 4)` bytes. Launches on a GPU: 2.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels import lm_head_topk
    >>> head = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
    >>> ids, values, lse = lm_head_topk(torch.eye(2), head, 2)
    >>> ids.tolist(), values.tolist()
    ([[2, 0], [1, 2]], [[3.0, 1.0], [2.0, 1.0]])
    >>> probabilities = (values - lse[:, None]).exp()
    >>> [round(p, 3) for p in probabilities[0].tolist()]
    [0.844, 0.114]
    """
    check = _lm_head_topk_check
    data, scales, number, n = weight_of(check, x, weight, bias)
    options, k = _check_logits(check, n, num_valid, scale, softcap, id_offset), check.integer("k", k, 1)
    check_k(check.op, k, min(MAX_K, options[0]))
    shape = (*x.shape[:-1], k)
    ids = check.contiguous_output("out_ids", out_ids, x, shape, torch.int64)
    values = check.contiguous_output("out_values", out_values, x, shape, torch.float32)
    lse = check.contiguous_output("out_lse", out_lse, x, shape[:-1], torch.float32)
    _lm_head_topk(check.as_rows("x", x), data, scales, number, bias, n, *options, ids.view(-1, k), values.view(-1, k),
                  lse.view(-1))
    return ids, values, lse


_lm_head_topk = define(
    "lm_head_topk(Tensor x, Tensor weight, Tensor? scales, int format, Tensor? bias, int out_features, int num_valid,"
    " float scale, float softcap, int id_offset, Tensor(a!) out_ids, Tensor(b!) out_values, Tensor(c!) out_lse) -> ()",
    reference.lm_head.lm_head_topk,
)


def combine_topk(values: torch.Tensor, ids: torch.Tensor, lse: torch.Tensor, *, out_ids: torch.Tensor | None = None,
               out_values: torch.Tensor | None = None, out_lse: torch.Tensor | None = None,
               ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k most likely tokens of each row, from those of S vocabulary shards.

    Parameters
    ----------
    values : (S, R, k) float32
        Values that `lm_head_topk` returned for each shard, in any order of shards. Contiguous.
    ids : (S, R, k) int64
        Its ids, with each shard's id_offset included. Contiguous.
    lse : (S, R) float32
        Its log-sum-exps. Contiguous.
    out_ids : (R, k) int64, optional
        Written. Contiguous.
    out_values : (R, k) float32, optional
        Written. Contiguous.
    out_lse : (R,) float32, optional
        Written. Contiguous.

    Returns
    -------
    ids : (R, k) int64
        In the order of `lm_head_topk` over the whole vocabulary.
    values : (R, k) float32
    lse : (R,) float32

    Raises
    ------
    TypeError
        Wrong dtype.
    ValueError
        Wrong shape, layout or device.

    Notes
    -----
    Graph-safe. Source: reference/lm_head.py.

    Cost: `R * (S + 1) * (12 * k + 4)` bytes. Launches on a GPU: 1.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels import combine_topk
    >>> values = torch.tensor([[[5.0, 1.0]], [[4.0, 3.0]]])
    >>> ids, values, lse = combine_topk(values, torch.tensor([[[7, 2]], [[64, 70]]]), torch.zeros(2, 1))
    >>> ids.tolist(), values.tolist()
    ([[7, 64]], [[5.0, 4.0]])
    """
    check = _combine_topk_check
    check.contiguous("values", values, torch.float32, "(S, R, k)", (None,) * 3)
    (shards, rows, k), device = values.shape, values.device
    check.contiguous("ids", ids, torch.int64, "(S, R, k)", values.shape, device)
    check.contiguous("lse", lse, torch.float32, "(S, R)", (shards, rows), device)
    check_k(check.op, k)
    if shards < 1:
        raise ValueError(f"{check.op}: values must have at least one shard; got {describe(values)}")
    out_ids = check.contiguous_output("out_ids", out_ids, values, (rows, k), torch.int64)
    out_values = check.contiguous_output("out_values", out_values, values, (rows, k))
    out_lse = check.contiguous_output("out_lse", out_lse, values, (rows,))
    _combine_topk(values, ids, lse, out_ids, out_values, out_lse)
    return out_ids, out_values, out_lse


_combine_topk = define("combine_topk(Tensor values, Tensor ids, Tensor lse, Tensor(a!) out_ids, Tensor(b!) out_values,"
                     " Tensor(c!) out_lse) -> ()", reference.lm_head.combine_topk)
