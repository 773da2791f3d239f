"""Context K/V of all draft layers, written to their caches."""

import torch

from ._wide import wide
from .rope import in_table, norm_rope, scatter


def write_context_kv(kv, positions, slots, k_caches, v_caches, k_scales, v_scales, k_weights, cos_sin, commit_lens, eps,
                     v_scale, interleaved, round_each):
    num_layers, (num_kv_heads, head_dim) = len(k_caches), k_caches[0].shape[2:]
    rows = kv.unflatten(-1, (num_layers, 2, num_kv_heads, head_dim))
    keep = in_table(positions, cos_sin)
    if commit_lens is not None and kv.shape[0]:
        block = torch.arange(kv.shape[0] // commit_lens.shape[0], device=kv.device)
        keep = keep & (block < commit_lens[:, None]).flatten()
    for layer in range(num_layers):
        weight = None if k_weights is None else k_weights[layer]
        k = norm_rope(rows[:, layer, 0], weight, cos_sin, positions, eps, interleaved, round_each)
        v = rows[:, layer, 1]
        if v_scale != 1.0:
            v = (wide(v) * v_scale).to(kv.dtype)
        layer_slots = slots if slots.dim() == 1 else slots[layer]
        scatter(k_caches[layer], layer_slots, k, keep, k_scales[layer] if k_scales else None)
        scatter(v_caches[layer], layer_slots, v, keep, v_scales[layer] if v_scales else None)
