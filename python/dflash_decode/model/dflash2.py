"""What DFlash2 adds to a drafter: a convolution before and after each attention and MLP, and a selector of candidates.

    h = norm(x);  own = projection(h);  h = conv(h, own[0]);  x += conv(attention or MLP of h, own[1])

The projection of a sublayer's normed input gives the coefficients of both convolutions. The second one is fused with
the addition and the norm that follow it.
"""

from dataclasses import dataclass

import torch

from dflash_kernels import PackedWeight, grouped_conv, grouped_conv_add_rms_norm, linear

from .config import Convolution, DraftConfig
from .tensors import Packer, Tensors


@dataclass(frozen=True)
class Conv:
    """base (2, taps, H): of the convolution before the sublayer, and of the one after it."""

    base: torch.Tensor
    projection: PackedWeight


@dataclass(frozen=True)
class CandidateSelector:
    """Codebooks (V, rank) by the target's ids."""

    predecessor: torch.Tensor
    successor: torch.Tensor
    projection: PackedWeight


def take_conv(tensors: Tensors, name: str, hidden: int, conv: Convolution, pack: Packer) -> Conv:
    base = tensors.take(f"{name}.base_kernel", 2, conv.taps, hidden).contiguous()
    rows = 2 * conv.taps * (hidden // conv.group)
    return Conv(base, pack(tensors.take(f"{name}.kernel_projection.weight", rows, hidden)))


def take_selector(tensors: Tensors, c: DraftConfig, pack: Packer) -> CandidateSelector | None:
    if c.selector is None:
        return None
    predecessor, successor = (
        tensors.take(f"candidate_selector.{name}", c.vocab_size, c.selector.rank).contiguous()
        for name in ("predecessor_codebook", "successor_codebook"))
    hidden = tensors.take("candidate_selector.hidden_projection.weight", c.selector.rank, c.hidden_size)
    return CandidateSelector(predecessor, successor, pack(hidden))


class ConvMemory:
    """Both convolutions of one sublayer after the other, over B blocks of Q rows, in memory of their own."""

    def __init__(self, conv: Convolution, batch: int, width: int, like: torch.Tensor):
        """like: a tensor (..., H) with the dtype and device of the rows."""
        hidden = like.shape[-1]
        self.blocks = (batch, width, hidden)
        self.own = like.new_zeros(batch, width, 2, conv.taps, hidden // conv.group)
        self.before = like.new_zeros(batch * width, hidden)

    def start(self, conv: Conv, normed: torch.Tensor) -> torch.Tensor:
        """The sublayer's input (T, H) from its normed rows; keeps the coefficients of the convolution after it."""
        linear(normed, conv.projection, out=self.own.view(len(normed), -1))
        grouped_conv(normed.view(self.blocks), self.own[:, :, 0], conv.base[0], out=self.before.view(self.blocks))
        return self.before

    def finish(self, conv: Conv, added: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float,
               out: torch.Tensor, residual_out: torch.Tensor | None) -> None:
        """out = norm(residual + conv(added)) (T, H); the sum goes to residual_out, or in place of residual."""
        grouped_conv_add_rms_norm(
            added.view(self.blocks), self.own[:, :, 1], conv.base[1], residual.view(self.blocks), weight, eps,
            out=out.view(self.blocks), residual_out=None if residual_out is None else residual_out.view(self.blocks))
