"""Reads config.json of a target that our own layers run: geometry, masks, ropes and experts of its layers."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..checkpoint.fields import MOST_LAYERS, Fields, head_dim_of, shown
from .families import FAMILIES, Family, no_family
from .masks import FULL, SLIDING, LayerMask
from .quantized import Quantization, read_quantization
from .rope import Rope, read_growing_ropes, read_rope
from .transformer import Geometry

_WHAT = "target config"
_NO_ROPE_EVERY = 4  # of SmolLM3's layers, where its config does not list them
_FIRST_WINDOW = 28  # max_window_layers of transformers' Qwen2Config and Qwen3Config
# Fields that some model of these families has, and the values at which they change nothing.
_NEUTRAL = {
    "hidden_act": ("silu",), "rope_interleaved": (False,), "is_neox_style": (True,), "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,), "logit_scale": (1.0,), "clip_qkv": (), "attention_multiplier": (),
    "embedding_multiplier": (1.0,), "residual_multiplier": (1.0,), "logits_scaling": (1.0,),
    "shared_intermediate_size": (0,), "swiglu_alpha": (1.702,), "swiglu_limit": (7.0,), "attn_type_list": (),
    "qk_norm_type": ("per_layer",),
}
_EXTRA = ("num_mtp_modules", "num_nextn_predict_layers")
_DENSE_ONLY = {"num_experts": (0,), "num_local_experts": (0,)}
_WHOLE_ONLY = {"partial_rotary_factor": (1.0,)}


@dataclass(frozen=True)
class TargetConfig:
    """A target's geometry and rules; masks and ropes: one for each layer. query_ropes: of queries alone, where they
    turn in another way than keys. extra: layers that follow these in the file and predict further tokens, which
    decoding does not use."""

    geometry: Geometry
    vocab_size: int
    max_context: int
    masks: tuple[LayerMask, ...]
    ropes: tuple[Rope, ...]
    query_ropes: tuple[Rope, ...] | None
    tied: bool
    quantization: Quantization | None
    extra: int = 0

    @property
    def num_layers(self) -> int:
        return len(self.masks)


def read_target_config(config: Mapping) -> TargetConfig:
    """A TargetConfig from config.json.

    Raises ValueError for a missing or wrong field, and NotImplementedError for one that changes the arithmetic into
    something not implemented.
    """
    f = Fields(_WHAT, config)
    name = f.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise NotImplementedError(f"{_WHAT}: model_type must be one of {no_family(name)}")
    family = FAMILIES[name]
    config = family.complete(config)
    f = Fields(_WHAT, config)
    _refuse_others(f, family)
    layers = f.whole("num_hidden_layers", most=MOST_LAYERS)
    g, rotated = _geometry(f, family, layers), _rotated(f, name, layers)
    if family.growing:
        rope, of_queries = read_growing_ropes(config, g.head_dim, _WHAT)
    else:  # families of experts have no usual theta; their classes differ
        rope = read_rope(config, g.head_dim, _WHAT, None if family.experts else 10000.0, bounded=True)
    return TargetConfig(
        g, vocab_size=f.whole("vocab_size"), max_context=max(f.whole("max_position_embeddings"), rope.longest),
        masks=_masks(f, name, rotated), ropes=tuple(rope if turns else Rope(1.0, 0) for turns in rotated),
        query_ropes=(of_queries,) * layers if family.growing else None,
        tied=f.flag("tie_word_embeddings", family.tied), quantization=_quantization(f, name),
        extra=max(f.whole(field, 0, least=0, most=MOST_LAYERS) for field in _EXTRA),
    )


def _refuse_others(f: Fields, family: Family) -> None:
    neutral = _NEUTRAL | ({} if family.experts else _DENSE_ONLY) | ({} if family.partial else _WHOLE_ONLY)
    for field, values in neutral.items():
        value = f.get(field)
        if value is not None and value not in values:
            if field == "attn_type_list" and isinstance(value, list) and set(map(str, value)) == {"1"}:
                continue  # MiniMax: softmax attention in every layer
            raise NotImplementedError(f"{_WHAT}: {field} = {shown(value)} changes the model into one that is not "
                                      "supported")


def _quantization(f: Fields, name: str) -> Quantization | None:
    """None also for MXFP4, which the experts' tensors show by their names."""
    found = f.table("quantization_config", {})
    if found.get("quant_method") == "mxfp4" and name == "gpt_oss":
        return None
    return read_quantization(f)


def _geometry(f: Fields, family: Family, layers: int) -> Geometry:
    hidden, heads = f.whole("hidden_size"), f.whole("num_attention_heads")
    kv_heads = f.whole("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ValueError(f"{_WHAT}: num_attention_heads must be a multiple of num_key_value_heads; "
                         f"got {heads} and {kv_heads}")
    bias = f.flag("attention_bias", family.sinks)
    norms = f.flag("use_qk_norm", family.qk_norm in ("each", "all"))
    if norms != bool(family.qk_norm) and family.qk_norm != "field":
        raise NotImplementedError(f"{_WHAT}: use_qk_norm = {norms} changes the model into one that is not supported")
    return Geometry(
        hidden=hidden, intermediate=f.whole("intermediate_size"), num_heads=heads, num_kv_heads=kv_heads,
        head_dim=head_dim_of(f, hidden, heads),
        eps=f.number("rms_norm_eps", ... if family.experts or family.growing else 1e-6, above=0.0, most=1.0),
        qkv_bias=family.qkv_bias == "always" or bias and family.qkv_bias == "field", o_bias=bias and family.o_bias,
        mlp_bias=f.flag("mlp_bias", False) and family.mlp_bias, qk_norm=norms, norm_of_heads=family.qk_norm == "all",
        sinks="sinks", experts=family.experts(f, layers) if family.experts else None,
    )


def _rotated(f: Fields, name: str, layers: int) -> list[bool]:
    """Whether each layer rotates its queries and keys: 1 in no_rope_layers, which SmolLM3 has."""
    listed = f.items("no_rope_layers", None, int, f"{layers} times 0 or 1")
    if name != "smollm3":
        if listed:
            raise NotImplementedError(f"{_WHAT}: no_rope_layers = {shown(listed)} changes the model into one that is "
                                      "not supported")
        return [True] * layers
    if listed is None:
        every = f.whole("no_rope_layer_interval", _NO_ROPE_EVERY)
        return [(i + 1) % every != 0 for i in range(layers)]
    if len(listed) != layers or not set(listed) <= {0, 1}:
        f.refuse("no_rope_layers", f"a list of {layers} times 0 or 1", listed)
    return [bool(one) for one in listed]


def _masks(f: Fields, name: str, rotated: list[bool]) -> tuple[LayerMask, ...]:
    """What each layer sees. A window counts the token itself, so `left` is one less."""
    family, window = FAMILIES[name], f.whole("sliding_window", None, least=0)
    types = f.items("layer_types", None, str, f"{len(rotated)} layers")
    if types is not None and (not family.windows or name == "ministral3"):  # whose class does not read them
        kind = SLIDING if family.windows and window else FULL
        if set(types) != {kind}:
            raise NotImplementedError(f"{_WHAT}: layer_types must all be {kind} in a {name} model; got {shown(types)}")
    asked = family.windows == "set" or family.windows == "asked" and f.flag("use_sliding_window", False)
    slides = _sliding(f, name, rotated)
    if types is None:
        types = [SLIDING if asked and window and each else FULL for each in slides]
    if len(types) != len(rotated):
        f.refuse("layer_types", f"a list of {len(rotated)} layers", types)
    if unknown := sorted(set(types) - {SLIDING, FULL}):
        raise NotImplementedError(f"{_WHAT}: layer_types must be {SLIDING} or {FULL}; got {unknown[0]!r}")
    if SLIDING in types and not asked:
        f.refuse("use_sliding_window", f"true where layer_types has {SLIDING}", f.get("use_sliding_window"))
    if SLIDING in types and not window:
        f.refuse("sliding_window", f"an integer of at least 1 where layer_types has {SLIDING}", window)
    return tuple(LayerMask(True, ((window or 0) - 1 if each == SLIDING else -1, -1), family.sinks) for each in types)


def _sliding(f: Fields, name: str, rotated: list[bool]) -> list[bool]:
    """The layers that slide if the config asks for a window and does not list them, as the model classes have it."""
    layers, first = range(len(rotated)), f.whole("max_window_layers", _FIRST_WINDOW, least=0)
    if name in ("qwen2", "qwen3"):
        return [i >= first for i in layers]
    if name == "cwm":
        return [i % 4 != 0 for i in layers]
    if name == "gpt_oss":
        return [i % 2 == 0 for i in layers]
    return [not turns for turns in rotated] if name == "smollm3" else [True for _ in layers]
