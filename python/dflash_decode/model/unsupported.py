"""Drafters that this version cannot run, each refused in a sentence that names the field and what is missing; and the
fields that change nothing."""

from collections.abc import Mapping

from ..checkpoint.fields import Fields, shown

# Fields that change no arithmetic of a draft pass: of the Hugging Face format, of producers, and of training.
HARMLESS = frozenset([
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "add_cross_attention", "architectures",
    "attention_dropout", "auto_map", "backbone_rotary_base", "bos_token_id", "chunk_size_feed_forward",
    "confidence_head_alpha", "cross_attention_hidden_size", "decoder_start_token_id", "dtype", "eos_token_id", "export",
    "finetuning_task", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder", "label2id",
    "loss_decay_gamma", "max_anchors", "max_window_layers", "model_type", "num_anchors", "num_aux_layers",
    "output_attentions", "output_hidden_states", "pad_token_id", "pard_token", "pretraining_tp", "problem_type",
    "producer", "pruned_heads", "return_dict", "sep_token_id", "speculators_config", "speculators_version", "t2d",
    "task_specific_params", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "torch_dtype", "torchscript",
    "train_embed_tokens", "transformers_version", "use_bfloat16", "use_cache", "verifier_name_or_path",
])
_OFF: tuple = (0, "", (), [], {})
# Fields of features that a drafter may have, and which it does not have if they are off: false, 0 or empty.
_OPTIONAL = frozenset([
    "add_full_attention_sink_bias", "attention_k_eq_v", "attention_out_bias", "attn_logit_softcapping",
    "attn_output_gate", "decoder_sparse_step", "enable_moe_block", "fc_bias", "hidden_size_per_layer_input",
    "hybrid_layer_pattern", "mlp_only_layers", "moe_intermediate_size", "n_routed_experts", "no_rope_layers",
    "norm_before_fc", "num_experts", "num_experts_per_tok", "num_kv_shared_layers", "num_local_experts",
    "num_nextn_predict_layers", "shift_label", "tap_shift", "use_gemma_norm",
])
# Fields that must be true, or factors that must be 1.
_ONE = frozenset(["decoder_sparse_step", "embedding_multiplier", "logit_scale", "logits_scaling", "qk_layernorm",
                  "qk_norm", "residual_multiplier", "use_aux_hidden_state", "use_qk_norm"])
_MISSING = {
    "Domino": "the GRU that corrects the logits of a row by the tokens drafted before it",
    "LiLiCorr": "the attention that scores the candidates of all rows again",
    "XPress": "layers of their own kind",
    "Laguna": "a gate on their attention, and a norm for each target layer's features",
    "MLA": "attention on latent vectors instead of keys and values",
}
# Field -> the head that it belongs to, unless it is off.
_FIELDS = {
    "emb_dim": "Domino", "gru_hidden_dim": "Domino", "pure_draft_prefix_len": "Domino",
    "kv_lora_rank": "MLA", "q_lora_rank": "MLA", "qk_nope_head_dim": "MLA", "qk_rope_head_dim": "MLA",
}
# Drafters whose pass is DFlash's, but for the Markov head and the anchor's row.
_DSPARK = frozenset(["DSparkDraftModel", "DSparkSpeculator", "Lfm2DSparkDraftModel", "LingDSparkModel",
                     "Qwen3DSparkModel", "Qwen3OmniDSparkModel", "Qwen3VLDSparkModel"])


def is_off(value: object) -> bool:
    """Whether this value of a feature's field says that the drafter does not have it."""
    return value is None or any(value == off for off in _OFF)


def refuse_heads(f: Fields, top: Fields) -> None:
    """Raises NotImplementedError for a drafter of another kind, by the first field that says so."""
    for name in top.items("architectures", (), str, "names"):
        for head in _MISSING:
            if head.lower() in name.lower():
                _refuse(f.what, "architectures", name, head)
        if "DSpark" in name and name not in _DSPARK:
            raise NotImplementedError(f"{f.what}: architectures = {shown(name)} is not supported: a DSpark drafter "
                                      "with layers of its own kind")
    if not is_off(inside := f.get("dspark_block_size")):
        raise NotImplementedError(f"{f.what}: dspark_block_size = {shown(inside)} is not supported: a DSpark drafter "
                                  "inside its target's checkpoint has layers of the target's kind")
    projector = f.get("projector_type", "dflash")
    heads = {head.lower(): head for head in _MISSING}
    if projector in ("dflash", "dflash2", "dspark"):
        pass
    elif isinstance(projector, str) and projector.lower() in heads:
        _refuse(f.what, "projector_type", projector, heads[projector.lower()])
    else:
        raise NotImplementedError(f"{f.what}: projector_type must be 'dflash'; got {shown(projector)}")
    if f.get("attention_mode", "gqa") not in ("gqa", "mha"):
        _refuse(f.what, "attention_mode", f.get("attention_mode"), "MLA")
    for name, head in _FIELDS.items():
        if not is_off(value := f.get(name)):
            _refuse(f.what, name, value, head)
    if f.flag("lilicorr_enabled", False):
        _refuse(f.what, "lilicorr_enabled", True, "LiLiCorr")


def _refuse(what: str, name: str, value: object, head: str) -> None:
    raise NotImplementedError(f"{what}: {name} = {shown(value)} is not supported: {head} drafters need "
                              f"{_MISSING[head]}")


def refuse_unread(what: str, place: Mapping, prefix: str, seen: set[str]) -> None:
    """Raises NotImplementedError for a field that was not looked up and can change what is drafted."""
    for name, value in place.items():
        if name in seen or name in HARMLESS or name.startswith("lilicorr_") or value is None:
            continue
        if name in _OPTIONAL and is_off(value) or name in _ONE and value == 1:
            continue
        raise NotImplementedError(f"{what}: {prefix}{name[:100]} is not supported; got {shown(value)}")
