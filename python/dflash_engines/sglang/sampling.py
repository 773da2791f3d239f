"""compute_dflash_sampling_correct_drafts_and_bonus -> verify_sample: no (B, Q, V) probabilities.

The distribution of what is emitted is the same, but that all tokens tied with the k-th most likely are kept, of which
the engine's sparse path keeps some; the random numbers are others. Requests have no seeds at this point, so each step
draws some from torch's generator, as the original draws its coins.
"""

import sys
from typing import Any

import torch

from dflash_kernels import SamplingTensors, verify_sample

from ..hooks import LEFT, Hook


def params_of(info: Any, device: torch.device) -> SamplingTensors:
    """From SGLang's SamplingBatchInfo: temperatures (B, 1), top_ks and top_ps (B,). A greedy request has top_k 1 there,
    and of tied tokens gets the lowest id, as beside other greedy ones."""
    temperature = info.temperatures.reshape(-1).float().masked_fill(info.top_ks.reshape(-1) == 1, 0.0)
    top_k = info.top_ks.int() if getattr(info, "need_top_k_sampling", True) else None
    top_p = info.top_ps.float() if getattr(info, "need_top_p_sampling", False) else None
    seeds = torch.randint(1 << 62, temperature.shape, device=device)
    return SamplingTensors(temperature, seeds, top_k, top_p)


def fits(candidates: torch.Tensor, logits: torch.Tensor, info: Any) -> bool:
    """Whether the engine's tensors are those that this was written for."""
    ids, each = (torch.int32, torch.int64), (info.temperatures, info.top_ks, info.top_ps)
    return (candidates.dim() == 2 and candidates.numel() > 0 and candidates.dtype in ids and logits.dim() == 2
            and logits.shape[0] == candidates.numel() and logits.is_contiguous()
            and candidates.device == logits.device
            and all(values.numel() == candidates.shape[0] for values in each))


def rehearsed() -> bool:
    """Whether the engine measures what memory its own function needs, which must be there when that runs."""
    frame, left = sys._getframe(1), 8
    while frame is not None and left:
        if frame.f_code.co_name == "_measure_sampling_peak":
            return True
        frame, left = frame.f_back, left - 1  # type: ignore[assignment]
    return False


def compute_dflash_sampling_correct_drafts_and_bonus(
        *, candidates, next_token_logits, sampling_info, max_top_k=None, uniform_top_k_value=None,
        threshold_single=None, threshold_acc=None, uniform_samples=None, uniform_samples_for_final_sampling=None,
        use_sparse_topk=True):
    if threshold_single is None or threshold_acc is None:
        from sglang.srt.speculative import dflash_utils

        spec = dflash_utils.get_spec()
        single = spec.speculative_accept_threshold_single if threshold_single is None else threshold_single
        total = spec.speculative_accept_threshold_acc if threshold_acc is None else threshold_acc
    else:
        single, total = threshold_single, threshold_acc
    given = uniform_samples is not None or uniform_samples_for_final_sampling is not None
    if ((single, total) != (1.0, 1.0) or given  # below 1 the engine accepts more than the distribution allows
            or not fits(candidates, next_token_logits, sampling_info) or rehearsed()):
        return LEFT
    requests, width = candidates.shape
    found = verify_sample(
        candidates.long(), next_token_logits.view(requests, width, -1),
        torch.zeros(requests, dtype=torch.int32, device=candidates.device),
        params_of(sampling_info, candidates.device))
    return found.accept_lens, found.bonus


UTILS = "sglang.srt.speculative.dflash_utils"
HOOK = Hook("sampling", f"{UTILS}:compute_dflash_sampling_correct_drafts_and_bonus",
            compute_dflash_sampling_correct_drafts_and_bonus, read={"0.5.23": "de2c63ee0548c6c4"},
            beside=(f"{UTILS}:build_speculative_verify_target_probs",), diverges=True)
