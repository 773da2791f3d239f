"""The dense MLP of a decoder layer: down(silu(gate(x)) * up(x))."""

from dataclasses import dataclass
from typing import Any

import torch

from dflash_kernels import silu_and_mul

from .tensors import Packer, Tensors, Weight


@dataclass(frozen=True)
class Mlp:
    """width: of the activations. A biased one has both biases."""

    width: int
    gate_up: Weight
    gate_up_bias: torch.Tensor | None
    down: Weight
    down_bias: torch.Tensor | None

    @property
    def shape(self) -> int:
        """Layers of one shape share the memory of a pass."""
        return self.width

    def memory(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For rows like x (T, H)."""
        return x.new_zeros(len(x), 2 * self.width), x.new_zeros(len(x), self.width)

    def run(self, x: torch.Tensor, out: torch.Tensor, memory: Any) -> None:
        gate_up, act = memory
        self.gate_up.product(x, self.gate_up_bias, gate_up)
        silu_and_mul(gate_up, out=act)
        self.down.product(act, self.down_bias, out)


def take_mlp(tensors: Tensors, prefix: str, hidden: int, width: int, bias: bool, pack: Packer) -> Mlp:
    def projection(name, n, k):
        weight = tensors.take_weight(f"{prefix}{name}.weight", n, k)
        return weight, tensors.take(f"{prefix}{name}.bias", n) if bias else None

    gate, gate_bias = projection("gate_proj", width, hidden)
    up, up_bias = projection("up_proj", width, hidden)
    down, down_bias = projection("down_proj", hidden, width)
    both = torch.cat((gate_bias, up_bias)) if gate_bias is not None and up_bias is not None else None
    return Mlp(width, Weight(pack, gate, up), both, Weight(pack, down), down_bias)
