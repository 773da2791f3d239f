"""Target models in GGUF files: of each architecture the Hugging Face names of its tensors, its config, and how its
tensors differ from those of a Hugging Face checkpoint."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from ..fields import Fields
from .rope import FACTORS
from .window import read_window

_ATTENTION = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
              "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_DENSE = _ATTENTION | {"ffn_norm": "post_attention_layernorm"} | _MLP
# Joined into two tensors of a layer once all are there.
_EXPERTS = {f"ffn_{part}_exps": f"mlp.experts.{part}" for part in ("gate", "up", "down")}
_TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight"}
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Family:
    """layer: the tensors of a layer, by their names in the file. config: fields beside those of every family, or in
    their place. converted: the tensors by their names in a checkpoint, from those by `layer`'s. native: our own layers
    run it; others run in transformers. interleaved: rows of queries and keys are in the order of interleaved RoPE.
    offset: what is stored of a norm's weight is this much more."""

    model_type: str
    architecture: str
    layer: Mapping[str, str]
    config: Callable[[Fields, str, dict], dict] = lambda f, arch, config: {}
    converted: Callable[[Tensors], Tensors] = lambda tensors: tensors
    native: bool = True
    interleaved: bool = False
    offset: float = 0.0
    bare: tuple[str, ...] = ()  # names without ".weight" in a Hugging Face checkpoint

    def name(self, stored: str) -> str | None:
        """The name of a tensor of the file; "" if it is part of the config, None if the family has no such tensor."""
        if stored in FACTORS:
            return ""
        if stored in _TOP:
            return _TOP[stored]
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", stored)
        if not match or match[2] not in self.layer:
            return None
        new = f"model.layers.{match[1]}.{self.layer[match[2]]}"
        return new if self.layer[match[2]] in self.bare else f"{new}.{match[3]}"

    def needed(self, layers: int) -> Iterator[str]:
        """The tensors that a file must have."""
        yield from ("token_embd.weight", "output_norm.weight")
        yield from (f"blk.{i}.{name}.weight" for i in range(layers) for name in self.layer)

    @property
    def has_experts(self) -> bool:
        return "ffn_gate_exps" in self.layer


def _llama(f: Fields, arch: str, config: dict) -> dict:
    if f.whole(f"{arch}.expert_count", 0, least=0):
        f.refuse(f"{arch}.expert_count", "0 (a dense model; a mixture of experts runs from its directory of "
                 "safetensors)", f.get(f"{arch}.expert_count"))
    return {}


def _smollm3(f: Fields, arch: str, config: dict) -> dict:
    # The file does not say which layers have no RoPE: every fourth.
    return {"no_rope_layers": [int((i + 1) % 4 != 0) for i in range(config["num_hidden_layers"])],
            "use_sliding_window": False, "sliding_window": None}


def _qwen3moe(f: Fields, arch: str, config: dict) -> dict:
    return _experts_config(f, arch) | {
        "moe_intermediate_size": f.whole(f"{arch}.expert_feed_forward_length"), "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
        "intermediate_size": f.whole(f"{arch}.feed_forward_length", config["hidden_size"])}


def _gpt_oss(f: Fields, arch: str, config: dict) -> dict:
    rope = config["rope_parameters"]
    if rope["rope_type"] == "yarn":  # published so; the file does not say it
        rope = rope | {"truncate": False}
    experts = _experts_config(f, arch)
    return {"num_local_experts": experts["num_experts"], "num_experts_per_tok": experts["num_experts_per_tok"],
            "intermediate_size": f.whole(f"{arch}.expert_feed_forward_length"), "attention_bias": True,
            "rope_parameters": rope, **read_window(f, arch, config["num_hidden_layers"], every=2)}


def _gemma3(f: Fields, arch: str, config: dict) -> dict:
    layers, head_dim = config["num_hidden_layers"], config["head_dim"]
    window = read_window(f, arch, layers, every=6) or {"layer_types": ["full_attention"] * layers}
    local = f.number(f"{arch}.rope.freq_base_swa", 10000.0, above=1.0)
    of_27b = layers == 62  # the one size whose queries are not scaled by their own length
    return {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": local},
                                "full_attention": config["rope_parameters"]},
            "rope_theta": None, "hidden_act": None, "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"] if of_27b else head_dim,
            "final_logit_softcapping": f.number(f"{arch}.final_logit_softcapping", None), **window}


def _phi3(f: Fields, arch: str, config: dict) -> dict:
    return {"sliding_window": f.whole(f"{arch}.attention.sliding_window", 0, least=0) or None, "pad_token_id": None,
            "original_max_position_embeddings": f.whole(f"{arch}.rope.scaling.original_context_length",
                                                        config["max_position_embeddings"])}


def _experts_config(f: Fields, arch: str) -> dict:
    return {"num_experts": f.whole(f"{arch}.expert_count"), "num_experts_per_tok": f.whole(f"{arch}.expert_used_count")}


def _joined(tensors: Tensors, join: Callable[[Tensors], Tensors]) -> Tensors:
    """The tensors with those of each layer's experts as `join` makes them of "gate.weight", "up.bias" and so on."""
    made: Tensors = {}
    experts: dict[str, Tensors] = {}
    for name, t in tensors.items():
        layer, found, part = name.partition(".mlp.experts.")
        (experts.setdefault(layer + found, {}) if found else made)[part or name] = t
    return made | {prefix + name: t for prefix, parts in experts.items() for name, t in join(parts).items()}


def _beside(p: Tensors) -> Tensors:
    return {"gate_up_proj": torch.cat((p["gate.weight"], p["up.weight"]), 1), "down_proj": p["down.weight"]}


def _alternating(p: Tensors) -> Tensors:
    """gpt-oss: columns of gate and up take turns, and weights have their inputs first."""
    def turns(kind):
        return torch.stack((p[f"gate.{kind}"], p[f"up.{kind}"]), 2).flatten(1, 2)

    return {"gate_up_proj": turns("weight").transpose(1, 2).contiguous(), "gate_up_proj_bias": turns("bias"),
            "down_proj": p["down.weight"].transpose(1, 2).contiguous(), "down_proj_bias": p["down.bias"]}


TARGETS = {
    "llama": Family("llama", "LlamaForCausalLM", _DENSE, config=_llama, interleaved=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", _DENSE),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", _DENSE | _HEAD_NORMS),
    "smollm3": Family("smollm3", "SmolLM3ForCausalLM", _DENSE, config=_smollm3, interleaved=True),
    "qwen3moe": Family(
        "qwen3_moe", "Qwen3MoeForCausalLM", config=_qwen3moe,
        layer={**_ATTENTION, **_HEAD_NORMS, "ffn_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.gate",
               **_EXPERTS}, converted=lambda tensors: _joined(tensors, _beside)),
    "gemma3": Family(
        "gemma3_text", "Gemma3ForCausalLM", native=False, config=_gemma3, offset=1.0,
        layer={**_ATTENTION, **_HEAD_NORMS, **_MLP, "post_attention_norm": "post_attention_layernorm",
               "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}),
    "phi3": Family(
        "phi3", "Phi3ForCausalLM", native=False, config=_phi3,
        layer={"attn_norm": "input_layernorm", "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj",
               "ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}),
    "gpt-oss": Family(
        "gpt_oss", "GptOssForCausalLM", config=_gpt_oss, bare=("self_attn.sinks",),
        layer={**_ATTENTION, "post_attention_norm": "post_attention_layernorm", "attn_sinks": "self_attn.sinks",
               "ffn_gate_inp": "mlp.router", **_EXPERTS}, converted=lambda tensors: _joined(tensors, _alternating)),
}

