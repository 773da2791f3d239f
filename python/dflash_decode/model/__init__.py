"""Target models. The loop needs what `Target` says and nothing else."""

from collections.abc import Sequence
from typing import Protocol

import torch

from dflash_kernels import PackedWeight, PagedKV

from ..kv import CacheShape


class TargetPass(Protocol):
    """A causal pass over B blocks of Q tokens, with memory of its own that never moves."""

    def run(self, ids: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, page_table: torch.Tensor,
            context_lens: torch.Tensor, block_lens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids, positions, slots (B, Q) int64; page_table (B, max_pages), context_lens, block_lens (B,) int32.

        Writes the block's K/V to its slots (negative: nowhere). Returns the rows (B * Q, H) that the head takes, and
        the features (B * Q, F * H): the outputs of the target layers, in the order of the target_layer_ids.
        """


class Target(Protocol):
    """Any causal language model whose K/V live in our pages."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    max_context: int
    dtype: torch.dtype
    device: torch.device
    cache: CacheShape
    embedding: torch.Tensor  # (V, H), for drafters without their own
    head: torch.Tensor | PackedWeight  # (V, H), likewise
    head_bias: torch.Tensor | None  # (V,)
    graph_safe: bool  # a pass runs dflash ops alone, so a graph can capture it

    def make_pass(
        self, batch: int, width: int, caches: Sequence[PagedKV], target_layer_ids: Sequence[int] = ()
    ) -> TargetPass:
        """caches: one for each layer, of shape self.cache. target_layer_ids: layers whose output is collected."""

    def next_ids(self, rows: torch.Tensor, ids: torch.Tensor, values: torch.Tensor) -> None:
        """rows (R, H) from a pass -> the most likely next tokens, ids (R,) int64, and their logits, values (R,)."""

    def logits(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        """rows (R, H) from a pass -> out (R, V), of the target's dtype, contiguous; next_ids is its argmax."""
