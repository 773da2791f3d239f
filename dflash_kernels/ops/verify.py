"""Greedy verification: the longest prefix of the draft that the target would have written itself.

The target's answer after block token i is target_ids[b, i]. The draft said draft_ids[b, i + 1]. With

    accept = max n such that draft_ids[b, i] == target_ids[b, i - 1] for all 1 <= i <= n

the step emits target_ids[b, 0 ... accept]: the accepted tokens and the target's own next token, the bonus. From logits,
target_ids = argmax(logits), as in torch.argmax: the first index wins ties, and NaN is above everything. Only integers
are computed and values compared, so results are exact.
"""

import torch

from .. import reference
from .._library import define
from ..limits import named
from ..types import Verified
from ._checks import FLOATS, Checker, describe, values_checked

_check = Checker("verify_greedy")


def verify_greedy(draft_ids: torch.Tensor, target_ids: torch.Tensor | None, context_lens: torch.Tensor, *,
                  logits: torch.Tensor | None = None, block_lens: torch.Tensor | None = None,
                  out: Verified | None = None) -> Verified:
    """Accepts a prefix of each drafted block and emits it with the target's next token.

    Parameters
    ----------
    draft_ids : (B, Q) int64
        The block that the target ran over, rows at any stride. Column 0 is the anchor. An id that is no token, such as
        -1 where nothing is proposed, is never accepted, whatever target_ids has there.
    target_ids : (B, Q) int64, or None
        The target's next token after each of them, rows at any stride. None exactly when logits are given.
    context_lens : (B,) int32
        Tokens before the anchor. Contiguous.
    logits : (B, Q, V) float32, bfloat16 or float16, optional
        Their argmax is used as target_ids. Last dimension contiguous, others at any stride: a crop of a padded
        vocabulary fits. Rows after the first mismatch are not always read.
    block_lens : (B,) int32, optional
        Live tokens of each block, clamped to [0, Q]. Contiguous. None: Q. A request of length 0 is padding and commits
        nothing.
    out : Verified, optional
        Written. new_lens can be context_lens itself and tokens can be target_ids; nothing else can overlap.

    Returns
    -------
    out : Verified

    Raises
    ------
    TypeError
        Wrong dtype.
    ValueError
        Wrong shape, layout or device. With DFLASH_CHECK=1 also lengths out of range.

    Notes
    -----
    Graph-safe. Source: DFlash, arXiv 2602.06036, section 4; Leviathan et al. 2023, arXiv 2211.17192, at temperature 0;
    reference/verify.py.

    Cost: `24 * B * (Q + 1)` bytes, from logits `B * (e * Q * V + 16 * Q + 24)`. Launches on a GPU: 1; 2 from logits.

    Replaces `rejection_sample` of vLLM's V1 runner, for greedy requests with equal numbers of drafts.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels import verify_greedy
    >>> drafts, target = torch.tensor([[5, 7, 8, 9]]), torch.tensor([[7, 8, 3, 4]])
    >>> verified = verify_greedy(drafts, target, torch.tensor([10], dtype=torch.int32))
    >>> verified.tokens.tolist(), verified.accept_lens.tolist(), verified.new_lens.tolist()
    ([[7, 8, 3, -1]], [2], [13])
    """
    _check_inputs(draft_ids, target_ids, context_lens, logits, block_lens)
    out = check_verified(_check, draft_ids, out)
    if values_checked(draft_ids):
        _check_values(draft_ids, context_lens, block_lens)
    _verify_greedy(draft_ids, target_ids, logits, context_lens, block_lens, out.accept_lens, out.commit_lens,
                   out.tokens, out.bonus, out.new_lens)
    return out


def _check_inputs(draft_ids, target_ids, context_lens, logits, block_lens):
    _check.dense("draft_ids", draft_ids, torch.int64, "(B, Q)", (None, None))
    (b, q), device = draft_ids.shape, draft_ids.device
    if q < 1:
        raise ValueError(f"{_check.op}: draft_ids must have Q >= 1, the anchor's column; got {describe(draft_ids)}")
    if (target_ids is None) == (logits is None):
        raise ValueError(f"{_check.op}: target_ids or logits must be given, and not both; got {describe(target_ids)} "
                         f"and {describe(logits)}")
    if target_ids is not None:
        _check.dense("target_ids", target_ids, torch.int64, "(B, Q)", (b, q), device)
    else:
        _check.dense("logits", logits, FLOATS, "(B, Q, V)", (b, q, None), device)
        if logits.shape[2] < 1:
            raise ValueError(f"{_check.op}: logits must have V >= 1; got {describe(logits)}")
    _check.contiguous("context_lens", context_lens, torch.int32, "(B,)", (b,), device)
    if block_lens is not None:
        _check.contiguous("block_lens", block_lens, torch.int32, "(B,)", (b,), device)


_FIELDS = (("accept_lens", torch.int32, False), ("commit_lens", torch.int32, False), ("tokens", torch.int64, True),
           ("bonus", torch.int64, False), ("new_lens", torch.int32, False))


def check_verified(check, draft_ids, out):
    """The caller's Verified, checked, or a fresh one."""
    if out is not None and not isinstance(out, Verified):
        raise TypeError(f"{check.op}: out must be a Verified; got {describe(out)}")
    made = {}
    for name, dtype, per_token in _FIELDS:
        shape = tuple(draft_ids.shape) if per_token else (draft_ids.shape[0],)
        given = None if out is None else getattr(out, name)
        if out is not None and given is None:
            raise TypeError(f"{check.op}: out.{name} must be {named(dtype)}; got NoneType")
        made[name] = check.output(f"out.{name}", given, draft_ids, shape, dtype)
    return Verified(**made) if out is None else out


def _check_values(draft_ids, context_lens, block_lens):
    q = draft_ids.shape[1]
    if bool((context_lens < 0).any()):
        raise ValueError(f"{_check.op}: context_lens must be at least 0; got {int(context_lens.min())}")
    if block_lens is not None and bool(((block_lens < 0) | (block_lens > q)).any()):
        raise ValueError(f"{_check.op}: block_lens must be in [0, {q}]; got {block_lens.tolist()}")


_verify_greedy = define(
    "verify_greedy(Tensor draft_ids, Tensor? target_ids, Tensor? logits, Tensor context_lens, Tensor? block_lens,"
    " Tensor(a!) accept_lens, Tensor(b!) commit_lens, Tensor(c!) tokens, Tensor(d!) bonus, Tensor(e!) new_lens) -> ()",
    reference.verify.verify_greedy,
)
