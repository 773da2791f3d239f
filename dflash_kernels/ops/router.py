"""The router of a mixture of experts: which of E experts a row is given to, and with which weights.

    score = softmax(logits) or sigmoid(logits)
    ids = the k experts with the largest score + bias, largest first
    weights = scale * score[ids]                         and of these shares alone with normalize

A bias counts in the choice and not in the weight. With groups, k experts are chosen from the top_groups groups whose
group_best best experts have the largest sum.

| models | arguments |
|---|---|
| Mixtral, Qwen3-MoE with norm_topk_prob, gpt-oss | the defaults |
| Qwen2-MoE, Qwen3-MoE without it | normalize=False |
| MiniMax-M2 | scoring="sigmoid", bias |
| DeepSeek-V3, GLM-4.5 | scoring="sigmoid", bias, groups, top_groups, scale |
| DeepSeek-V2 | groups, top_groups, group_best=1, normalize=False, scale |

The softmax of the chosen logits is what remains of the softmax of all after it is normalized, so that gpt-oss and
Mixtral are one.
"""

import torch

from .. import reference
from .._library import define
from ..limits import MAX_K, check_experts, check_k
from ._checks import FLOATS, Checker, describe

_check = Checker("route_experts")
SCORING = {"softmax": 0, "sigmoid": 1}


def route_experts(logits: torch.Tensor, k: int, *, bias: torch.Tensor | None = None, scoring: str = "softmax",
                  groups: int = 1, top_groups: int = 1, group_best: int = 2, normalize: bool = True,
                  scale: float = 1.0, out_ids: torch.Tensor | None = None, out_weights: torch.Tensor | None = None,
                  ) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses the k experts of each row, and weighs them.

    Parameters
    ----------
    logits : (T, E) float32, bfloat16 or float16
        The router's outputs, E at most 1,024. Last dimension contiguous.
    k : int
        Experts of a row, at most 64.
    bias : (E,) float32, optional
        Added to the scores for the choice alone, as e_score_correction_bias is. Contiguous.
    scoring : {"softmax", "sigmoid"}
        How logits become scores.
    groups : int
        Neighbouring experts form this many groups of one size.
    top_groups : int
        Groups that a row's experts are from.
    group_best : int
        A group is as good as the sum of its 1 or 2 best experts. Not read where top_groups is groups.
    normalize : bool
        Whether a row's weights sum to scale.
    scale : float
        Factor of the weights, such as routed_scaling_factor.
    out_ids : (T, k) int32, optional
        Written. Contiguous.
    out_weights : (T, k) float32, optional
        Written. Contiguous.

    Returns
    -------
    ids : (T, k) int32
        Largest first. Of equal experts the first is chosen, and a NaN before any number. Without a bias and without
        sums of groups logits are compared, which no rounding has made equal.
    weights : (T, k) float32

    Raises
    ------
    TypeError
        Wrong dtype.
    ValueError
        Wrong shape, layout or device; a k that is too large; groups that do not divide E.
    NotImplementedError
        More than 1,024 experts.

    Notes
    -----
    Graph-safe. Source: Shazeer et al. 2017, arXiv 1701.06538, section 2; DeepSeek-AI 2024, arXiv 2412.19437, section
    2.1; reference/router.py. Arithmetic is float32, and a row's bits depend on that row alone. An expert of another
    group is never chosen; transformers gives it a score of 0, which is above a negative one.

    Cost: `T * (e * E + 8 * k)` bytes. Launches on a GPU: 1.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels import route_experts
    >>> ids, weights = route_experts(torch.tensor([[0.0, 3.0, 1.0, 3.0]]), 2)
    >>> ids.tolist(), weights.tolist()
    ([[1, 3]], [[0.5, 0.5]])
    """
    check = _check
    check.dense("logits", logits, FLOATS, "(T, E)", (None, None))
    (rows, experts), device = logits.shape, logits.device
    check_experts(check.op, experts)
    groups, top_groups = check.integer("groups", groups, 1), check.integer("top_groups", top_groups, 1)
    if experts % groups:
        raise ValueError(f"{check.op}: groups must divide {experts} experts; got {groups}")
    if top_groups > groups:
        raise ValueError(f"{check.op}: top_groups must be at most {groups} = groups; got {top_groups}")
    size = experts // groups
    check_k(check.op, check.integer("k", k, 1), min(MAX_K, top_groups * size))
    if check.integer("group_best", group_best, 1) > 2 or top_groups < groups and group_best > size:
        raise ValueError(f"{check.op}: group_best must be 1 or 2, and at most the {size} experts of a group; got "
                         f"{group_best}")
    if not isinstance(scoring, str) or scoring not in SCORING:
        raise ValueError(f"{check.op}: scoring must be softmax or sigmoid; got {scoring!r}")
    if not isinstance(normalize, bool):
        raise TypeError(f"{check.op}: normalize must be a bool; got {describe(normalize)}")
    if bias is not None:
        check.contiguous("bias", bias, torch.float32, "(E,)", (experts,), device)
    out_ids = check.contiguous_output("out_ids", out_ids, logits, (rows, k), torch.int32)
    out_weights = check.contiguous_output("out_weights", out_weights, logits, (rows, k), torch.float32)
    _route_experts(logits, bias, SCORING[scoring], groups, top_groups, group_best, normalize,
                   check.number("scale", scale), out_ids, out_weights)
    return out_ids, out_weights


_route_experts = define(
    "route_experts(Tensor logits, Tensor? bias, int scoring, int groups, int top_groups, int group_best,"
    " bool normalize, float scale, Tensor(a!) out_ids, Tensor(b!) out_weights) -> ()",
    reference.router.route_experts)
