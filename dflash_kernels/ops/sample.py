"""Drafting and verification with sampling. Emitted tokens follow the target's distribution exactly.

Row i of a request's block gives the distribution p_i of the token at position context_len + 1 + i. It comes from the
row's adjusted logits l, with m = max l and w_v = exp((l_v - m) / temperature):

    min_p   keep v if w_v >= min_p
    top_k   of those, keep v if fewer than top_k are larger than l_v
    top_p   of those, keep v if the mass of the larger ones is < top_p of all their mass
    p_v  =  w_v / sum of the kept w

The most likely token is always kept, and tokens with equal logits are kept or dropped together. So top_p = 0 keeps the
most likely token, and those that tie with it, alone.

Draft token x_i was drawn from q_i. Verification decides by q and by the rule:

    one-hot q (no proposal)   y_i = F_i^-1(u_i), the inverse of p_i's cumulative sum; x_i is accepted if it is y_i
    rule "token"              x_i is accepted with probability min(1, p_i(x_i) / q_i(x_i))
    rule "block"              the longest prefix is accepted that its joint probabilities allow; at least as long on
                              average, and the same thing where q is one-hot
    after the last accepted   one token from the residual (p - q)+, or from p itself after a whole block: the bonus

Random numbers are Philox4x32-10 of (seed, position, purpose). A request's text depends on its own seed and logits
alone, never on its batch. With a one-hot q it does not depend on the drafts either: it is the text of baseline
sampling, one token at a time.
"""

import torch

from .. import reference
from .._constants import CHUNK_SUMS, ROW_STATS, SAMPLE_CHUNK
from .._library import define
from ..types import LogitAdjustments, Proposal, SamplingTensors, Verified
from ._checks import FLOATS, Checker, describe, values_checked
from .verify import check_verified

_workspace_size_check = Checker("workspace_size")
_verify_sample_check = Checker("verify_sample")
_sample_draft_check = Checker("sample_draft")

RULES = ("token", "block")


def workspace_size(requests: int, block: int, vocab: int) -> int:
    """How many float32 elements verify_sample needs as its workspace.

    A captured graph needs the memory to be its own: allocate it once and pass it to every call.

    Parameters
    ----------
    requests, block, vocab : int
        B, Q and V.

    Returns
    -------
    int

    Raises
    ------
    TypeError
        A size that is no int.
    ValueError
        A size below 1; requests may be 0.

    Examples
    --------
    >>> from dflash_kernels import workspace_size
    >>> workspace_size(2, 8, 49152)
    3328
    """
    for name, size, least in (("requests", requests, 0), ("block", block, 1), ("vocab", vocab, 1)):
        _workspace_size_check.integer(name, size, least)
    return requests * block * (CHUNK_SUMS * -(-vocab // SAMPLE_CHUNK) + ROW_STATS)


def verify_sample(draft_ids: torch.Tensor, logits: torch.Tensor, context_lens: torch.Tensor, params: SamplingTensors, *,
                  proposal: Proposal | None = None, adjustments: LogitAdjustments | None = None, rule: str = "token",
                  block_lens: torch.Tensor | None = None, out: Verified | None = None,
                  workspace: torch.Tensor | None = None) -> Verified:
    """Accepts a prefix of each drafted block and draws the token after it, by the requests' sampling settings.

    Parameters
    ----------
    draft_ids : (B, Q) int64
        The block that the target ran over, rows at any stride. Column 0 is the anchor. A block ends at its first id
        outside [0, V), such as the -1 of an engine that proposes nothing, as if block_lens said so. The token there is
        drawn from p. With Q = 1 this is baseline sampling.
    logits : (B, Q, V) float32, bfloat16 or float16
        Last dimension contiguous, others at any stride: a crop of a padded vocabulary fits. Rows after the first
        rejection are not always read.
    context_lens : (B,) int32
        Tokens before the anchor. Contiguous.
    params : SamplingTensors
        Requests below temperature 1e-5 are greedy, in the same batch. Their proposals are ignored.
    proposal : Proposal, optional
        Distribution of the drafts. None: greedy drafts, q is one-hot.
    adjustments : LogitAdjustments, optional
        Changes to the logits, read in the same pass.
    rule : {"token", "block"}
        Acceptance rule, as in ops/sample.py.
    block_lens : (B,) int32, optional
        Live tokens of each block, clamped to [0, Q]. Contiguous. None: Q. A request of length 0 is padding and commits
        nothing.
    out : Verified, optional
        Written. new_lens can be context_lens itself; nothing else can overlap.
    workspace : (n,) float32, optional
        Overwritten. Contiguous, with at least `workspace_size` elements.

    Returns
    -------
    out : Verified

    Raises
    ------
    TypeError
        Wrong dtype.
    ValueError
        Wrong shape, layout, device or rule. With DFLASH_CHECK=1 also sampling settings that are negative or NaN.

    Notes
    -----
    Graph-safe. Source: for "token", Leviathan et al. 2023, arXiv 2211.17192, and Chen et al. 2023, arXiv 2302.01318;
    for "block", Sun et al., arXiv 2403.10444; reference/sample.py.

    Cost: `B * (e * Q * V + 16 * Q + 36)` bytes if every row is read. Launches on a GPU: 3 to 5.

    Replaces `rejection_sample` of vLLM's V2 runner and SGLang's `compute_dflash_sampling_correct_drafts_and_bonus`.

    Examples
    --------
    The target can only draw 7 and then 8 here, so draft 7 is accepted and draft 9 is not.

    >>> import torch
    >>> from dflash_kernels import SamplingTensors, verify_sample
    >>> logits = torch.full((1, 3, 10), -torch.inf)
    >>> logits[0, 0, 7] = logits[0, 1, 8] = logits[0, 2, 1] = 0.0
    >>> params = SamplingTensors(temperature=torch.ones(1), seeds=torch.tensor([1]))
    >>> verified = verify_sample(torch.tensor([[5, 7, 9]]), logits, torch.tensor([10], dtype=torch.int32), params)
    >>> verified.tokens.tolist(), verified.new_lens.tolist()
    ([[7, 8, -1]], [12])
    """
    check = _verify_sample_check
    b, q, vocab = _check_target(check, draft_ids, logits, context_lens, block_lens)
    check_params(check, params, b, logits.device)
    proposal = Proposal() if proposal is None else proposal
    adjustments = LogitAdjustments() if adjustments is None else adjustments
    _check_proposal(check, proposal, (b, q - 1, vocab), logits.device)
    _check_adjustments(check, adjustments, (b, q, vocab), logits.device)
    if rule not in RULES:
        raise ValueError(f"{check.op}: rule must be {' or '.join(map(repr, RULES))}; got {rule!r}")
    out = check_verified(check, draft_ids, out)
    size = workspace_size(b, q, vocab)
    if workspace is None:
        workspace = torch.empty(size, dtype=torch.float32, device=logits.device)
    check.contiguous("workspace", workspace, torch.float32, "(n,)", (None,), logits.device)
    if workspace.numel() < size:
        raise ValueError(f"{check.op}: workspace must have at least {size} elements; got {describe(workspace)}")
    _verify_sample(draft_ids, logits, context_lens, params.temperature, params.seeds, params.top_k, params.top_p,
                   params.min_p, proposal.probs, proposal.ids, proposal.logits, adjustments.seen,
                   adjustments.repetition_penalty, adjustments.bias, adjustments.bitmask, block_lens, rule == "block",
                   out.accept_lens, out.commit_lens, out.tokens, out.bonus, out.new_lens, workspace)
    return out


def sample_draft(values: torch.Tensor, ids: torch.Tensor, context_lens: torch.Tensor, params: SamplingTensors, *,
                 out_ids: torch.Tensor | None = None, out_probs: torch.Tensor | None = None,
                 ) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws each block's drafts from the K most likely tokens of each position.

    Parameters
    ----------
    values : (B, Q - 1, K) float32
        Logits as `lm_head_topk` returns them, largest first. Contiguous.
    ids : (B, Q - 1, K) int64
        Their tokens. Contiguous.
    context_lens : (B,) int32
        Tokens before the anchor; draft i is at position context_len + 1 + i. Contiguous.
    params : SamplingTensors
        Temperature, min-p, top-k and top-p apply to the K tokens alone. Greedy requests take the most likely.
    out_ids : (B, Q - 1) int64, optional
        Written. Last dimension contiguous: columns 1 to Q - 1 of the block fit.
    out_probs : (B, Q - 1, K) float32, optional
        Written. Contiguous.

    Returns
    -------
    out_ids : (B, Q - 1) int64
        The drafts.
    out_probs : (B, Q - 1, K) float32
        The distribution q that they were drawn from. Pass Proposal(probs=out_probs, ids=ids) to `verify_sample`.

    Raises
    ------
    TypeError
        Wrong dtype.
    ValueError
        Wrong shape, layout or device. With DFLASH_CHECK=1 also sampling settings that are negative or NaN.

    Notes
    -----
    Graph-safe. Source: reference/sample.py.

    Cost: `B * ((Q - 1) * (16 * K + 8) + 16)` bytes. Launches on a GPU: 1.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels import SamplingTensors, sample_draft
    >>> values, ids = torch.tensor([[[2.0, 1.0], [4.0, 0.0]]]), torch.tensor([[[30, 8], [17, 5]]])
    >>> params = SamplingTensors(temperature=torch.zeros(1), seeds=torch.tensor([1]))
    >>> drafts, probs = sample_draft(values, ids, torch.tensor([10], dtype=torch.int32), params)
    >>> drafts.tolist(), probs.tolist()
    ([[30, 17]], [[[1.0, 0.0], [1.0, 0.0]]])
    """
    check = _sample_draft_check
    check.contiguous("values", values, torch.float32, "(B, Q - 1, K)", (None,) * 3)
    check.contiguous("ids", ids, torch.int64, "(B, Q - 1, K)", values.shape, values.device)
    b, n, k = values.shape
    if k < 1:
        raise ValueError(f"{check.op}: values must have K >= 1; got {describe(values)}")
    check.contiguous("context_lens", context_lens, torch.int32, "(B,)", (b,), values.device)
    check_params(check, params, b, values.device)
    out_ids = check.output("out_ids", out_ids, values, (b, n), torch.int64)
    out_probs = check.contiguous_output("out_probs", out_probs, values, (b, n, k))
    _sample_draft(values, ids, context_lens, params.temperature, params.seeds, params.top_k, params.top_p,
                  params.min_p, out_ids, out_probs)
    return out_ids, out_probs


def _check_target(check, draft_ids, logits, context_lens, block_lens):
    check.dense("draft_ids", draft_ids, torch.int64, "(B, Q)", (None, None))
    b, q = draft_ids.shape
    if q < 1:
        raise ValueError(f"{check.op}: draft_ids must have Q >= 1, the anchor's column; got {describe(draft_ids)}")
    check.dense("logits", logits, FLOATS, "(B, Q, V)", (b, q, None), draft_ids.device)
    if logits.shape[2] < 1:
        raise ValueError(f"{check.op}: logits must have V >= 1; got {describe(logits)}")
    check.contiguous("context_lens", context_lens, torch.int32, "(B,)", (b,), logits.device)
    if block_lens is not None:
        check.contiguous("block_lens", block_lens, torch.int32, "(B,)", (b,), logits.device)
    return b, q, logits.shape[2]


_PARAMS = (("temperature", torch.float32), ("seeds", torch.int64), ("top_k", torch.int32), ("top_p", torch.float32),
           ("min_p", torch.float32))


def check_params(check, params, b, device):
    if not isinstance(params, SamplingTensors):
        raise TypeError(f"{check.op}: params must be SamplingTensors; got {describe(params)}")
    for name, dtype in _PARAMS:
        t = getattr(params, name)
        if t is None and name not in ("temperature", "seeds"):
            continue
        t = check.contiguous(f"params.{name}", t, dtype, "(B,)", (b,), device)
        if values_checked(t) and name != "seeds" and not bool((t >= 0).all()):
            raise ValueError(f"{check.op}: params.{name} must be at least 0; got {t.tolist()}")


def _check_proposal(check, proposal, sizes, device):
    if not isinstance(proposal, Proposal):
        raise TypeError(f"{check.op}: proposal must be a Proposal; got {describe(proposal)}")
    b, n, vocab = sizes
    probs, ids, logits = proposal.probs, proposal.ids, proposal.logits
    if (probs is not None and logits is not None) or (ids is not None and probs is None):
        raise ValueError(f"{check.op}: proposal must have probs, or probs and ids, or logits; got probs "
                         f"{describe(probs)}, ids {describe(ids)}, logits {describe(logits)}")
    shape = "(B, Q - 1, V)" if ids is None else "(B, Q - 1, K)"
    if probs is not None:
        check.dense("proposal.probs", probs, torch.float32, shape, (b, n, vocab if ids is None else None), device)
    if ids is not None and probs is not None:
        if probs.shape[2] < 1:
            raise ValueError(f"{check.op}: proposal.probs must have K >= 1; got {describe(probs)}")
        check.dense("proposal.ids", ids, torch.int64, shape, probs.shape, device)
    if logits is not None:
        check.dense("proposal.logits", logits, FLOATS, shape, sizes, device)


def _check_adjustments(check, adjustments, sizes, device):
    if not isinstance(adjustments, LogitAdjustments):
        raise TypeError(f"{check.op}: adjustments must be LogitAdjustments; got {describe(adjustments)}")
    b, q, vocab = sizes
    a, words = adjustments, -(-vocab // 32)
    if (a.seen is None) != (a.repetition_penalty is None):
        raise ValueError(f"{check.op}: adjustments must have seen and repetition_penalty, or neither; "
                         f"got {describe(a.seen)} and {describe(a.repetition_penalty)}")
    for name, t in (("seen", a.seen), ("bitmask", a.bitmask)):
        if t is not None:
            check.tensor(f"adjustments.{name}", t, torch.int32, "(B, Q, ceil(V / 32))", (b, q, words), device)
            check.dense_last(name, t)
    if a.repetition_penalty is not None:
        check.tensor("adjustments.repetition_penalty", a.repetition_penalty, torch.float32, "(B,)", (b,), device)
        check.unbroken("repetition_penalty", a.repetition_penalty)
    if a.bias is not None:
        check.tensor("adjustments.bias", a.bias, torch.float32, "(B, Q, V)", sizes, device)
        check.dense_last("bias", a.bias)


_verify_sample = define(
    "verify_sample(Tensor draft_ids, Tensor logits, Tensor context_lens, Tensor temperature, Tensor seeds,"
    " Tensor? top_k, Tensor? top_p, Tensor? min_p, Tensor? draft_probs, Tensor? draft_candidates,"
    " Tensor? draft_logits, Tensor? seen, Tensor? repetition_penalty, Tensor? bias, Tensor? bitmask,"
    " Tensor? block_lens, bool block_rule, Tensor(a!) accept_lens, Tensor(b!) commit_lens, Tensor(c!) tokens,"
    " Tensor(d!) bonus, Tensor(e!) new_lens, Tensor(f!) workspace) -> ()",
    reference.sample.verify_sample,
)
_sample_draft = define(
    "sample_draft(Tensor values, Tensor ids, Tensor context_lens, Tensor temperature, Tensor seeds, Tensor? top_k,"
    " Tensor? top_p, Tensor? min_p, Tensor(a!) out_ids, Tensor(b!) out_probs) -> ()",
    reference.sample.sample_draft,
)
