"""The model_types that our own layers run, and what their classes do where config.json does not say so."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..checkpoint.fields import Fields, shown
from .experts import Layout
from .moe import ExpertsConfig

_MIXTRAL = Layout(blocks=("block_sparse_moe", "mlp"), correction="e_score_correction_bias", parts=("w1", "w3", "w2"))


@dataclass(frozen=True)
class Family:
    """qkv_bias: of q, k and v: "field" (if attention_bias is true), "always" or "". o_bias, mlp_bias: whether the field
    attention_bias, or mlp_bias, counts.

    qk_norm: of queries and keys: "each" head, "all" heads as one vector, "field" (each, if use_qk_norm is true) or "".
    windows: what puts a window on layers: "set" (sliding_window is a number), "asked" (use_sliding_window is true
    beside it) or "". partial: a part of a head can be left unrotated. sinks: each head has a learned sink. growing:
    queries grow with their position. tied: whether the LM head is the embedding where the config does not say.
    defaults: of fields that config.json may leave out; null is a value.
    """

    qkv_bias: str = ""
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = ""
    windows: str = ""
    partial: bool = False
    sinks: bool = False
    growing: bool = False
    tied: bool = False
    experts: Callable[[Fields, int], ExpertsConfig] | None = None
    defaults: Mapping[str, object] = field(default_factory=dict)

    def complete(self, config: Mapping) -> Mapping:
        places = [config, *(place for name in ("rope_parameters", "rope_scaling")
                            if isinstance(place := config.get(name), Mapping))]
        return {**{name: value for name, value in self.defaults.items() if not any(name in place for place in places)},
                **config}


def _sizes(f: Fields, number: str, width: str) -> tuple[int, int, int]:
    """Experts, how many a row goes through, and their width. number: a field that transformers writes by another name
    too."""
    experts = f.whole(number if f.get("num_local_experts") is None else "num_local_experts")
    return experts, f.whole("num_experts_per_tok", most=experts), f.whole(width)


def _mixtral(f: Fields, layers: int) -> ExpertsConfig:
    return ExpertsConfig(*_sizes(f, "num_local_experts", "intermediate_size"), _MIXTRAL)


def _minimax(f: Fields, layers: int) -> ExpertsConfig:
    if (scoring := f.get("scoring_func", "sigmoid")) != "sigmoid":
        raise NotImplementedError(f"{f.what}: scoring_func must be 'sigmoid'; got {shown(scoring)}")
    return ExpertsConfig(*_sizes(f, "num_local_experts", "intermediate_size"), _MIXTRAL,
                         routing=(("scoring", "sigmoid"),), correction=f.flag("use_routing_bias", True))


def _qwen3(f: Fields, layers: int) -> ExpertsConfig:
    every, alone = f.whole("decoder_sparse_step", 1), f.items("mlp_only_layers", (), int, "layer numbers")
    return ExpertsConfig(*_sizes(f, "num_experts", "moe_intermediate_size"), Layout(),
                         routing=(("normalize", f.flag("norm_topk_prob", False)),),
                         dense=frozenset(i for i in range(layers) if i in alone or (i + 1) % every))


def _glm4(f: Fields, layers: int) -> ExpertsConfig:
    experts, chosen, width = _sizes(f, "n_routed_experts", "moe_intermediate_size")
    groups = f.whole("n_group", 1, most=experts)
    routing = {"scoring": "sigmoid", "groups": groups, "top_groups": f.whole("topk_group", 1, most=groups),
               "normalize": f.flag("norm_topk_prob", True), "scale": f.number("routed_scaling_factor", 1.0, above=0.0)}
    return ExpertsConfig(experts, chosen, width, Layout(), routing=tuple(routing.items()), correction=True,
                         shared=f.whole("n_shared_experts", 1, least=0) * width,
                         dense=frozenset(range(f.whole("first_k_dense_replace", 1, least=0, most=layers))))


def _gpt_oss(f: Fields, layers: int) -> ExpertsConfig:
    layout = Layout(router="router", alternating=True)
    return ExpertsConfig(*_sizes(f, "num_local_experts", "intermediate_size"), layout, bias=True, activation="clamped")


_WINDOW = {"sliding_window": 4096}
FAMILIES = {
    "cwm": Family(mlp_bias=True, windows="set", defaults={"sliding_window": 8192, "rope_theta": 1e6}),
    "glm4_moe": Family(qkv_bias="field", qk_norm="field", partial=True, experts=_glm4,
                       defaults={"partial_rotary_factor": 0.5}),
    "gpt_oss": Family(qkv_bias="field", o_bias=True, windows="set", sinks=True, experts=_gpt_oss,
                      defaults={"sliding_window": 128}),
    "llama": Family(qkv_bias="field", o_bias=True, mlp_bias=True),
    "minimax_m2": Family(qk_norm="all", partial=True, experts=_minimax),
    "ministral": Family(windows="set", defaults=_WINDOW),
    "ministral3": Family(windows="set", growing=True),
    "mistral": Family(windows="set", defaults=_WINDOW),
    "mixtral": Family(windows="set", experts=_mixtral),
    "qwen2": Family(qkv_bias="always", windows="asked", defaults=_WINDOW),
    "qwen3": Family(qkv_bias="field", o_bias=True, qk_norm="each", windows="asked", defaults=_WINDOW),
    "qwen3_moe": Family(qkv_bias="field", o_bias=True, qk_norm="each", windows="asked", experts=_qwen3,
                        defaults=_WINDOW),
    "smollm3": Family(qkv_bias="field", o_bias=True, mlp_bias=True, windows="asked", tied=True,
                      defaults={"rope_theta": 2e6}),
}

# Families that stay in transformers' layers, and why.
_ELSEWHERE = dict.fromkeys(("cohere", "cohere2"), "whose norms subtract the mean, which no op does")


def no_family(name: object) -> str:
    """The end of an error about a model_type that is none of FAMILIES."""
    why = _ELSEWHERE.get(name) if isinstance(name, str) else None
    return f"{', '.join(FAMILIES)}; got {shown(name)}{', ' + why if why else ''}"
