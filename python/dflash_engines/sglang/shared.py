"""Functions with the arguments of SGLang's own, for the names that its kernel registry and ours share."""

import torch

from dflash_kernels import silu_and_mul as _silu_and_mul
from dflash_kernels import verify_greedy


def compute_dflash_correct_drafts_and_bonus(*, candidates: torch.Tensor, target_predict: torch.Tensor,
                                            ) -> tuple[torch.Tensor, torch.Tensor]:
    """The accepted drafts (B,) int32, without anchor and bonus, and the bonus (B,) int64. Both given are (B, Q)."""
    lens = torch.zeros(candidates.shape[0], dtype=torch.int32, device=candidates.device)
    found = verify_greedy(candidates, target_predict, lens)
    return found.accept_lens, found.bonus


def silu_and_mul(input: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    return _silu_and_mul(input, out=out)
