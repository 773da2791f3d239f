"""The MLPs of a mixture of experts in a decoder layer: a router, experts, and perhaps a shared MLP that every row
goes through.

    out = expert_mlp(x, route_experts(router(x))) + shared(x)
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from dflash_kernels import PackedExperts, PackedWeight, add_rms_norm, expert_mlp, linear, pack_weight, route_experts

from .experts import Layout, take_weights
from .mlp import Mlp, take_mlp
from .tensors import Packer, Tensors


@dataclass(frozen=True)
class ExpertsConfig:
    """experts: their number, each `width` wide, of which a row goes through `chosen`.

    routing: options of route_experts, as (name, value) pairs. correction: the router has a bias that counts in the
    choice alone. bias: router and experts have biases. shared: the width of the shared MLP; 0: there is none.
    dense: the numbers of the layers that have a dense MLP instead.
    """

    experts: int
    chosen: int
    width: int
    layout: Layout
    routing: tuple[tuple[str, Any], ...] = ()
    correction: bool = False
    bias: bool = False
    activation: str = "silu"
    shared: int = 0
    dense: frozenset[int] = frozenset()


@dataclass(frozen=True)
class _Memory:
    """routed, shared: where there is a shared MLP, the experts' sum, and that MLP's memory."""

    logits: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    routed: torch.Tensor | None = None
    shared: Any = None


@dataclass(frozen=True)
class Experts:
    config: ExpertsConfig
    router: PackedWeight
    router_bias: torch.Tensor | None
    correction: torch.Tensor | None
    gate_up: PackedExperts
    gate_up_bias: torch.Tensor | None
    down: PackedExperts
    down_bias: torch.Tensor | None
    shared: Mlp | None
    ones: torch.Tensor = field(repr=False)

    @property
    def shape(self) -> ExpertsConfig:
        """Layers of one shape share the memory of a pass."""
        return self.config

    def memory(self, x: torch.Tensor) -> _Memory:
        """For rows like x (T, H)."""
        c, rows = self.config, len(x)
        ids = torch.zeros((rows, c.chosen), dtype=torch.int32, device=x.device)
        routing = x.new_zeros(rows, c.experts), ids, torch.zeros_like(ids, dtype=torch.float32)
        return _Memory(*routing, torch.zeros_like(x), self.shared.memory(x)) if self.shared else _Memory(*routing)

    def run(self, x: torch.Tensor, out: torch.Tensor, memory: Any) -> None:
        c, m = self.config, memory
        linear(x, self.router, self.router_bias, out=m.logits)
        route_experts(m.logits, c.chosen, bias=self.correction, out_ids=m.ids, out_weights=m.weights,
                      **dict(c.routing))
        routed = expert_mlp(x, self.gate_up, self.down, m.ids, m.weights, gate_up_bias=self.gate_up_bias,
                            down_bias=self.down_bias, activation=c.activation, out=m.routed if self.shared else out)
        if self.shared:
            self.shared.run(x, out, m.shared)
            add_rms_norm(routed, out, self.ones, out=routed)  # for its sum, out += routed; the norm is not used


def take_experts(tensors: Tensors, prefix: str, c: ExpertsConfig, hidden: int, pack: Packer, int8: bool) -> Experts:
    """A layer's experts. prefix: of the layer's tensors."""
    at = c.layout.block_of(tensors, prefix)
    router = tensors.take(f"{at}{c.layout.router}.weight", c.experts, hidden)
    correction = None
    if c.correction:
        correction = tensors.take(at + c.layout.correction, c.experts, dtype=torch.float32)
    found = take_weights(tensors, f"{at}experts", c.layout, (c.experts, hidden, c.width), c.bias, int8)
    return Experts(
        c, pack_weight(router), tensors.take(f"{at}{c.layout.router}.bias", c.experts) if c.bias else None, correction,
        found.gate_up, found.gate_up_bias, found.down, found.down_bias,
        take_mlp(tensors, f"{at}shared_experts.", hidden, c.shared, False, pack) if c.shared else None,
        torch.ones(hidden, dtype=router.dtype, device=router.device))
