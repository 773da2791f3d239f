import pytest

from dflash_decode.model.config import Convolution, LayerMask, Selector, read_draft_config, spread_target_layers
from dflash_decode.model.drafter import tensor_shapes
from dflash_decode.model.rope import read_rope

BASE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "vocab_size": 100, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_target_layers": 12,
    "dflash_config": {"block_size": 8, "target_layer_ids": [1, 9], "mask_token_id": 99},
}


def config(nested=None, **top):
    return {**BASE, **top, "dflash_config": {**BASE["dflash_config"], **(nested or {})}}


def masks(nested=None, **top):
    return read_draft_config(config(nested, **top)).masks


def test_every_field_is_read():
    c = read_draft_config(config({
        "attention_value_scale": 0.707, "input_embedding_scale": 8.0, "output_multiplier": 0.5,
        "final_logit_softcapping": 30.0, "attention_sink_bias": True, "projector_type": "dflash",
    }, attention_bias=True, partial_rotary_factor=0.5, max_position_embeddings=4096, target_hidden_size=64,
        draft_vocab_size=50, has_own_lm_head=True, has_embed_tokens=False, transformers_version="4.57",
        dtype="bfloat16"))
    assert (c.hidden_size, c.num_layers, c.num_heads, c.num_kv_heads, c.head_dim) == (64, 2, 4, 2, 16)
    assert (c.block_size, c.mask_token_id, c.target_layer_ids, c.num_target_layers) == (8, 99, (1, 9), 12)
    assert (c.value_scale, c.input_embedding_scale, c.output_multiplier) == (0.707, 8.0, 0.5)
    assert c.final_logit_softcapping == 30.0 and c.attention_bias and c.masks[0].sinks
    assert (c.ropes[1].rotary_dim, c.ropes[0].theta, c.rms_norm_eps) == (8, 1e6, 1e-5)
    assert (c.vocab_size, c.draft_vocab_size, c.own_head, c.own_embedding) == (100, 50, True, False)


def test_nested_block_size_wins_over_top_level():
    assert read_draft_config(config(block_size=16)).block_size == 8
    top = config(block_size=16)
    del top["dflash_config"]["block_size"]
    assert read_draft_config(top).block_size == 16


@pytest.mark.parametrize(("top", "nested", "kind", "causal"), [
    (None, None, "full_attention", False), (None, None, "sliding_attention", True),
    (None, True, "full_attention", True), (None, False, "sliding_attention", False),
    (True, False, "full_attention", True), (False, True, "sliding_attention", False),
    (True, None, "full_attention", True), (False, None, "sliding_attention", False),
])
def test_p6_causality_is_top_level_then_dflash_config_then_layer_type(top, nested, kind, causal):
    got = masks({"causal": nested}, is_causal=top, layer_types=[kind] * 2, sliding_window=9)
    assert [m.causal for m in got] == [causal] * 2


def test_p3_the_mask_is_the_drafts_own():
    got = masks(layer_types=["sliding_attention", "full_attention"], sliding_window=9)
    assert got == (LayerMask(True, (8, -1)), LayerMask(False, (-1, -1)))


@pytest.mark.parametrize(("causal", "window"), [(True, (8, -1)), (False, (8, 8))])
def test_p5_window_counts_the_current_token_and_is_symmetric_without_causality(causal, window):
    assert masks(layer_types=["sliding_attention"] * 2, sliding_window=9, is_causal=causal)[0].window == window


def test_p7_use_swa_slides_every_layer_and_leaves_causality_to_the_type():
    full = {"layer_types": ["full_attention"] * 2}
    assert masks({"use_swa": True, "swa_window_size": 5}, **full) == (LayerMask(False, (4, 4)),) * 2
    assert masks({"use_swa": True}, sliding_window=7, **full)[0].window == (6, 6)
    assert masks({"use_swa": True, "swa_window_size": 5, "causal": True}, **full)[0] == LayerMask(True, (4, -1))
    assert masks({"use_swa": False, "swa_window_size": 5}, **full)[0].window == (-1, -1)
    assert masks({"add_swa_attention_sink_bias": True}, sliding_window=7,
                 layer_types=["sliding_attention", "full_attention"])[0].sinks


def test_p4_a_window_is_never_dropped_in_silence():
    slides = {"layer_types": ["sliding_attention"] * 2}
    with pytest.raises(ValueError, match="sliding_window must be an integer .*got nothing"):
        masks(**slides)
    with pytest.raises(ValueError, match="use_sliding_window must not be false"):
        masks(sliding_window=9, use_sliding_window=False, **slides)
    assert masks(sliding_window=9, use_sliding_window=True, max_window_layers=1)[1].window == (8, -1)
    assert masks(sliding_window=9, use_sliding_window=True, max_window_layers=1)[0].window == (-1, -1)


def test_p8_target_layer_ids_of_both_formats_name_the_same_layers():
    speculators = config({"target_layer_ids": None}, aux_hidden_state_layer_ids=[2, 10])
    assert read_draft_config(speculators).target_layer_ids == (1, 9)
    with pytest.raises(ValueError, match="aux_hidden_state_layer_ids must be target_layer_ids \\+ 1"):
        read_draft_config(config(aux_hidden_state_layer_ids=[1, 9]))


def test_p9_the_last_layer_may_be_a_target_layer_and_one_more_not():
    assert read_draft_config(config({"target_layer_ids": [0, 11]})).target_layer_ids == (0, 11)
    with pytest.raises(ValueError, match=r"target_layer_ids must be distinct and between 0 and .* = 11; got \[1, 12\]"):
        read_draft_config(config({"target_layer_ids": [1, 12]}))


def test_p10_target_layer_ids_keep_their_order():
    assert read_draft_config(config({"target_layer_ids": [9, 1]})).target_layer_ids == (9, 1)


def test_p11_missing_target_layer_ids_follow_the_authors_rule_or_raise():
    model = pytest.importorskip("dflash.model")
    for n in (28, 36, 48, 62):
        for layers in (1, 2, 5, 8):
            assert list(spread_target_layers(n, layers)) == model.build_target_layer_ids(n, layers)
    missing = config({"target_layer_ids": None})
    assert read_draft_config(missing).target_layer_ids == (1, 9)
    with pytest.raises(ValueError, match="target_layer_ids must be given"):
        read_draft_config({**missing, "num_target_layers": None})


@pytest.mark.parametrize("name", [
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_missing_and_wrong_fields_are_named(name):
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1; got nothing"):
        read_draft_config(config(**{name: None}))
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1; got 'big'"):
        read_draft_config(config(**{name: "big"}))


@pytest.mark.parametrize(("nested", "error", "match"), [
    ({"block_size": None}, ValueError, "block_size must be an integer of at least 1; got nothing"),
    ({"block_size": 0}, ValueError, "block_size must be .* got 0"),
    ({"mask_token_id": None}, ValueError, "mask_token_id must be an integer of at least 0; got nothing"),
    ({"mask_token_id": None, "mask_token": "<|MASK|>"}, ValueError, "is resolved by the target's tokenizer"),
    ({"target_layer_ids": "1,9"}, ValueError, "target_layer_ids must be a list of layer numbers; got '1,9'"),
    ({"conv_kernel_size": 2}, ValueError, "conv_group_size must be a divisor of hidden_size = 64 beside .* got 0"),
    ({"conv_kernel_size": 2, "conv_group_size": 12}, ValueError, "conv_group_size must be a divisor of .* got 12"),
    ({"conv_group_size": 16}, ValueError, "conv_kernel_size must be between 1 and 1024 beside .* got 0"),
    ({"selector_rank": 256}, ValueError, "selector_top_k must be between 1 and 64 beside selector_rank = 256; got 0"),
    ({"selector_rank": 256, "selector_top_k": 65}, ValueError, "selector_top_k must be between 1 and 64 .* got 65"),
    ({"selector_top_k": 16}, ValueError, "selector_rank must be an integer of at least 1 beside .* got 0"),
    ({"projector_type": "domino"}, NotImplementedError, "projector_type = 'domino' is not supported: Domino"),
    ({"lilicorr_enabled": True}, NotImplementedError, "lilicorr_enabled = True is not supported: LiLiCorr"),
    ({"markov_head_type": "rnn"}, NotImplementedError, "markov_head_type must be 'vanilla'"),
    ({"mystery": 0}, NotImplementedError, "dflash_config.mystery is not supported; got 0"),
    ({"attention_value_scale": "x"}, ValueError, "attention_value_scale must be a number above 0; got 'x'"),
])
def test_p40_unknown_and_unsupported_fields_raise_by_name(nested, error, match):
    with pytest.raises(error, match=match):
        read_draft_config(config(nested))


@pytest.mark.parametrize(("top", "match"), [
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.quant_method must be one of .* got .gptq"),
    ({"num_experts": 8}, "draft config: num_experts is not supported; got 8"),
    ({"hidden_act": "gelu"}, "hidden_act must be 'silu'; got 'gelu'"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "rope type must be one of .* got 'dynamic'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "mrope_section": [1]}}, "rope field 'mrope_section'"),
    ({"layer_types": ["chunked_attention"] * 2}, "layer_types must be .* got 'chunked_attention'"),
])
def test_p40_top_level_too(top, match):
    with pytest.raises(NotImplementedError, match=match):
        read_draft_config(config(**top))


def test_the_fields_of_dflash2_are_a_record_each():
    c = read_draft_config(config({"conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 8,
                                  "selector_top_k": 16}, architectures=["DFlash2DraftModel"]))
    assert (c.conv, c.selector) == (Convolution(taps=2, group=16), Selector(rank=8, candidates=16))
    shapes = tensor_shapes(c)
    assert shapes["layers.1.attention_conv.base_kernel"] == shapes["layers.0.mlp_conv.base_kernel"] == (2, 2, 64)
    assert shapes["layers.1.mlp_conv.kernel_projection.weight"] == (16, 64)
    assert shapes["candidate_selector.predecessor_codebook"] == (100, 8)
    assert shapes["candidate_selector.hidden_projection.weight"] == (8, 64)
    off = read_draft_config(config({"conv_kernel_size": 0, "conv_group_size": 0, "selector_rank": 0}))
    assert off.conv is None and off.selector is None
    with pytest.raises(ValueError, match="conv_kernel_size, .* must be given, as architectures is .*DFlash2DraftModel"):
        read_draft_config(config(architectures=["DFlash2DraftModel"]))


def test_switched_off_fields_of_later_versions_are_fine():
    read_draft_config(config({"lilicorr_enabled": False, "lilicorr_hidden_size": 4, "sample_from_anchor": False},
                             quantization_config=None))


def test_p13_no_scaling_without_rope_scaling_and_the_frequencies_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    kinds = [{}, {"rope_type": "linear", "factor": 4.0},
             {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
             {"rope_type": "yarn", "factor": 64.0, "original_max_position_embeddings": 256, "beta_fast": 1.0,
              "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.5},
             {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 128}]
    for scaling in kinds:
        parameters = {"rope_theta": 5e4, "rope_type": "default", **scaling}
        hf = transformers.Qwen3Config(head_dim=32, max_position_embeddings=16384, rope_parameters=dict(parameters))
        at = torch.tensor([[0, 1, 77, 10_007, 16_383]])
        cos, sin = Qwen3RotaryEmbedding(hf)(torch.zeros(1), at)
        want = torch.cat((cos[0, :, :16], sin[0, :, :16]), -1)
        for form in ({"rope_parameters": parameters}, {"rope_theta": 5e4, "rope_scaling": scaling or None}):
            rope = read_rope({**form, "max_position_embeddings": 16384}, 32, "test")
            torch.testing.assert_close(rope.table(16384)[at[0]], want, rtol=0, atol=0)
