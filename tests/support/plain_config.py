"""A drafter's config.json read a second time, by other code than the package's: what the dense drafter computes with.

Rotary tables are transformers' where its kinds go, and masks are those that bench/published.json states.
"""

import functools
from types import SimpleNamespace

import torch


class PlainRope:
    """One layer's table of cosines and sines, of the formula or of transformers."""

    def __init__(self, theta, rotary_dim, scaling, head_dim, most, interleaved):
        self.interleaved = interleaved
        self.theta, self.rotary_dim, self.scaling = float(theta), rotary_dim, scaling
        self.head_dim, self.most = head_dim, most

    @functools.cache  # noqa: B019 (lives as long as a test)
    def table(self, length):
        if not self.scaling:
            inverse = self.theta ** -(torch.arange(0, self.rotary_dim, 2).float() / self.rotary_dim)
            angles = torch.arange(length).float()[:, None] * inverse
            return torch.cat((angles.cos(), angles.sin()), -1)
        from transformers import Qwen3Config
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

        made = Qwen3Config(head_dim=self.head_dim, max_position_embeddings=self.most,
                           rope_parameters={**self.scaling, "rope_theta": self.theta})
        cos, sin = Qwen3RotaryEmbedding(made)(torch.zeros(1), torch.arange(length)[None])
        half = self.rotary_dim // 2
        return torch.cat((cos[0, :, :half], sin[0, :, :half]), -1)


def plain_config(config, attention):
    """attention: [number of layers, window or 0, causal] for each run of layers."""
    geometry = config.get("transformer_layer_config") or config
    nested = config.get("dflash_config") or {}

    def get(name, default=None):
        found = [place[name] for place in (nested, config, geometry) if place.get(name) is not None]
        return found[0] if found else default

    scaling = get("rope_scaling") or get("rope_parameters") or {}
    theta = get("rope_theta") or scaling["rope_theta"]
    kind = scaling.get("rope_type", "default")
    head_dim = geometry["head_dim"]
    rope = PlainRope(theta, int(head_dim * get("partial_rotary_factor", 1.0)), {} if kind == "default" else scaling,
                     head_dim, get("max_position_embeddings"), get("rope_is_neox_style") is False)
    masks = [SimpleNamespace(causal=causal, sinks=bool(get("attention_sink_bias")),
                             window=(window - 1, -1 if causal else window - 1) if window else (-1, -1))
             for count, window, causal in attention for _ in range(count)]
    ids = get("target_layer_ids") or [i - 1 for i in get("aux_hidden_state_layer_ids")]
    return SimpleNamespace(
        masks=masks, ropes=[rope] * len(masks), rms_norm_eps=get("rms_norm_eps"), head_dim=head_dim,
        num_heads=geometry["num_attention_heads"], num_kv_heads=geometry["num_key_value_heads"],
        value_scale=get("attention_value_scale", 1.0), target_layer_ids=ids, block=get("block_size"),
        mask=get("mask_token_id"), vocab=get("draft_vocab_size") or get("vocab_size", 1 << 31),
        input_scale=get("input_embedding_scale"), factor=get("output_multiplier", 1.0),
        cap=get("final_logit_softcapping", 0.0), candidates=get("selector_top_k"), markov=get("markov_rank", 0))
