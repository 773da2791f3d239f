"""The interface of target models. The loop uses only `Target`."""

from collections.abc import Sequence
from typing import Protocol

import torch

from dflash_kernels import PackedWeight, PagedKV

from ..kv import CacheShape


class TargetPass(Protocol):
    """A causal pass over B blocks of Q tokens, in memory of its own that never moves."""

    def run(self, ids: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, page_table: torch.Tensor,
            context_lens: torch.Tensor, block_lens: torch.Tensor, block_starts: torch.Tensor | None = None,
            ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the blocks, and writes their K/V to their slots (a negative slot writes nothing).

        ids, positions, slots (B, Q) int64; page_table (B, max_pages), context_lens, block_lens (B,) int32. Returns the
        rows (B * Q, H), inputs of the LM head, and the features (B * Q, F * H): the outputs of the target layers, in
        the order of target_layer_ids. block_starts (B,) int32, of a pass made for packed rows: ids, positions and slots
        are (T,) then, and T stands for B * Q.
        """


class Target(Protocol):
    """A causal language model whose K/V are in our pages."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    max_context: int
    dtype: torch.dtype
    device: torch.device
    cache: CacheShape
    embedding: torch.Tensor | PackedWeight  # (V, H), for drafters without their own; packed in blocks
    embedding_scale: float  # that the target's embedding applies to its rows
    head: torch.Tensor | PackedWeight  # (V, H), likewise
    head_bias: torch.Tensor | None  # (V,)
    graph_safe: bool  # a pass runs dflash ops alone, so a graph can capture it
    packs: bool  # make_pass takes rows: blocks of several lengths, one after another
    reuses: bool  # K/V of a token depend on it and those before it alone, to the bit, so other requests can use them

    def make_pass(
        self, batch: int, width: int, caches: Sequence[PagedKV], target_layer_ids: Sequence[int] = (),
        rows: int | None = None
    ) -> TargetPass:
        """caches: one per layer, of shape self.cache. target_layer_ids: the layers whose outputs are collected.
        rows: T of blocks that are packed; None: B * Q."""

    def next_ids(self, rows: torch.Tensor, ids: torch.Tensor, values: torch.Tensor) -> None:
        """rows (R, H) from a pass -> the most likely next tokens, ids (R,) int64, and their logits, values (R,)."""

    def logits(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        """rows (R, H) from a pass -> out (R, V), contiguous and in the target's dtype. next_ids is its argmax."""
