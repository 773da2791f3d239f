"""Reads config.json of a DFlash drafter: every field of version 1, and an error for any other."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..checkpoint.fields import MOST_LAYERS, Fields, head_dim_of, shown
from .rope import Rope, read_rope

_WHAT = "draft config"
_MOST_BLOCK = 1024  # tokens; the longest of any checkpoint is 16, and a step's memory grows with it
_MOST_CANDIDATES = 64
# Fields that change no arithmetic of a draft pass.
_HARMLESS = frozenset([
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "add_cross_attention", "architectures",
    "attention_dropout", "auto_map", "bos_token_id", "chunk_size_feed_forward", "cross_attention_hidden_size",
    "decoder_start_token_id", "dtype", "eos_token_id", "finetuning_task", "id2label", "initializer_range", "is_decoder",
    "is_encoder_decoder", "label2id", "max_window_layers", "model_type", "num_anchors", "output_attentions",
    "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "return_dict", "sep_token_id",
    "speculators_version", "t2d", "task_specific_params", "tf_legacy_loss", "tie_encoder_decoder",
    "tie_word_embeddings", "tokenizer_class", "torch_dtype", "torchscript", "transformers_version", "use_bfloat16",
    "use_cache", "verifier_name_or_path",
])
_ROPE = frozenset(["rope_theta", "rope_parameters", "rope_scaling", "partial_rotary_factor", "rotary_dim",
                   "rope_interleaved", "is_neox_style"])
_LATER = {
    "markov_rank": "DSpark", "markov_head_type": "DSpark", "emb_dim": "Domino", "gru_hidden_dim": "Domino",
    "pure_draft_prefix_len": "Domino", "shift_label": "Domino", "quantization_config": "quantised drafters",
    "sample_from_anchor": "a drafter that predicts from its anchor row", "lilicorr_enabled": "LiLiCorr",
}


@dataclass(frozen=True)
class LayerMask:
    """The keys visible to a layer's queries. window = (left, right) as in block_attention; sinks: learned sink logits.
    """

    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    sinks: bool = False


@dataclass(frozen=True)
class Convolution:
    """DFlash2's grouped convolutions, before and after the attention and the MLP of every layer: row i of a block mixes
    rows i, i - 1, ... i - taps + 1. `group` channels share a coefficient of each row."""

    taps: int
    group: int


@dataclass(frozen=True)
class Selector:
    """DFlash2's candidate selector: of each slot's `candidates` most likely tokens it takes the one that fits its
    predecessor best, by a product of the two tokens' vectors of `rank` numbers."""

    rank: int
    candidates: int


@dataclass(frozen=True)
class DraftConfig:
    """A drafter's geometry and rules. Lengths are in tokens; the features are the outputs of target_layer_ids."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    draft_vocab_size: int
    block_size: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    masks: tuple[LayerMask, ...]
    rope: Rope
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    num_target_layers: int | None = None
    target_hidden_size: int | None = None
    max_position_embeddings: int | None = None
    value_scale: float = 1.0
    input_embedding_scale: float = 1.0
    output_multiplier: float = 1.0
    final_logit_softcapping: float = 0.0
    own_embedding: bool | None = None
    own_head: bool | None = None
    conv: Convolution | None = None
    selector: Selector | None = None

    @property
    def num_layers(self) -> int:
        return len(self.masks)

    @property
    def features(self) -> int:
        """Width of the target's features: a hidden state of each target layer."""
        return len(self.target_layer_ids) * (self.target_hidden_size or self.hidden_size)


class _Fields(Fields):
    """Looks fields up in dflash_config, then at the top level, and reports the fields that were never looked up."""

    def __init__(self, config: Mapping):
        self.top = Fields(_WHAT, config)
        self.nested = self.top.table("dflash_config", {})
        super().__init__(_WHAT, self.nested, config)
        self.seen.add("dflash_config")

    def refuse_unread(self):
        for place, prefix in zip(self.places, ("dflash_config.", ""), strict=True):
            for name, value in place.items():
                if value is None or name in self.seen or (not prefix and name in _HARMLESS):
                    continue
                lilicorr = "lilicorr_enabled" if name.startswith("lilicorr_") else name
                if lilicorr in _LATER and (value is False or place.get("lilicorr_enabled") is False):
                    continue
                why = f", which belongs to {_LATER[lilicorr]}," if lilicorr in _LATER else ""
                raise NotImplementedError(f"{_WHAT}: {prefix}{name[:100]}{why} is not supported; got {shown(value)}")


def spread_target_layers(num_target_layers: int, num_draft_layers: int) -> tuple[int, ...]:
    """The target_layer_ids of a checkpoint without any: the authors' rule (build_target_layer_ids), over 1 ... N - 3.
    """
    if num_draft_layers == 1:
        return (num_target_layers // 2,)
    span = num_target_layers - 4
    return tuple(round(1 + i * span / (num_draft_layers - 1)) for i in range(num_draft_layers))


def read_draft_config(config: Mapping) -> DraftConfig:
    """A DraftConfig from config.json.

    Raises ValueError for a missing or wrong field, and NotImplementedError for an unsupported or unknown one.
    """
    f = _Fields(config)
    for name, allowed in (("hidden_act", "silu"), ("projector_type", "dflash")):
        if f.get(name, allowed) != allowed:
            raise NotImplementedError(f"{_WHAT}: {name} must be {allowed!r}; got {shown(f.get(name))}")
    hidden, heads = f.whole("hidden_size"), f.whole("num_attention_heads")
    layers = f.whole("num_hidden_layers", most=MOST_LAYERS)
    head_dim, vocab = head_dim_of(f, hidden, heads), f.whole("vocab_size")
    f.seen |= _ROPE
    rope = {name: f.get(name) for name in _ROPE} | {"max_position_embeddings": f.get("max_position_embeddings")}
    own_heads = [flag for flag in (f.flag("has_own_lm_head", None), f.flag("has_lm_head", None)) if flag is not None]
    read = DraftConfig(
        hidden_size=hidden, num_heads=heads, num_kv_heads=f.whole("num_key_value_heads", heads), head_dim=head_dim,
        intermediate_size=f.whole("intermediate_size"),
        vocab_size=vocab, draft_vocab_size=f.whole("draft_vocab_size", vocab),
        block_size=f.whole("block_size", most=_MOST_BLOCK), mask_token_id=_mask_token(f),
        target_layer_ids=_target_layer_ids(f, layers), masks=_masks(f, layers), rope=read_rope(rope, head_dim, _WHAT),
        rms_norm_eps=f.number("rms_norm_eps", 1e-6, above=0.0, most=1.0),
        attention_bias=f.flag("attention_bias", False), mlp_bias=f.flag("mlp_bias", False),
        num_target_layers=f.whole("num_target_layers", None), target_hidden_size=f.whole("target_hidden_size", hidden),
        max_position_embeddings=f.whole("max_position_embeddings", None),
        value_scale=f.number("attention_value_scale", 1.0, above=0.0),
        input_embedding_scale=f.number("input_embedding_scale", 1.0, above=0.0),
        output_multiplier=f.number("output_multiplier", 1.0, above=0.0),
        final_logit_softcapping=max(f.number("final_logit_softcapping", 0.0), 0.0),
        own_embedding=f.flag("has_embed_tokens", None), own_head=any(own_heads) if own_heads else None,
        conv=_convolution(f, hidden), selector=_selector(f, vocab),
    )
    names = f.top.items("architectures", (), str, "names")
    if any("DFlash2" in name for name in names) and not (read.conv and read.selector):
        raise ValueError(f"{_WHAT}: conv_kernel_size, conv_group_size, selector_rank and selector_top_k must be given, "
                         f"as architectures is {shown(names)}; got {shown(read.conv)} and {shown(read.selector)}")
    if heads % read.num_kv_heads:
        raise ValueError(f"{_WHAT}: num_attention_heads must be a multiple of num_key_value_heads; "
                         f"got {heads} and {read.num_kv_heads}")
    f.refuse_unread()
    return read


def _convolution(f, hidden):
    taps, group = (f.whole(name, 0, least=0) for name in ("conv_kernel_size", "conv_group_size"))
    if not taps and not group:
        return None
    if not 1 <= taps <= _MOST_BLOCK:
        f.refuse("conv_kernel_size", f"between 1 and {_MOST_BLOCK} beside conv_group_size = {group}", taps)
    if not group or hidden % group:
        f.refuse("conv_group_size", f"a divisor of hidden_size = {hidden} beside conv_kernel_size = {taps}", group)
    return Convolution(taps, group)


def _selector(f, vocab):
    rank, candidates = (f.whole(name, 0, least=0) for name in ("selector_rank", "selector_top_k"))
    if not rank and not candidates:
        return None
    if not rank:
        f.refuse("selector_rank", f"an integer of at least 1 beside selector_top_k = {candidates}", rank)
    most = min(vocab, _MOST_CANDIDATES)
    if not 1 <= candidates <= most:
        f.refuse("selector_top_k", f"between 1 and {most} beside selector_rank = {rank}", candidates)
    return Selector(rank, candidates)


def _mask_token(f):
    text = f.get("mask_token")
    if f.get("mask_token_id") is None and text is not None:
        raise ValueError(f"{_WHAT}: mask_token_id must be given beside mask_token, as the text {shown(text)} alone "
                         "needs the target's tokenizer; got nothing")
    return f.whole("mask_token_id", least=0)


def _target_layer_ids(f, layers):
    """target_layer_ids; or those of the speculators format, which count from 1; or the authors' rule."""
    total = f.whole("num_target_layers", None)
    ids, after = (f.items(name, None, int, "layer numbers")
                  for name in ("target_layer_ids", "aux_hidden_state_layer_ids"))
    if after is not None:
        shifted = [i - 1 for i in after]
        if ids is not None and list(ids) != shifted:
            raise ValueError(f"{_WHAT}: aux_hidden_state_layer_ids must be target_layer_ids + 1; "
                             f"got {shown(after)} and {shown(ids)}")
        ids = shifted
    if ids is None:
        if total is None:
            raise ValueError(f"{_WHAT}: target_layer_ids must be given (or num_target_layers, from which the authors' "
                             "rule spreads them); got nothing")
        ids = spread_target_layers(total, layers)
    top = float("inf") if total is None else total
    if not ids or len(set(ids)) != len(ids) or not all(0 <= i < top for i in ids):
        raise ValueError(f"{_WHAT}: target_layer_ids must be distinct and between 0 and num_target_layers - 1 = "
                         f"{'?' if total is None else total - 1}; got {shown(list(ids))}")
    return tuple(ids)


def _masks(f, layers):
    """One LayerMask for each layer.

    Causality: top-level is_causal, then dflash_config.causal, then the layer's type (sliding: causal). The window
    counts the current token, so `left` is one less; without causality it reaches as far to the right. use_swa puts a
    window on every layer and leaves each layer's type, and so its causality, as declared.
    """
    types, window = f.items("layer_types", None, str, f"{layers} layers"), f.whole("sliding_window", None, least=0)
    asked, swa = f.flag("use_sliding_window", None), f.flag("use_swa", False)
    first = f.whole("max_window_layers", 0, least=0)
    if types is None:
        slides = bool(asked) and window is not None
        types = ["sliding_attention" if slides and i >= first else "full_attention" for i in range(layers)]
    if len(types) != layers:
        f.refuse("layer_types", f"a list of {layers} layers", types)
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown:
        raise NotImplementedError(f"{_WHAT}: layer_types must be sliding_attention or full_attention; "
                                  f"got {sorted(unknown, key=str)[0]!r}")
    if "sliding_attention" in types and asked is False:
        raise ValueError(f"{_WHAT}: use_sliding_window must not be false where layer_types has sliding_attention; "
                         "got false")
    wide = f.whole("swa_window_size", window, least=0)
    window = wide if swa else window
    if not window and (swa or "sliding_attention" in types):
        f.refuse("swa_window_size (or sliding_window)" if swa else "sliding_window",
                 "an integer of at least 1 where layers slide", window)
    stated = [flag for flag in (f.top.flag("is_causal", None), f.flag("is_causal", None), f.flag("causal", None))
              if flag is not None]
    every, sliding_only = f.flag("attention_sink_bias", False), f.flag("add_swa_attention_sink_bias", False)
    masks = []
    for kind in types:
        slides = kind == "sliding_attention"
        causal = stated[0] if stated else slides
        windowed = slides or swa
        left = window - 1 if windowed else -1
        masks.append(LayerMask(causal, (left, -1 if causal else left), every or (sliding_only and windowed)))
    return tuple(masks)
