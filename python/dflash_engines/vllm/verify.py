"""rejection_sample -> verify_greedy, where all requests are greedy. vLLM's V1 runner."""

import weakref
from typing import Any

import torch

from dflash_kernels import verify_greedy

from ..hooks import LEFT, Hook

RUNNERS: weakref.WeakSet[Any] = weakref.WeakSet()  # the engine's model runners with a DFlash proposer


def of_dflash(metadata: Any) -> bool:
    """Whether the sampling metadata of a batch belong to a runner with DFlash; all methods share the function."""
    batches = (getattr(runner, "input_batch", None) for runner in RUNNERS)
    return any(getattr(batch, "sampling_metadata", None) is metadata for batch in batches)


def verify(drafts: torch.Tensor, logits: torch.Tensor, bonus: torch.Tensor) -> torch.Tensor:
    """drafts (B, S), logits (B, S, V) of the rows that verify them, bonus (B, 1): the token after all drafts. Returns
    (B, S + 1) int32: the emitted tokens, then -1.

    The engine has no logits for the bonus, so the block excludes the last draft, which is compared here.
    """
    block = torch.cat([drafts.new_zeros(drafts.shape[0], 1), drafts[:, :-1]], 1)
    lens = torch.zeros(drafts.shape[0], dtype=torch.int32, device=drafts.device)
    tokens = verify_greedy(block, None, lens, logits=logits).tokens
    last = tokens[:, -1:]
    whole = (last == drafts[:, -1:]) & (last >= 0)
    return torch.cat([tokens, bonus.where(whole, -1)], 1).int()


def fits(drafts: torch.Tensor, logits: torch.Tensor, bonus: torch.Tensor, requests: int, width: int) -> bool:
    """Whether the engine's tensors have the expected form; the engine's function also accepts others."""
    rows, ids = requests * width, (torch.int32, torch.int64)
    return (drafts.shape == (rows,) and drafts.dtype in ids and bonus.shape == (requests, 1) and bonus.dtype in ids
            and logits.dim() == 2 and logits.shape[0] == rows and logits.dtype == torch.float32
            and logits.is_contiguous() and drafts.device == logits.device == bonus.device)


def rejection_sample(draft_token_ids, num_draft_tokens, max_spec_len, cu_num_draft_tokens, draft_probs, target_logits,
                     bonus_token_ids, sampling_metadata, synthetic_mode=False, synthetic_conditional_rates=None,
                     use_fp64_gumbel=False, fly_window_size=None, fly_entropy_threshold=None, fly_entropy_top_k=3):
    requests, width = len(num_draft_tokens), max_spec_len
    if (not sampling_metadata.all_greedy or synthetic_mode or fly_window_size is not None or width < 1
            or any(n != width for n in num_draft_tokens) or not of_dflash(sampling_metadata)
            or not fits(draft_token_ids, target_logits, bonus_token_ids, requests, width)):
        return LEFT
    return verify(draft_token_ids.view(requests, width).long(), target_logits.view(requests, width, -1),
                  bonus_token_ids)


HOOK = Hook("verify", "vllm.v1.sample.rejection_sampler:rejection_sample", rejection_sample,
            read={"0.32.0": "adadcc804bccf89c", "0.33.0": "b47ac231920275d0"}, measured={"cpu": True})
