"""rejection_sample -> verify_sample, with no stored probabilities. vLLM's V2 runner, on a GPU.

It takes greedy and sampled requests in one batch, both rules, and drafts without logits (greedy drafting). Sampled
tokens follow the same distribution with other random numbers.
"""

import logging
import weakref
from typing import Any

import torch

from dflash_kernels import SamplingTensors, verify_sample

from ..hooks import LEFT, Hook
from ..watch import when_imported, when_made

LOG = logging.getLogger("vllm.dflash_kernels")
SAMPLERS: weakref.WeakSet[Any] = weakref.WeakSet()  # the engine's rejection samplers of a DFlash configuration


def rejection_sample(target_logits, draft_logits, draft_sampled, cu_num_logits, pos, idx_mapping, expanded_idx_mapping,
                     expanded_local_pos, temperature, seed, num_speculative_steps, synthetic_conditional_rates=None,
                     use_fp64=False, use_block_verification=False, contexts=None, watermarking=None,
                     watermarking_skip_mask=None, watermark_key=None, fly_window_size=0, fly_entropy_threshold=0.3,
                     fly_entropy_top_k=3):
    requests, width = cu_num_logits.shape[0] - 1, num_speculative_steps + 1
    if (draft_logits is not None or synthetic_conditional_rates is not None or contexts is not None or fly_window_size
            or not of_dflash(temperature)
            or not fits(target_logits, draft_sampled, pos, idx_mapping, temperature, seed, requests, width)):
        return LEFT
    found = verify(target_logits.view(requests, width, -1), draft_sampled.view(requests, width),
                   pos.view(requests, width), temperature[idx_mapping], seed[idx_mapping],
                   "block" if use_block_verification else "token")
    return found.tokens, found.commit_lens


def of_dflash(temperature: torch.Tensor) -> bool:
    """Whether the engine's temperatures belong to a sampler for DFlash; all methods share the function."""
    return any(sampler.sampler.sampling_states.temperature.gpu is temperature for sampler in SAMPLERS)


def fits(logits: torch.Tensor, drafts: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor,
         temperature: torch.Tensor, seeds: torch.Tensor, requests: int, width: int) -> bool:
    """Whether the engine's tensors have the expected form. No request has more rows than width, so a full count means
    that all have width rows."""
    count, ids = (requests * width,), (torch.int32, torch.int64)
    return (requests > 0 and logits.dim() == 2 and logits.shape[:1] == drafts.shape == positions.shape == count
            and logits.dtype == torch.float32 and logits.is_contiguous() and drafts.dtype in ids
            and positions.dtype in ids and rows.shape == (requests,) and rows.dtype in ids
            and temperature.dim() == 1 and temperature.dtype == torch.float32
            and seeds.shape == temperature.shape and seeds.dtype == torch.int64)


def verify(logits: torch.Tensor, block: torch.Tensor, positions: torch.Tensor, temperature: torch.Tensor,
           seeds: torch.Tensor, rule: str):
    """logits (B, Q, V), with temperature, filters and penalties applied by the engine; block (B, Q), its anchor first,
    at positions (B, Q). temperature (B,), seeds (B,)."""
    temp = (temperature > 0).float()  # what is left to know of it
    return verify_sample(block.long(), logits, positions[:, 0].int().contiguous(),
                         SamplingTensors(temp, seeds.long().contiguous()), rule=rule)


def note(arguments: Any) -> None:
    if arguments["spec_config"].method == "dflash":
        SAMPLERS.add(arguments["self"])


def watch() -> None:
    when_imported("vllm.v1.worker.gpu.spec_decode.rejection_sampler", _watch, LOG)


def _watch(module: Any) -> None:
    when_made(module.RejectionSampler, note, LOG)


HOOK = Hook("verify_v2", "vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils:rejection_sample", rejection_sample,
            read={"0.32.0": "d194f0c309af49e7", "0.33.0": "faa739d2e427f323"}, prepare=watch, diverges=True)
