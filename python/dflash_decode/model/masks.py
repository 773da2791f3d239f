"""The keys that a drafter's layers see: causality, windows and learned sinks, from every form that configs have."""

from dataclasses import dataclass

from ..checkpoint.fields import Fields

FULL, SLIDING = "full_attention", "sliding_attention"
_FIRST_WINDOW = 28  # max_window_layers of transformers' Qwen3Config, which a config need not repeat


@dataclass(frozen=True)
class LayerMask:
    """The keys visible to a layer's queries. window = (left, right) as in block_attention; sinks: learned sink logits.
    """

    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    sinks: bool = False


def read_masks(f: Fields, top: Fields, layers: int) -> tuple[list[str], tuple[LayerMask, ...]]:
    """The declared type of each layer, and its LayerMask.

    f: looks fields up in dflash_config first. top: at the top level alone. Causality: top-level is_causal, then
    is_causal or causal of dflash_config, then dflash_query_causal, then sliding_window_non_causal for sliding layers,
    then the layer's type (sliding: causal). The window counts the current token, so `left` is one less; without
    causality it reaches as far to the right. use_swa puts a window on every layer where no type asks for one, and
    leaves each layer's type, and so its causality, as declared.
    """
    types = _types(f, layers)
    swa, declared = f.flag("use_swa", False), SLIDING in types
    window = _window(f, swa, swa or declared)
    stated = [flag for flag in (top.flag("is_causal", None), f.flag("is_causal", None), f.flag("causal", None),
                                f.flag("dflash_query_causal", None)) if flag is not None]
    both_ways = f.flag("sliding_window_non_causal", False)
    every, sliding_only = f.flag("attention_sink_bias", False), f.flag("add_swa_attention_sink_bias", False)
    masks = []
    for kind in types:
        causal = stated[0] if stated else kind == SLIDING and not both_ways
        windowed = kind == SLIDING or (swa and not declared)
        left = window - 1 if windowed else -1
        masks.append(LayerMask(causal, (left, -1 if causal else left), every or (sliding_only and windowed)))
    return types, tuple(masks)


def _types(f: Fields, layers: int) -> list[str]:
    types, asked = f.items("layer_types", None, str, f"{layers} layers"), f.flag("use_sliding_window", None)
    first = f.whole("max_window_layers", _FIRST_WINDOW, least=0)
    if types is None:
        slides = bool(asked) and f.whole("sliding_window", None, least=0) is not None
        types = [SLIDING if slides and i >= first else FULL for i in range(layers)]
    if len(types) != layers:
        f.refuse("layer_types", f"a list of {layers} layers", types)
    if unknown := sorted(set(types) - {SLIDING, FULL}):
        raise NotImplementedError(f"{f.what}: layer_types must be {SLIDING} or {FULL}; got {unknown[0]!r}")
    if SLIDING in types and asked is False:
        raise ValueError(f"{f.what}: use_sliding_window must not be false where layer_types has {SLIDING}; got false")
    unset = asked is None and not f.flag("use_swa", False)
    if SLIDING in types and unset and f.get("model_type") == "qwen3":  # whose class then has no window
        f.refuse("use_sliding_window", f"true where layer_types has {SLIDING}, as model_type qwen3 has it false", asked)
    return list(types)


def _window(f: Fields, swa: bool, needed: bool) -> int:
    """The window of the layers that have one, in tokens; 0 where none has."""
    plain, wide = (f.whole(name, None, least=0) for name in ("sliding_window", "swa_window_size"))
    if not swa and needed and plain and wide and plain != wide:
        f.refuse("swa_window_size", f"sliding_window = {plain} where use_swa is not true", wide)
    window = plain if wide is None else wide
    if needed and not window:
        f.refuse("swa_window_size (or sliding_window)" if swa else "sliding_window",
                 "an integer of at least 1 where layers slide", window)
    return window or 0
