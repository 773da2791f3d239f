"""Drafts chosen from the most likely tokens of each position, each in view of the one before it: DFlash2's selector,
and DSpark's Markov head.

    score[l, c] = value[l, c] + round(sum over r of round(A[before_l, r] * hidden[l, r]) * B[id[l, c], r])

A and B are the checkpoint's predecessor and successor codebooks, hidden is its projection of the drafter's hidden
states, and before_l is the token that was chosen at position l - 1; at the first position it is the anchor. A Markov
head has no hidden: its factor is 1, and its codebooks are markov_w1 and markov_w2. Products and their sum are rounded
to the codebooks' dtype, as in SGLang and vLLM. Scores are float32; the dflash package rounds them to the drafter's
dtype.

Only the scores behind the chosen token are computed: K * R products a position, of the K * K * R of all its edges.
"""

import torch

from .. import reference
from .._library import define
from ..limits import check_k
from ..types import SamplingTensors
from ._checks import FLOATS, Checker, describe
from .sample import check_params

_check = Checker("select_candidates")


def select_candidates(values: torch.Tensor, ids: torch.Tensor, hidden: torch.Tensor | None,
                      anchor_ids: torch.Tensor, predecessor: torch.Tensor, successor: torch.Tensor,
                      context_lens: torch.Tensor, params: SamplingTensors | None = None, *,
                      out_ids: torch.Tensor | None = None, out_logprobs: torch.Tensor | None = None,
                      out_probs: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Chooses one of K candidates for each drafted position, first to last.

    Parameters
    ----------
    values : (B, Q - 1, K) float32
        Logits as `lm_head_topk` or `combine_topk` return them; K at most 64. Contiguous.
    ids : (B, Q - 1, K) int64
        Their tokens. Contiguous.
    hidden : (B, Q - 1, R) dtype of predecessor, or None
        Projected hidden states of the drafted positions. None: ones. Contiguous.
    anchor_ids : (B,) int64
        The token before the first drafted position. At any stride.
    predecessor, successor : (V, R) float32, bfloat16 or float16
        Codebooks of one dtype. Contiguous. A token outside [0, V) has a row of zeros.
    context_lens : (B,) int32
        Tokens before the anchor; draft i is at position context_len + 1 + i. Contiguous.
    params : SamplingTensors, optional
        Temperature, min-p, top-k and top-p apply to the K scores. Greedy requests, and all of them without params, take
        the largest score; of equal ones the first, and a NaN before any number.
    out_ids : (B, Q - 1) int64, optional
        Written. Last dimension contiguous: columns 1 to Q - 1 of the block fit.
    out_logprobs : (B, Q - 1) float32, optional
        Written. Contiguous.
    out_probs : (B, Q - 1, K) float32, optional
        Written. Contiguous. Only with params.

    Returns
    -------
    out_ids : (B, Q - 1) int64
        The drafts.
    out_logprobs : (B, Q - 1) float32
        Logarithm of each draft's share of softmax(score), at temperature 1 and without filters: how sure the selector
        is.
    out_probs : (B, Q - 1, K) float32 or None
        The distribution q that the drafts were drawn from. Pass Proposal(probs=out_probs, ids=ids) to `verify_sample`.
        None without params.

    Raises
    ------
    TypeError
        Wrong dtype.
    ValueError
        Wrong shape, layout, device or K. With DFLASH_CHECK=1 also sampling settings that are negative or NaN.

    Notes
    -----
    Graph-safe. Source: DFlash2DraftModel of the dflash package; reference/selector.py. Random numbers are those of
    `sample_draft`.

    Cost: `B * ((Q - 1) * (e * (K + 2) * R + 12 * K + 12) + 12)` bytes; without hidden, a row of R less for
    each position. Launches on a GPU: 1.

    Replaces `DFlash2Speculator._score_candidates` of vLLM, `CandidateSelector.build_lattice` of SGLang, the walks
    behind both, and the loop over positions of vLLM's `DSparkSpeculator` with a top-k.

    Examples
    --------
    Token 8 is less likely than 30, but follows anchor 5 better.

    >>> import torch
    >>> from dflash_kernels import select_candidates
    >>> values, ids = torch.tensor([[[2.0, 1.0]]]), torch.tensor([[[30, 8]]])
    >>> predecessor, successor = torch.zeros(40, 2), torch.zeros(40, 2)
    >>> predecessor[5, 0], successor[8, 0] = 1.0, 3.0
    >>> drafts, logprobs, _ = select_candidates(values, ids, torch.ones(1, 1, 2), torch.tensor([5]), predecessor,
    ...                                         successor, torch.tensor([10], dtype=torch.int32))
    >>> drafts.tolist(), round(logprobs.exp().item(), 3)
    ([[8]], 0.881)
    """
    check = _check
    check.contiguous("values", values, torch.float32, "(B, Q - 1, K)", (None,) * 3)
    (b, n, k), device = values.shape, values.device
    check_k(check.op, k)
    check.contiguous("ids", ids, torch.int64, "(B, Q - 1, K)", values.shape, device)
    check.contiguous("predecessor", predecessor, FLOATS, "(V, R)", (None, None), device)
    if predecessor.shape[1] < 1:
        raise ValueError(f"{check.op}: predecessor must have R >= 1; got {describe(predecessor)}")
    check.contiguous("successor", successor, predecessor.dtype, "(V, R)", predecessor.shape, device)
    if hidden is not None:
        check.contiguous("hidden", hidden, predecessor.dtype, "(B, Q - 1, R)", (b, n, predecessor.shape[1]), device)
    check.tensor("anchor_ids", anchor_ids, torch.int64, "(B,)", (b,), device)
    check.contiguous("context_lens", context_lens, torch.int32, "(B,)", (b,), device)
    settings: tuple[torch.Tensor | None, ...] = (None,) * 5
    if params is not None:
        check_params(check, params, b, device)
        settings = (params.temperature, params.seeds, params.top_k, params.top_p, params.min_p)
        out_probs = check.contiguous_output("out_probs", out_probs, values, (b, n, k))
    elif out_probs is not None:
        raise ValueError(f"{check.op}: out_probs must be given with params alone; got {describe(out_probs)}")
    out_ids = check.output("out_ids", out_ids, values, (b, n), torch.int64)
    out_logprobs = check.contiguous_output("out_logprobs", out_logprobs, values, (b, n))
    _select_candidates(values, ids, hidden, anchor_ids, predecessor, successor, context_lens, *settings, out_ids,
                       out_logprobs, out_probs)
    return out_ids, out_logprobs, out_probs


_select_candidates = define(
    "select_candidates(Tensor values, Tensor ids, Tensor? hidden, Tensor anchor_ids, Tensor predecessor,"
    " Tensor successor, Tensor context_lens, Tensor? temperature, Tensor? seeds, Tensor? top_k, Tensor? top_p,"
    " Tensor? min_p, Tensor(a!) out_ids, Tensor(b!) out_logprobs, Tensor(c!)? out_probs) -> ()",
    reference.selector.select_candidates,
)
