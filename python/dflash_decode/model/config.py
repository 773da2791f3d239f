"""Reads config.json of a DFlash drafter: every field of version 1, and an error for any other."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..checkpoint.fields import MOST_LAYERS, Fields, head_dim_of, shown
from .layouts import flat
from .markov import read_markov
from .masks import LayerMask, read_masks
from .quantized import Quantization, read_quantization
from .rope import Rope, read_ropes
from .unsupported import refuse_heads, refuse_unread

_WHAT = "draft config"
_MOST_BLOCK = 1024  # tokens; the longest of any checkpoint is 16, and a step's memory grows with it
_MOST_CANDIDATES = 64
_MARKOV_CANDIDATES = 32  # a Markov head was trained to choose from the whole vocabulary
_ROPE = frozenset(["rope_theta", "rope_parameters", "rope_scaling", "partial_rotary_factor", "rotary_dim",
                   "rope_interleaved", "is_neox_style", "rope_is_neox_style"])


@dataclass(frozen=True)
class Convolution:
    """DFlash2's grouped convolutions, before and after the attention and the MLP of every layer: row i of a block mixes
    rows i, i - 1, ... i - taps + 1. `group` channels share a coefficient of each row."""

    taps: int
    group: int


@dataclass(frozen=True)
class Selector:
    """Of each slot's `candidates` most likely tokens the one that fits its predecessor best is taken, by a product of
    the two tokens' vectors of `rank` numbers: DFlash2's selector, which the slot's hidden state weighs, or DSpark's
    Markov head, which it does not."""

    rank: int
    candidates: int
    markov: bool = False


@dataclass(frozen=True)
class DraftConfig:
    """A drafter's geometry and rules. Lengths are in tokens; the features are the outputs of target_layer_ids. masks
    and ropes: one for each layer. block_size: the anchor and its drafts. from_anchor: row i of a pass drafts token
    i + 1, so that a pass has a row less than the block. input_embedding_scale: None is the target's own. tied: the
    drafter's own embedding, if it has one, is its LM head too."""

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
    ropes: tuple[Rope, ...]
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    num_target_layers: int | None = None
    target_hidden_size: int | None = None
    max_position_embeddings: int | None = None
    value_scale: float = 1.0
    input_embedding_scale: float | None = None
    output_multiplier: float = 1.0
    final_logit_softcapping: float = 0.0
    own_embedding: bool | None = None
    own_head: bool | None = None
    tied: bool = False
    quantization: Quantization | None = None
    conv: Convolution | None = None
    selector: Selector | None = None
    from_anchor: bool = False

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
            refuse_unread(_WHAT, place, prefix, self.seen)


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
    f = _Fields(flat(config, _WHAT))
    refuse_heads(f, f.top)
    if f.get("block_size") is None:
        raise ValueError(f"{_WHAT}: block_size must be an integer of at least 1; got nothing (Session.load and the "
                         "commands take one, of the anchor and its drafts)")
    if f.get("hidden_act", "silu") != "silu":
        raise NotImplementedError(f"{_WHAT}: hidden_act must be 'silu'; got {shown(f.get('hidden_act'))}")
    hidden, heads = f.whole("hidden_size"), f.whole("num_attention_heads")
    layers = f.whole("num_hidden_layers", most=MOST_LAYERS)
    head_dim, vocab = head_dim_of(f, hidden, heads), f.whole("vocab_size")
    if f.whole("v_head_dim", head_dim) != head_dim:
        raise NotImplementedError(f"{_WHAT}: v_head_dim must be head_dim = {head_dim}; got {f.get('v_head_dim')}")
    types, masks = read_masks(f, f.top, layers)
    markov, from_anchor = read_markov(f, f.top)
    f.seen |= _ROPE
    rope = {name: f.get(name) for name in _ROPE} | {"max_position_embeddings": f.get("max_position_embeddings")}
    own_heads = [flag for flag in (f.flag("has_own_lm_head", None), f.flag("has_lm_head", None)) if flag is not None]
    read = DraftConfig(
        hidden_size=hidden, num_heads=heads, num_kv_heads=f.whole("num_key_value_heads", heads), head_dim=head_dim,
        intermediate_size=f.whole("intermediate_size"),
        vocab_size=vocab, draft_vocab_size=f.whole("draft_vocab_size", vocab),
        block_size=f.whole("block_size", most=_MOST_BLOCK) + from_anchor, mask_token_id=_mask_token(f),
        target_layer_ids=_target_layer_ids(f, layers), masks=masks, ropes=read_ropes(rope, head_dim, _WHAT, types),
        rms_norm_eps=f.number("rms_norm_eps", 1e-6, above=0.0, most=1.0),
        attention_bias=f.flag("attention_bias", False), mlp_bias=f.flag("mlp_bias", False),
        num_target_layers=f.whole("num_target_layers", None), target_hidden_size=f.whole("target_hidden_size", hidden),
        max_position_embeddings=f.whole("max_position_embeddings", None),
        value_scale=f.number("attention_value_scale", 1.0, above=0.0),
        input_embedding_scale=f.number("input_embedding_scale", None, above=0.0),
        output_multiplier=f.number("output_multiplier", 1.0, above=0.0),
        final_logit_softcapping=max(f.number("final_logit_softcapping", 0.0), 0.0),
        own_embedding=f.flag("has_embed_tokens", None), own_head=any(own_heads) if own_heads else None,
        tied=f.flag("tie_word_embeddings", False), quantization=read_quantization(f),
        conv=_convolution(f, hidden), selector=_selector(f, vocab, markov), from_anchor=from_anchor,
    )
    names = f.top.items("architectures", (), str, "names")
    if any("DFlash2" in name for name in names) and not (read.conv and read.selector and not markov):
        raise ValueError(f"{_WHAT}: conv_kernel_size, conv_group_size, selector_rank and selector_top_k must be given, "
                         f"as architectures is {shown(names)}; got {shown(read.conv)} and {shown(read.selector)}")
    if heads % read.num_kv_heads:
        raise ValueError(f"{_WHAT}: num_attention_heads must be a multiple of num_key_value_heads; "
                         f"got {heads} and {read.num_kv_heads}")
    f.refuse_unread()
    return read


def with_block_size(config: Mapping, block_size: int | None) -> Mapping:
    """The config with blocks of so many tokens, the anchor included, where it has no block_size."""
    if block_size is None:
        return config
    f = _Fields(flat(config, _WHAT))
    if f.get("block_size") is not None:
        return config
    return {**config, "block_size": block_size - read_markov(f, f.top)[1]}


def names_drafter(config: Mapping) -> bool:
    """Whether a config.json has what only a drafter's has."""
    if {"dflash_config", "speculators_model_type"} & config.keys():
        return True
    names = config.get("architectures")
    return isinstance(names, list) and any(kind in str(name) for name in names for kind in ("DFlash", "DSpark"))


def is_drafter(config: Mapping) -> bool:
    """Whether a config.json may be one of a drafter, in any of the formats that are read."""
    return "block_size" in config or names_drafter(config)


def _convolution(f, hidden):
    taps, group = (f.whole(name, 0, least=0) for name in ("conv_kernel_size", "conv_group_size"))
    if not taps and not group:
        return None
    if not 1 <= taps <= _MOST_BLOCK:
        f.refuse("conv_kernel_size", f"between 1 and {_MOST_BLOCK} beside conv_group_size = {group}", taps)
    if not group or hidden % group:
        f.refuse("conv_group_size", f"a divisor of hidden_size = {hidden} beside conv_kernel_size = {taps}", group)
    return Convolution(taps, group)


def _selector(f, vocab, markov):
    rank, candidates = (f.whole(name, 0, least=0) for name in ("selector_rank", "selector_top_k"))
    most = min(vocab, _MOST_CANDIDATES)
    if not rank and not candidates:
        if not 1 <= (kept := f.whole("dspark_draft_topk", min(vocab, _MARKOV_CANDIDATES))) <= most:
            f.refuse("dspark_draft_topk", f"between 1 and {most}", kept)
        return Selector(markov, kept, markov=True) if markov else None
    if markov:
        f.refuse("selector_rank (of the config, or of candidate_selector/)", f"0 beside markov_rank = {markov}", rank)
    if not rank:
        f.refuse("selector_rank", f"an integer of at least 1 beside selector_top_k = {candidates}", rank)
    if not 1 <= candidates <= most:
        f.refuse("selector_top_k", f"between 1 and {most} beside selector_rank = {rank}", candidates)
    return Selector(rank, candidates)


def _mask_token(f):
    text = f.get("mask_token")
    if f.get("mask_token_id") is None and text is not None:
        raise ValueError(f"{_WHAT}: mask_token_id must be given beside mask_token, as the text {shown(text)} "
                         "is resolved by the target's tokenizer (Session.load does so); got nothing")
    return f.whole("mask_token_id", least=0)


def _target_layer_ids(f, layers):
    """target_layer_ids; or those of the speculators and ModelOpt formats, which count from 1; or the authors' rule."""
    total = f.whole("num_target_layers", None)
    ids = f.items("target_layer_ids", None, int, "layer numbers")
    for name in ("aux_hidden_state_layer_ids", "eagle_aux_hidden_state_layer_ids"):
        if (after := f.items(name, None, int, "layer numbers")) is not None:
            shifted = [i - 1 for i in after]
            if ids is not None and list(ids) != shifted:
                raise ValueError(f"{_WHAT}: {name} must be target_layer_ids + 1; got {shown(after)} and {shown(ids)}")
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
