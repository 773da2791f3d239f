"""The target in PyTorch: a dense Llama-like model that returns its hidden states for thousands of rows, on any device,
with torch's own operators."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dflash_decode.checkpoint import Checkpoint, load_checkpoint
from dflash_decode.model.rope import Rope


def rope_table(head_dim: int, theta: float, positions: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos, sin (positions, head_dim), half-split layout, float32."""
    cos, sin = Rope(theta, head_dim).table(positions, device).chunk(2, -1)
    return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of x (..., head_dim); cos, sin broadcast against it."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


@dataclass
class Layer:
    input_norm: torch.Tensor
    qkv: torch.Tensor
    o: torch.Tensor
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class Target:
    """checkpoint: config and tensors of a Llama-like model without biases, with tied embeddings or its own head."""

    def __init__(self, checkpoint: Checkpoint, device: str | torch.device = "cpu", max_positions: int = 2048):
        c, take = checkpoint.config, lambda name: checkpoint.tensor(name).to(device)
        if c.get("model_type") != "llama" or c.get("attention_bias"):
            raise ValueError(f"target: model_type must be llama without biases; got {c.get('model_type')}")
        self.config, self.device = c, torch.device(device)
        self.hidden, self.eps, self.vocab = c["hidden_size"], c["rms_norm_eps"], c["vocab_size"]
        self.heads, self.kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        self.head_dim = c.get("head_dim") or self.hidden // self.heads
        self.embedding, self.norm = take("model.embed_tokens.weight"), take("model.norm.weight")
        self.head = take("lm_head.weight") if "lm_head.weight" in checkpoint.tensors else self.embedding
        self.dtype = self.embedding.dtype
        self.layers = []
        for i in range(c["num_hidden_layers"]):
            at = f"model.layers.{i}."
            self.layers.append(Layer(
                input_norm=take(at + "input_layernorm.weight"),
                qkv=torch.cat([take(f"{at}self_attn.{n}_proj.weight") for n in "qkv"]),
                o=take(at + "self_attn.o_proj.weight"),
                post_norm=take(at + "post_attention_layernorm.weight"),
                gate_up=torch.cat([take(f"{at}mlp.{n}_proj.weight") for n in ("gate", "up")]),
                down=take(at + "mlp.down_proj.weight")))
        table = rope_table(self.head_dim, float(c["rope_theta"]), max_positions, self.device)
        self.cos, self.sin = (t.to(self.dtype) for t in table)

    @classmethod
    def load(cls, model: str, device: str | torch.device = "cpu", max_positions: int = 2048) -> "Target":
        return cls(load_checkpoint(model, torch.bfloat16), device, max_positions)

    def normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (self.hidden,), weight, self.eps)

    def _qkv(self, layer: Layer, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
        """x (B, T, H) -> q (B, heads, T, D), k, v (B, kv_heads, T, D), q and k rotated."""
        b, t, _ = x.shape
        qkv = F.linear(self.normed(x, layer.input_norm), layer.qkv).view(b, t, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), 1)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def _mlp(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(self.normed(x, layer.post_norm), layer.gate_up).chunk(2, -1)
        return F.linear(F.silu(gate) * up, layer.down)

    @torch.inference_mode()
    def forward(self, ids: torch.Tensor, target_layer_ids: Iterable[int] = ()):
        """ids (B, T) padded on the right -> the final normed hidden states (B, T, H) and the outputs of the layers
        `target_layer_ids`, each (B, T, H)."""
        x, target_layer_ids, seen = F.embedding(ids, self.embedding), set(target_layer_ids), {}
        cos, sin = self.cos[:ids.shape[1]], self.sin[:ids.shape[1]]
        for i, layer in enumerate(self.layers):
            q, k, v = self._qkv(layer, x, cos, sin)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + F.linear(out.transpose(1, 2).flatten(2), layer.o)
            x = x + self._mlp(layer, x)
            if i in target_layer_ids:
                seen[i] = x
        return self.normed(x, self.norm), [seen[i] for i in sorted(seen)]
