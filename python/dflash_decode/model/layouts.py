"""Brings the layouts of drafters' configs into one: that of z-lab's, with all fields at the top level or in
dflash_config."""

from collections.abc import Callable, Mapping

from ..checkpoint.fields import MOST_LAYERS, Fields, shown

# Values that a model class of transformers has where its config.json says nothing.
_CLASS_DEFAULTS = {
    "muse_glimmer_assistant": {
        "hidden_size": 6656, "intermediate_size": 19968, "num_hidden_layers": 5, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0,
        "max_position_embeddings": 131_072, "sliding_window": 2048, "block_size": 16, "mask_token_id": 201_818,
        "target_layer_ids": [1, 13, 25, 37, 49], "is_causal": False, "vocab_size": 202_048,
    },
}
# Of the speculators format, outside transformer_layer_config: what concerns training or another head of this version's
# "dflash" alone.
_SPECULATORS_TRAINING = frozenset([
    "auf", "emb_dim", "gru_hidden_dim", "lambda_base_decay_ratio", "lambda_base_start", "max_anchors",
    "proposal_speculative_tokens", "pure_draft_prefix_len", "speculators_config", "speculators_model_type",
    "speculators_version", "transformer_layer_config",
])


def with_mask_token(config: Mapping, id_of: Callable[[str], int | None]) -> Mapping:
    """The config with a mask_token_id where it has only the token's text. id_of: the target's tokenizer. Raises
    ValueError for a text that is no token of the target."""
    nested = config.get("dflash_config")
    places = [config, nested] if isinstance(nested, Mapping) else [config]
    found = Fields("draft config", *reversed(places))
    if found.get("mask_token_id") is not None or found.get("mask_token") is None:
        return config
    text = found.text("mask_token")
    if (token := id_of(text)) is None:
        found.refuse("mask_token", "a token of the target's tokenizer, as there is no mask_token_id", text)
    return {**config, "mask_token_id": token}


def flat(config: Mapping, what: str) -> Mapping:
    """The config in z-lab's layout, with the defaults of its model class. Raises ValueError."""
    Fields(what, config)  # which is an object
    if "speculators_model_type" in config or "transformer_layer_config" in config:
        return _of_speculators(config, what)
    family = config.get("model_type")
    defaults = _CLASS_DEFAULTS.get(family, {}) if isinstance(family, str) else {}
    if not defaults:
        return config
    given = {name: value for name, value in config.items() if value is not None}
    if "rope_parameters" in given or "rope_theta" in given:
        defaults = {name: value for name, value in defaults.items() if name != "rope_theta"}
    layers = Fields(what, given).whole("num_hidden_layers", defaults["num_hidden_layers"], most=MOST_LAYERS)
    return {"layer_types": ["sliding_attention"] * layers, **defaults, **given}


def _of_speculators(config: Mapping, what: str) -> Mapping:
    """The geometry is in transformer_layer_config and the rest beside it, which wins. Sliding layers are not causal
    unless sliding_window_non_causal is false, as it is for DSpark where nothing says so; full ones never are."""
    outer = Fields(what, config)
    kind = outer.text("speculators_model_type", "dflash")
    if kind not in ("dflash", "dflash2", "dspark"):
        raise NotImplementedError(f"{what}: speculators_model_type must be 'dflash', 'dflash2' or 'dspark'; "
                                  f"got {shown(kind)}")
    inner = outer.table("transformer_layer_config")
    family = Fields(what, inner).text("model_type", "qwen3")
    if family != "qwen3":
        raise NotImplementedError(f"{what}: transformer_layer_config.model_type must be 'qwen3'; got {shown(family)}")
    projector = kind if kind == "dspark" else outer.text("projector_type", "dflash")
    defaults = {"sliding_window_non_causal": kind != "dspark"}  # of which vLLM reads nothing for DSpark
    if kind == "dspark" and outer.get("dspark_bonus_anchor") is None:
        defaults["sample_from_anchor"] = False
    unread = _SPECULATORS_TRAINING if projector == "dflash" else _SPECULATORS_TRAINING - {"emb_dim", "gru_hidden_dim"}
    beside = {name: value for name, value in config.items() if value is not None and name not in unread}
    return {**inner, **defaults, **beside, "projector_type": projector}
