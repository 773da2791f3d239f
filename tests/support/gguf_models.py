"""Writes a transformers model to a GGUF file as llama.cpp's converter does: the names are of the gguf package's own
table, and what differs beside names is undone by hand here."""

import gguf
import numpy as np
import torch

from tests.support.gguf_files import write_gguf


def write_model(path, model, arch, **changes):
    """The GGUF file of a model. changes: metadata, as of write_gguf."""
    config, layers = model.config, model.config.num_hidden_layers
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[arch], layers)
    tensors = dict(_extra(config))
    for name, t in _as_converter(model, arch):
        base, _, end = name.rpartition(".")
        found = names.get_name(base) or names.get_name(name)
        assert found, name
        tensors[f"{found}.{end if end in ('weight', 'bias') else 'weight'}"] = t.float().numpy()
    heads, head_dim = config.num_attention_heads, getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // heads
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    fields = {
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "block_count": layers, "feed_forward_length": config.intermediate_size, "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads, "attention.key_length": head_dim,
        "attention.value_length": head_dim, "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "vocab_size": config.vocab_size,
    } | {key: value for key, value in _fields(config, rope).items() if value}
    vocabulary = {"tokens": ["<e>", *(f"t{i}" for i in range(config.vocab_size - 1))], "merges": ["t0 t1"],
                  "token_type": [3] + [1] * (config.vocab_size - 1)}
    write_gguf(path, arch, tensors=tensors, **{
        **{f"ARCH__{key.replace('.', '__')}": value for key, value in fields.items()},
        "tokenizer__ggml__tokens": [*vocabulary["tokens"][:-1], "t0t1"],
        "tokenizer__ggml__merges": vocabulary["merges"], "tokenizer__ggml__token_type": vocabulary["token_type"],
        "tokenizer__chat_template": "x", **changes})


def _fields(config, rope):
    """Metadata that some architectures have."""
    kind = rope["rope_type"]
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    found = {"attention.sliding_window": getattr(config, "sliding_window", None)}
    if experts:
        found |= {"expert_count": experts, "expert_used_count": config.num_experts_per_tok,
                  "expert_feed_forward_length": getattr(config, "moe_intermediate_size", config.intermediate_size)}
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if kind == "longrope":
        scale = config.max_position_embeddings / rope["original_max_position_embeddings"]
        factor = (1 + np.log(scale) / np.log(rope["original_max_position_embeddings"])) ** 0.5
        found |= {"rope.scaling.type": kind, "rope.scaling.attn_factor": float(factor),
                  "rope.scaling.original_context_length": rope["original_max_position_embeddings"]}
    return found


def _extra(config):
    """Factors of the frequencies."""
    rope = config.rope_parameters
    if rope.get("rope_type") == "longrope":
        for name in ("short", "long"):
            yield f"rope_factors_{name}.weight", np.array(rope[f"{name}_factor"], np.float32)
    if rope.get("rope_type") == "llama3":
        dim, old = config.head_dim, rope["original_max_position_embeddings"]
        low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
        factors = []
        for power in range(0, dim, 2):
            wave = 2 * np.pi * rope["rope_theta"] ** (power / dim)
            mix = (old / wave - low) / (high - low)
            factors.append(1.0 if wave < old / high else factor if wave > old / low else 1 / ((1 - mix) / factor + mix))
        yield "rope_freqs.weight", np.array(factors, np.float32)


def _as_converter(model, arch):
    """The tensors by their Hugging Face names, with the values and shapes that a file has."""
    config, tied = model.config, model.config.tie_word_embeddings
    for name, t in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        if arch in ("llama", "smollm3") and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            t = t.reshape(heads, 2, len(t) // heads // 2, -1).transpose(1, 2).reshape(t.shape)
        if arch == "gemma3" and name.endswith("norm.weight"):
            t = t.float() + 1
        prefix, found, part = name.partition("mlp.experts.")
        if not found:
            yield name, t
        elif arch == "qwen3moe":
            yield from _expert_parts(prefix + found, part, t.chunk(2, 1) if part == "gate_up_proj" else [t])
        elif part.endswith("_bias"):
            yield from _expert_parts(prefix + found, part, [t[:, ::2], t[:, 1::2]] if "gate" in part else [t])
        else:
            t = t.transpose(1, 2)
            yield from _expert_parts(prefix + found, part, [t[:, ::2], t[:, 1::2]] if "gate" in part else [t])


def _expert_parts(prefix, part, parts):
    end = "bias" if part.endswith("_bias") else "weight"
    names = ("gate_proj", "up_proj") if len(parts) == 2 else ("down_proj",)
    for name, t in zip(names, parts, strict=True):
        yield f"{prefix}{name}.{end}", torch.as_tensor(t).contiguous()
