"""The MLPs of a mixture of experts. Activations by their number: 0 "silu", 1 "clamped"."""

import torch

from .._constants import GATE_ALPHA, GATE_LIMIT
from ._wide import wide
from .linear import unpack


def activated(sums, activation):
    gate, up = sums.chunk(2, dim=-1)
    if activation == 0:
        return gate / (1 + torch.exp(-gate)) * up
    gate, up = gate.clamp(max=GATE_LIMIT), up.clamp(-GATE_LIMIT, GATE_LIMIT)
    return gate / (1 + torch.exp(-GATE_ALPHA * gate)) * (up + 1)


def expert_mlp(x, gate_up, down, gate_up_scales, down_scales, ids, weights, gate_up_bias, down_bias, inner, activation,
               first_expert, out):
    def product(rows, weight, scales, bias, e, n):
        own = weight[e] if weight.dim() == 3 else unpack(weight[e], n, rows.shape[-1])
        sums = wide(rows) @ own.to(wide(rows).dtype).T
        if scales is not None:
            sums = sums * scales[e]
        return sums if bias is None else sums + wide(bias[e])

    places = ids.long() - first_expert
    products = torch.zeros(*ids.shape, x.shape[1], dtype=wide(x).dtype, device=x.device)
    for e in places.unique().tolist():
        if 0 <= e < len(gate_up):
            rows, slots = torch.where(places == e)
            hidden = activated(product(x[rows], gate_up, gate_up_scales, gate_up_bias, e, 2 * inner), activation)
            products[rows, slots] = product(hidden.to(x.dtype), down, down_scales, down_bias, e, x.shape[1])
    total = torch.zeros_like(products[:, 0])
    for slot in range(ids.shape[1]):
        inside = (places[:, slot] >= 0) & (places[:, slot] < len(gate_up))
        total = torch.where(inside[:, None], total + wide(weights[:, slot, None]) * products[:, slot], total)
    out.copy_(total)
