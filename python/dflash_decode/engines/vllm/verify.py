"""rejection_sample -> verify_greedy, where all requests are greedy. vLLM's V1 runner."""

import torch

from dflash_kernels import verify_greedy

from ..hooks import Hook

COMMON = ("draft_token_ids", "num_draft_tokens", "max_spec_len", "cu_num_draft_tokens", "draft_probs", "target_logits",
          "bonus_token_ids", "sampling_metadata", "synthetic_mode", "synthetic_conditional_rates", "use_fp64_gumbel")
FLY = ("fly_window_size", "fly_entropy_threshold", "fly_entropy_top_k")  # from 0.33 on


def verify(drafts: torch.Tensor, logits: torch.Tensor, bonus: torch.Tensor) -> torch.Tensor:
    """drafts (B, S), logits (B, S, V) of the rows that they are checked against, bonus (B, 1): the token after all of
    them. Returns (B, S + 1) int32: what is emitted, then -1.

    The engine has no logits for the bonus: the block is the drafts but the last, and that one is compared here.
    """
    block = torch.cat([drafts.new_zeros(drafts.shape[0], 1), drafts[:, :-1]], 1)
    lens = torch.zeros(drafts.shape[0], dtype=torch.int32, device=drafts.device)
    tokens = verify_greedy(block, None, lens, logits=logits).tokens
    last = tokens[:, -1:]
    whole = (last == drafts[:, -1:]) & (last >= 0)
    return torch.cat([tokens, bonus.where(whole, -1)], 1).int()


def build(original):
    def rejection_sample(draft_token_ids, num_draft_tokens, max_spec_len, cu_num_draft_tokens, draft_probs,
                         target_logits, bonus_token_ids, sampling_metadata, synthetic_mode=False,
                         synthetic_conditional_rates=None, use_fp64_gumbel=False, **fly):
        # No collective is near: requests of one rank alone may decide.
        if (not sampling_metadata.all_greedy or synthetic_mode or fly.get("fly_window_size") is not None
                or max_spec_len < 1 or any(n != max_spec_len for n in num_draft_tokens)):
            return original(draft_token_ids, num_draft_tokens, max_spec_len, cu_num_draft_tokens, draft_probs,
                            target_logits, bonus_token_ids, sampling_metadata, synthetic_mode,
                            synthetic_conditional_rates, use_fp64_gumbel, **fly)
        shape = len(num_draft_tokens), max_spec_len
        return verify(draft_token_ids.view(shape).long(), target_logits.view(*shape, -1), bonus_token_ids)

    return rejection_sample


HOOK = Hook("verify", "vllm.v1.sample.rejection_sampler:rejection_sample", (COMMON, COMMON + FLY), ((0, 32), (0, 34)),
            build)
