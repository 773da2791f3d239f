"""rejection_sample -> verify_sample, with no stored probabilities. vLLM's V2 runner, on a GPU.

Greedy and sampled requests in one batch, by token or by block; drafts without logits of their own (greedy drafting).
Sampled tokens follow the same law by other random numbers.
"""

import torch

from dflash_kernels import SamplingParams, verify_sample

from ..hooks import Hook

COMMON = ("target_logits", "draft_logits", "draft_sampled", "cu_num_logits", "pos", "idx_mapping",
          "expanded_idx_mapping", "expanded_local_pos", "temperature", "seed", "num_speculative_steps",
          "synthetic_conditional_rates", "use_fp64", "use_block_verification", "contexts", "watermarking",
          "watermarking_skip_mask", "watermark_key")
FLY = ("fly_window_size", "fly_entropy_threshold", "fly_entropy_top_k")  # from 0.33 on


def build(original):
    def rejection_sample(target_logits, draft_logits, draft_sampled, cu_num_logits, pos, idx_mapping,
                         expanded_idx_mapping, expanded_local_pos, temperature, seed, num_speculative_steps,
                         synthetic_conditional_rates=None, use_fp64=False, use_block_verification=False,
                         contexts=None, watermarking=None, watermarking_skip_mask=None, watermark_key=None, **fly):
        requests, width = cu_num_logits.shape[0] - 1, num_speculative_steps + 1
        # No request has more rows than width, so a full count says that all have as many.
        if (draft_logits is not None or synthetic_conditional_rates is not None or contexts is not None
                or fly.get("fly_window_size") or target_logits.shape[0] != requests * width):
            return original(target_logits, draft_logits, draft_sampled, cu_num_logits, pos, idx_mapping,
                            expanded_idx_mapping, expanded_local_pos, temperature, seed, num_speculative_steps,
                            synthetic_conditional_rates, use_fp64, use_block_verification, contexts, watermarking,
                            watermarking_skip_mask, watermark_key, **fly)
        found = verify(target_logits.view(requests, width, -1), draft_sampled.view(requests, width),
                       pos.view(requests, width), temperature[idx_mapping], seed[idx_mapping],
                       "block" if use_block_verification else "token")
        return found.tokens, found.commit_lens

    return rejection_sample


def verify(logits: torch.Tensor, block: torch.Tensor, positions: torch.Tensor, temperature: torch.Tensor,
           seeds: torch.Tensor, rule: str):
    """logits (B, Q, V), tempered, filtered and penalised by the engine; block (B, Q), its anchor first, at positions
    (B, Q). temperature (B,), seeds (B,)."""
    heat = (temperature > 0).float()  # what is left to know of it
    return verify_sample(block.long(), logits, positions[:, 0].int().contiguous(),
                         SamplingParams(heat, seeds.long().contiguous()), rule=rule)


def keep() -> str | None:
    from vllm.platforms import current_platform

    return None if current_platform.is_cuda_alike() else "the V2 runner is for GPUs"


HOOK = Hook("verify_v2", "vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils:rejection_sample",
            (COMMON, COMMON + FLY), ((0, 32), (0, 34)), build, keep, lambda: "not run on a GPU yet")
