"""Targets and drafters with random weights in a real model's geometry, made on the device that times them.

No checkpoint of 16 GB has to be copied to a machine, and a tensor on "meta" takes no memory.
"""

from collections.abc import Callable, Iterator, Mapping

import torch

from bench.model.step import Geometry, Layers
from dflash_decode.model.config import read_draft_config
from dflash_decode.model.drafter import Drafter, tensor_shapes
from dflash_decode.model.native import NativeTarget


class Tensors(Mapping):
    """A checkpoint whose tensors are made on demand and not kept."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], make: Callable[..., torch.Tensor]):
        self.shapes, self.make = shapes, make

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        # Norms are ones; what a product adds up stays near 1.
        return self.make(*shape) * shape[-1] ** -0.5 if len(shape) > 1 else torch.ones_like(self.make(*shape))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def random_on(device: torch.device | str, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    return lambda *shape: torch.randn(shape, dtype=dtype, device=device)


def layer_shapes(x: Layers, prefix: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a dense layer with q and k norms, as in Qwen3."""
    q, kv = x.heads * x.head_dim, x.kv_heads * x.head_dim
    shapes = {"self_attn.q_proj": (q, x.hidden), "self_attn.k_proj": (kv, x.hidden), "self_attn.v_proj": (kv, x.hidden),
              "self_attn.o_proj": (x.hidden, q), "self_attn.q_norm": (x.head_dim,), "self_attn.k_norm": (x.head_dim,),
              "mlp.gate_proj": (x.mlp, x.hidden), "mlp.up_proj": (x.mlp, x.hidden), "mlp.down_proj": (x.hidden, x.mlp),
              "input_layernorm": (x.hidden,), "post_attention_layernorm": (x.hidden,)}
    return {f"{prefix}{name}.weight": shape for name, shape in shapes.items()}


def random_target(g: Geometry, device: torch.device | str, dtype: torch.dtype, max_context: int,
                  layers: int | None = None) -> NativeTarget:
    """layers: their number; by default all. max_context: the number of positions."""
    t, count = g.target, layers or g.target.layers
    config = {"model_type": "qwen3", "hidden_size": t.hidden, "num_attention_heads": t.heads,
              "num_key_value_heads": t.kv_heads, "head_dim": t.head_dim, "intermediate_size": t.mlp,
              "num_hidden_layers": count, "vocab_size": g.vocab, "max_position_embeddings": max_context}
    shapes = {"model.embed_tokens.weight": (g.vocab, t.hidden), "lm_head.weight": (g.vocab, t.hidden),
              "model.norm.weight": (t.hidden,)}
    for i in range(count):
        shapes |= layer_shapes(t, f"model.layers.{i}.")
    return NativeTarget(config, Tensors(shapes, random_on(device, dtype)), dtype=dtype, device=device)


def random_drafter(g: Geometry, target: NativeTarget) -> Drafter:
    d = g.draft
    config = read_draft_config({
        "hidden_size": d.hidden, "intermediate_size": d.mlp, "num_attention_heads": d.heads, "head_dim": d.head_dim,
        "num_key_value_heads": d.kv_heads, "num_hidden_layers": d.layers, "block_size": g.block, "vocab_size": g.vocab,
        "mask_token_id": 0, "rope_theta": 10000.0, "num_target_layers": target.num_layers,
        "target_layer_ids": [i * target.num_layers // g.target_layer_ids for i in range(g.target_layer_ids)]})
    return Drafter(config, Tensors(tensor_shapes(config), random_on(target.device, target.dtype)), target)
