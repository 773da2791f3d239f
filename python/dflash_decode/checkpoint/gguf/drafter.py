"""DFlash drafters in GGUF files: architectures dflash (llama.cpp) and dflash-draft (its forks).

llama.cpp numbers a target layer by its input, which is one more than target_layer_ids, the numbers of outputs. The
forks keep target_layer_ids.
"""

import re
from collections.abc import Mapping, Sequence

from ..fields import MOST_HEAD_DIM, MOST_LAYERS, Fields
from .rope import read_rope
from .window import read_window

ARCHITECTURES = ("dflash", "dflash-draft")
_LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "attn_sinks": "self_attn.attention_sink_bias",
    "ffn_norm": "post_attention_layernorm", "post_attention_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_conv_base": "attention_conv.base_kernel", "attn_conv_proj": "attention_conv.kernel_projection",
    "ffn_conv_base": "mlp_conv.base_kernel", "ffn_conv_proj": "mlp_conv.kernel_projection",
}
_TOP = {
    "fc.weight": "fc.weight", "dflash_fc.weight": "fc.weight", "dflash.fc.weight": "fc.weight",
    "enc.output_norm.weight": "hidden_norm.weight", "dflash_hidden_norm.weight": "hidden_norm.weight",
    "dflash.hidden_norm.weight": "hidden_norm.weight", "output_norm.weight": "norm.weight",
    "token_embd.weight": "embed_tokens.weight", "output.weight": "lm_head.weight",
    "selector_hidden.weight": "candidate_selector.hidden_projection.weight",
    "selector_predecessor.weight": "candidate_selector.predecessor_codebook",
    "selector_successor.weight": "candidate_selector.successor_codebook",
    "markov_w1.weight": "markov_head.markov_w1.weight", "markov_w2.weight": "markov_head.markov_w2.weight",
    "conf_proj.weight": "confidence_head.proj.weight", "conf_proj.bias": "confidence_head.proj.bias", "d2t": "d2t",
}
_BARE = ("attention_sink_bias", "base_kernel")  # have no ".weight" in a Hugging Face checkpoint
# Field of the config -> its key behind the architecture's name, and how Fields reads it.
_COPIED = {
    "hidden_size": ("embedding_length", "whole"), "intermediate_size": ("feed_forward_length", "whole"),
    "num_attention_heads": ("attention.head_count", "whole"),
    "num_key_value_heads": ("attention.head_count_kv", "whole"), "head_dim": ("attention.key_length", "whole"),
    "max_position_embeddings": ("context_length", "whole"),
    "rms_norm_eps": ("attention.layer_norm_rms_epsilon", "number"),
    "conv_kernel_size": ("conv_kernel_size", "whole"), "conv_group_size": ("conv_group_size", "whole"),
    "selector_rank": ("selector_rank", "whole"), "selector_top_k": ("selector_top_k", "whole"),
    "sample_from_anchor": ("sample_from_anchor", "flag"),
    "final_logit_softcapping": ("final_logit_softcapping", "number"), "hidden_act": ("hidden_activation", "text"),
    "attention_value_scale": ("attention.value_scale", "number"), "output_multiplier": ("logit_scale", "number"),
    "input_embedding_scale": ("embedding_scale", "number"),
}
_FACTORS = ("attention_value_scale", "output_multiplier", "input_embedding_scale")  # 0 is none in llama.cpp
_UNUSED = ("version", "n_target_layers", "dflash.n_target_layers", "dflash.n_target_features", "expert_count", "rope.",
           "has_confidence_head")


def drafter_name(name: str) -> str | None:
    """The name of a GGUF tensor in z-lab's checkpoints, or None."""
    if name in _TOP:
        return _TOP[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+?)(?:\.(weight|bias))?", name)
    if not match or match[2] not in _LAYER:
        return None
    new = f"layers.{match[1]}.{_LAYER[match[2]]}"
    return new if new.endswith(_BARE) else f"{new}.{match[3]}" if match[3] else None


def read_drafter(f: Fields, arch: str, tensors: Mapping[str, Sequence[int]]) -> dict:
    """config.json of the drafter that the metadata describe, and its tensors' shapes, which the file has innermost
    first. Raises CheckpointError, also for a key of the architecture that is not known."""
    layers = f.whole(f"{arch}.block_count", most=MOST_LAYERS)
    head_dim = f.whole(f"{arch}.attention.key_length", most=MOST_HEAD_DIM)
    if (width := f.whole(f"{arch}.attention.value_length", head_dim)) != head_dim:
        f.refuse(f"{arch}.attention.value_length", f"key_length = {head_dim}", width)
    vocab = f.whole(f"{arch}.vocab_size", len(f.items("tokenizer.ggml.tokens", ())) or None)
    if vocab is None:
        f.refuse(f"{arch}.vocab_size (or tokenizer.ggml.tokens)", "there", None)
    config = {name: getattr(f, kind)(f"{arch}.{key}", None) for name, (key, kind) in _COPIED.items()}
    config = {name: value for name, value in config.items() if value is not None and (value or name not in _FACTORS)}
    config |= {
        "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "num_hidden_layers": layers, "vocab_size": vocab,
        "rope_parameters": read_rope(f, arch, head_dim), "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors, "attention_sink_bias": "blk.0.attn_sinks.weight" in tensors,
        **_window(f, arch, layers), "dflash_config": _block(f, arch),
    }
    for name, tensor in (("markov_rank", "markov_w1.weight"), ("draft_vocab_size", "d2t")):
        if tensor in tensors:
            config[name] = int(tensors[tensor][0])
    if (causal := f.flag(f"{arch}.attention.causal", None)) is not None:  # otherwise the layers' types say it
        config["is_causal"] = causal
    for name in f.places[0]:
        key = name.removeprefix(f"{arch}.")
        if key != name and name not in f.seen and not key.startswith(_UNUSED):
            f.refuse(name, "absent, as it is not known", f.get(name))
    return config


def _block(f: Fields, arch: str) -> dict:
    """block_size, mask_token_id and target_layer_ids."""
    block = f.whole(f"{arch}.block_size", f.whole(f"{arch}.dflash.block_size", None))
    mask = f.whole("tokenizer.ggml.mask_token_id", f.whole(
        f"{arch}.mask_token_id", f.whole(f"{arch}.dflash.mask_token_id", None, least=0), least=0), least=0)
    inputs = f.items(f"{arch}.target_layers", None, int, "layer numbers")
    outputs = f.items(f"{arch}.dflash.target_layer_ids", None, int, "layer numbers")
    if (inputs is None) == (outputs is None):
        f.refuse(f"{arch}.target_layers (or {arch}.dflash.target_layer_ids)", "a list of layer numbers, in one place",
                 outputs)
    ids = [i - 1 for i in inputs] if inputs is not None else list(outputs or ())
    return {"block_size": block, "mask_token_id": mask, "target_layer_ids": ids}


def _window(f: Fields, arch: str, layers: int) -> dict:
    window = read_window(f, arch, layers)
    return window and window | {"use_sliding_window": "sliding_attention" in window["layer_types"]}
