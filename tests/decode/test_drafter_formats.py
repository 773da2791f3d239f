"""The forms in which drafters are published, each loaded and compared with the plain form of the same drafter."""

import json

import pytest
import torch

from dflash_decode.checkpoint import CheckpointError
from dflash_decode.model.config import LayerMask, read_draft_config
from dflash_decode.model.drafter import Drafter
from dflash_decode.model.layouts import with_mask_token
from dflash_kernels.testing import assert_within_budget, same_bits

transformers = pytest.importorskip("transformers")

from tests.support import tiny  # noqa: E402
from tests.support.decode_models import VOCAB, make_target  # noqa: E402
from tests.support.drafters import HIDDEN, Served, dense, draft_config, embedded, make  # noqa: E402

SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
FULL = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}
LOCAL = {"rope_type": "default", "rope_theta": 1e4}


def drafts(drafter, lengths=(23, 0, 8)):
    return Served(drafter, list(lengths)).commit_all().draft(list(range(len(lengths))))


def same_drafts(drafter, other):
    return all(same_bits(a, b) for a, b in zip(drafts(drafter), drafts(other), strict=True))


def speculators(changes=None, **outer):
    flat = draft_config(changes or {})
    inner = {k: v for k, v in flat.items() if k not in ("dflash_config", "num_target_layers")}
    return {
        "speculators_model_type": "dflash", "architectures": ["DFlashSpeculator"], "block_size": 6, "mask_token_id": 7,
        "aux_hidden_state_layer_ids": [3, 1, 4], "draft_vocab_size": VOCAB, "target_hidden_size": None,
        "sample_from_anchor": False, "max_anchors": 3072, "emb_dim": 256, "gru_hidden_dim": 1024,
        "pure_draft_prefix_len": 1, "projector_type": "dflash", "shift_label": False, "auf": False,
        "lambda_base_start": 1.0, "lambda_base_decay_ratio": 1.0, "speculators_version": "0.9.0",
        "speculators_config": {"algorithm": "dflash", "proposal_methods": [{"speculative_tokens": 5}]},
        "transformer_layer_config": {**inner, "model_type": "qwen3", "use_sliding_window": True}, **outer}


def test_p44_the_speculators_format_is_the_same_drafter():
    flat, tensors, _, plain = make({"layer_types": SLIDING, "sliding_window": 6, "is_causal": False}, torch.float32)
    _, target = make_target("llama")
    extra = {"verifier_lm_head.weight": torch.randn(9, HIDDEN), "verifier_norm.weight": torch.randn(HIDDEN),
             "rotary_emb.inv_freq": torch.randn(8), "t2d": torch.ones(VOCAB, dtype=torch.bool)}
    nested = speculators({"layer_types": SLIDING, "sliding_window": 6})
    assert read_draft_config(nested).target_layer_ids == (2, 0, 3)
    assert same_drafts(Drafter(nested, tensors | extra, target), plain)


def test_p44_sliding_layers_alone_are_causal_where_sliding_window_non_causal_is_false():
    slides = {"layer_types": SLIDING, "sliding_window": 6}
    open_, causal = LayerMask(False, (5, 5)), LayerMask(True, (5, -1))
    assert read_draft_config(speculators(slides)).masks == (open_, LayerMask(), open_)
    told = read_draft_config(speculators(slides, sliding_window_non_causal=False))
    assert told.masks == (causal, LayerMask(), causal)


@pytest.mark.parametrize(("change", "match"), [
    ({"speculators_model_type": "eagle3"},
     "speculators_model_type must be 'dflash', 'dflash2' or 'dspark'; got 'eagle3'"),
    ({"projector_type": "domino"}, "projector_type = 'domino' is not supported: Domino drafters need"),
    ({"transformer_layer_config": {"model_type": "llama"}}, "transformer_layer_config.model_type must be 'qwen3'"),
    ({"shift_label": True}, "shift_label is not supported; got True"),
])
def test_p44_other_kinds_of_the_speculators_format_are_refused_by_name(change, match):
    with pytest.raises(NotImplementedError, match=match):
        read_draft_config(speculators(**change))


def test_p43_a_muse_assistant_has_its_classs_defaults_and_names():
    """Against transformers' own class; no vocab_size, is_causal or num_target_layers is in its file."""
    from transformers import MuseGlimmerAssistantConfig, MuseGlimmerAssistantModel

    config = {"model_type": "muse_glimmer_assistant", "architectures": ["MuseGlimmerAssistantModel"],
              "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 6, "block_size": 6, "mask_token_id": 7,
              "target_layer_ids": [2, 0, 3], "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}
    read = read_draft_config(config)
    assert read.masks == (LayerMask(False, (5, 5)),) * 3 and read.vocab_size == 202_048 and read.rms_norm_eps == 1e-5
    assert read_draft_config(config | {"rope_parameters": None}) == read
    torch.manual_seed(0)
    made = MuseGlimmerAssistantConfig(**config)
    made._attn_implementation = "eager"
    model = MuseGlimmerAssistantModel(made).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(1 + 0.3 * torch.randn_like(p) if p.dim() == 1 else torch.randn_like(p) * 0.7 / p.shape[1] ** 0.5)
    assert {"encoder.fc.weight", "encoder.output_norm_enc.weight"} <= model.state_dict().keys()
    _, target = make_target("llama")
    drafter = Drafter(config, model.state_dict(), target)
    served = Served(drafter, [23, 5]).commit_all()
    got, _ = served.draft([3, 4])
    for b, (anchor, features) in enumerate(zip([3, 4], served.features, strict=True)):
        gap = torch.arange(len(features), len(features) + 6)[:, None] - torch.arange(len(features) + 6)
        window = torch.zeros(gap.shape).masked_fill(gap.abs() > 5, float("-inf"))[None, None]
        with torch.no_grad():
            want = model(noise_embeds=embedded(drafter, anchor)[None], context_hidden_states=features[None],
                         attention_mask={"sliding_attention": window}).last_hidden_state
        torch.testing.assert_close(got[b], want[0], rtol=1e-4, atol=1e-4)


def test_p40_modelopts_names_of_the_same():
    """target_layer_ids once more, counted from 1; causality of the block; a Markov head's rank."""
    own = draft_config({"dflash_query_causal": True, "eagle_aux_hidden_state_layer_ids": [3, 1, 4], "num_aux_layers": 3,
                        "dspark_markov_rank": 8, "dspark_fixup_head_type": "markov", "dspark_bonus_anchor": True,
                        "pard_token": 7, "train_embed_tokens": False})
    assert read_draft_config(own) == read_draft_config(draft_config({"is_causal": True, "markov_rank": 8,
                                                                     "sample_from_anchor": False}))
    for change, match in (({"eagle_aux_hidden_state_layer_ids": [2, 0, 3]}, "eagle_aux_.* must be target_layer_ids"),
                          ({"markov_rank": 4}, "dspark_markov_rank must be markov_rank = 4; got 8")):
        with pytest.raises(ValueError, match=match):
            read_draft_config(own | change)
    swa = {"layer_types": SLIDING, "sliding_window": 6, "model_type": "qwen3"}
    with pytest.raises(ValueError, match="use_sliding_window must be true where"):
        read_draft_config(draft_config(swa))
    assert read_draft_config(draft_config(swa | {"use_swa": True})).masks[0] == LayerMask(True, (5, -1))


def test_a_config_without_a_block_size_takes_the_callers(tmp_path):
    from dflash_decode import Session
    from dflash_decode.checkpoint import CheckpointError

    folder, target = tiny.write_drafter(tmp_path / "d"), tiny.write_target(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    for place in (config, config["dflash_config"]):
        place.pop("block_size", None)
    (folder / "config.json").write_text(json.dumps(config))
    assert Session.load(target, folder, block_size=5).drafter.block_size == 5
    flat = {"architectures": ["DFlashDraftModel"], **config, **config.pop("dflash_config")}
    (folder / "config.json").write_text(json.dumps(flat))
    assert Session.load(target, folder, block_size=5).drafter.block_size == 5  # a class alone says that it is a drafter
    with pytest.raises(CheckpointError, match="block_size must be an integer of at least 1; got nothing"):
        Session.load(target, folder)


def test_p45_a_draft_vocabulary_without_d2t_is_the_first_rows_of_the_targets_head():
    config, tensors, _, _ = make({"draft_vocab_size": 37}, torch.float32)
    _, target = make_target("llama")
    drafter = Drafter(config, tensors, target)
    rows, ids = drafts(drafter)
    logits = rows[:, 1:] @ target.head.rows(torch.arange(VOCAB)).T
    assert torch.equal(ids[:, 1:], logits[..., :37].argmax(-1))
    assert not torch.equal(ids[:, 1:], logits.argmax(-1))
    head = {"lm_head.weight": torch.randn(37, HIDDEN)}
    with pytest.raises(ValueError, match="tensor d2t must be there with shape"):  # of a head of its own nobody knows
        Drafter(config, tensors | head, target)


def test_p40_fields_of_features_that_are_off_and_of_training_change_nothing():
    plain = read_draft_config(draft_config({}))
    inert = {"num_experts": 0, "moe_intermediate_size": 0, "mlp_only_layers": [], "logit_scale": 1.0, "qk_norm": True,
             "use_aux_hidden_state": True, "markov_rank": 0, "kv_lora_rank": None, "num_anchors": 512,
             "loss_decay_gamma": 7.0, "backbone_rotary_base": 5e6, "v_head_dim": 16, "lilicorr_hidden_size": 4,
             "quantization_config": {}, "conv_kernel_size": 0, "conv_group_size": 0, "selector_rank": 0,
             "final_logit_softcapping": 0.0, "draft_vocab_size": None, "mask_token": "<|MASK|>", "tap_shift": 0}
    assert read_draft_config(draft_config({}) | inert) == plain
    for name, value in {"num_experts": 8, "mlp_only_layers": [1], "logit_scale": 0.5, "qk_norm": False,
                        "use_aux_hidden_state": False, "kv_lora_rank": 512, "v_head_dim": 8,
                        "tap_shift": 1, "hybrid_layer_pattern": [1]}.items():
        with pytest.raises(NotImplementedError, match=f"draft config: {name} .*{value if value != [1] else '1'}"):
            read_draft_config(draft_config({}) | {name: value})


@pytest.mark.parametrize(("change", "match"), [
    ({"architectures": ["K3DSparkModel"]}, "'K3DSparkModel' is not supported: a DSpark drafter with layers"),
    ({"projector_type": "domino"}, "is not supported: Domino drafters need the GRU"),
    ({"gru_hidden_dim": 1024}, "gru_hidden_dim = 1024 is not supported: Domino drafters need"),
    ({"lilicorr_enabled": True}, "lilicorr_enabled = True is not supported: LiLiCorr drafters need .*candidates"),
    ({"architectures": ["DFlashQwen3XPressModel"]}, "is not supported: XPress drafters need"),
    ({"architectures": ["DFlashLagunaForCausalLM"]}, "is not supported: Laguna drafters need a gate"),
    ({"attention_mode": "mla"}, "attention_mode = 'mla' is not supported: MLA drafters need .*latent vectors"),
    ({"kv_lora_rank": 512}, "kv_lora_rank = 512 is not supported: MLA drafters need"),
])
def test_p40_other_heads_are_refused_in_one_sentence(change, match):
    with pytest.raises(NotImplementedError, match=match) as caught:
        read_draft_config(draft_config({}) | change)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_p40_a_mask_token_given_as_text_is_the_targets_token(tmp_path):
    from dflash_decode import Session

    folder, text = tiny.write_target(tmp_path / "m"), "<x3>"
    config = {"mask_token": text, "target_layer_ids": [0, 2]}
    draft = tiny.write_drafter(tmp_path / "d", dflash_config=config)
    session = Session.load(folder, draft, dtype="float32")
    assert session.drafter.config.mask_token_id == session.tokenizer.encode(text)[0] > 0
    tiny.write_drafter(tmp_path / "d", dflash_config={**config, "mask_token_id": 5})
    assert Session.load(folder, draft, dtype="float32").drafter.config.mask_token_id == 5
    tiny.write_drafter(tmp_path / "d", dflash_config={**config, "mask_token": "<none>"})
    with pytest.raises(CheckpointError, match="mask_token must be a token of the target's tokenizer, .* got '<none>'"):
        Session.load(folder, draft, dtype="float32")
    with pytest.raises(ValueError, match="mask_token_id must be given beside mask_token"):
        read_draft_config(json.loads((draft / "config.json").read_text()))
    assert with_mask_token({"mask_token": "a"}, {"a": 4}.get)["mask_token_id"] == 4


@pytest.mark.parametrize("changes", [
    {"partial_rotary_factor": 0}, {"partial_rotary_factor": 0, "attention_bias": True},
    {"layer_types": SLIDING, "sliding_window": 6, "rope_parameters": {"full_attention": FULL,
                                                                      "sliding_attention": LOCAL}},
], ids=["nope", "nope-biased", "rope-by-type"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@torch.no_grad()
def test_ropes_of_each_kind_equal_a_dense_drafter(changes, dtype):
    config, tensors, _, drafter = make(changes, dtype)
    thetas = [rope.theta for rope in drafter.config.ropes]
    assert thetas == ([1e4, 1e6, 1e4] if "layer_types" in changes else [1.0] * 3)
    served = Served(drafter, [23, 0, 8]).commit_all()
    hidden, _ = served.draft([3, 96, 50])
    doubles = {k: t.double() for k, t in tensors.items()}
    for b, features in enumerate(served.features):
        rows = embedded(drafter, [3, 96, 50][b])
        want = dense(drafter.config, doubles, features.double(), rows.double())
        assert_within_budget(hidden[b], want, dense(drafter.config, tensors, features, rows), name=str(b))


def test_ropes_of_layer_types_that_are_missing_are_named():
    for given in ({"full_attention": FULL}, {"full_attention": FULL, "sliding_attention": None}):
        with pytest.raises(ValueError, match="rope_parameters: sliding_attention must be a JSON object; got nothing"):
            read_draft_config(draft_config({"layer_types": SLIDING, "sliding_window": 6, "rope_parameters": given}))
