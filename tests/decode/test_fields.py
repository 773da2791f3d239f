"""Every numeric field of a target's and a drafter's config, given what is no number of its range."""

import copy
import json
import math

import pytest
import torch

pytest.importorskip("safetensors")

from dflash_decode.checkpoint import CheckpointError, load_checkpoint
from dflash_decode.checkpoint.fields import FLOAT_MAX, MOST, Fields, shown
from dflash_decode.checkpoint.tokenizer import load_tokenizer
from dflash_decode.model.config import read_draft_config
from dflash_decode.model.native import NativeTarget
from dflash_decode.model.rope import read_rope
from dflash_decode.session import _target, drafter_for
from tests.support import tiny

ROPES = {
    "default": {"rope_theta": 10000.0},
    "linear": {"rope_theta": 10000.0, "factor": 2.0},
    "llama3": {"rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64},
    "yarn": {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.0,
             "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "partial_rotary_factor": 1.0},
}
TARGET = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 64,
    "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 264, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128, "tie_word_embeddings": True, "max_window_layers": 28, "sliding_window": 16,
}
DRAFT = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 64, "num_key_value_heads": 2,
    "intermediate_size": 128, "vocab_size": 264, "draft_vocab_size": 264, "rms_norm_eps": 1e-6, "rotary_dim": 64,
    "max_position_embeddings": 128, "num_target_layers": 4, "target_hidden_size": 64, "sliding_window": 16,
    "max_window_layers": 1, "final_logit_softcapping": 30.0, "rope_theta": 10000.0,
    "dflash_config": {"mask_token_id": 0, "target_layer_ids": [0, 2], "block_size": 4, "attention_value_scale": 0.7,
                      "input_embedding_scale": 2.0, "output_multiplier": 0.5, "swa_window_size": 8},
}
HUGE = 10**4400  # has more digits than Python writes
NEVER = (math.nan, math.inf, -math.inf, 10**400, -10**400, HUGE, 1e39, "1", "", [1], {"a": 1}, [], {}, False, True)
# Beside these: what a field means, where it may be 0, and where it may be negative.
ZERO = {"mask_token_id", "sliding_window", "swa_window_size", "max_window_layers", "final_logit_softcapping", "mscale",
        "mscale_all_dim", "partial_rotary_factor"}
NEGATIVE = {"final_logit_softcapping"}
WHOLE = {"hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "num_key_value_heads",
         "intermediate_size", "vocab_size", "draft_vocab_size", "max_position_embeddings", "num_target_layers",
         "target_hidden_size", "sliding_window", "swa_window_size", "max_window_layers", "mask_token_id", "block_size",
         "rotary_dim"}


def numbers(config, path=()):
    """Where in a config numbers are."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from numbers(value, (*path, name))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield (*path, name)


def changed(config, path, value):
    config = copy.deepcopy(config)
    place = config
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return config


def wrong_values(name):
    yield from NEVER
    if name not in ZERO:
        yield 0
        yield 0.0
    if name not in NEGATIVE:
        yield -1
        yield -0.5
        yield -1e-30
    if name in WHOLE:
        yield 1.5
        yield MOST + 1


def with_rope(config, kind):
    return config | {"rope_parameters": {"rope_type": kind, **ROPES[kind]}}


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    return load_checkpoint(tiny.write_target(tmp_path_factory.mktemp("target"))).tensors


@pytest.mark.parametrize("kind", ROPES)
def test_every_number_of_a_targets_config_is_refused_out_of_its_range(tensors, kind):
    config = with_rope(TARGET, kind)
    NativeTarget(config, tensors)
    found = list(numbers(config))
    assert ("rope_parameters", "rope_theta") in found and len(found) >= 11
    for path in found:
        for value in wrong_values(path[-1]):
            with pytest.raises((ValueError, NotImplementedError), match=f"^target .*{path[-1]}.* got ") as caught:
                NativeTarget(changed(config, path, value), tensors)
            assert len(str(caught.value)) < 400


@pytest.mark.parametrize("kind", ROPES)
def test_every_number_of_a_drafters_config_is_refused_out_of_its_range(kind):
    config = with_rope(DRAFT, kind)
    read_draft_config(config)
    found = list(numbers(config))
    assert ("dflash_config", "block_size") in found and len(found) >= 23
    for path in found:
        for value in wrong_values(path[-1]):
            with pytest.raises((ValueError, NotImplementedError), match=f"^draft config: .*{path[-1]}.* got ") as error:
                read_draft_config(changed(config, path, value))
            assert len(str(error.value)) < 400


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta", "sliding_window", "rope_parameters", "layer_types",
                                  "attention_bias", "max_window_layers", "is_neox_style"])
def test_null_is_as_good_as_absent(tensors, name):
    assert NativeTarget(TARGET | {name: None}, tensors).geometry == NativeTarget(TARGET, tensors).geometry
    config = DRAFT | {"rope_parameters": {"rope_theta": 10000.0}} | {name: None}
    assert read_draft_config(config) == read_draft_config({k: v for k, v in config.items() if k != name})


@pytest.mark.parametrize("name", ["attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window",
                                  "rope_interleaved", "is_neox_style"])
@pytest.mark.parametrize("value", ["no", 0, 1, [], {}])
def test_what_is_neither_true_nor_false_is_no_flag(tensors, name, value):
    config = (TARGET | {"model_type": "qwen3"}) if name == "use_sliding_window" else TARGET
    with pytest.raises((ValueError, NotImplementedError), match=f"{name} .*{shown(value)[:1]}" if value else name):
        NativeTarget(config | {name: value}, tensors)
    if name != "tie_word_embeddings":
        with pytest.raises(ValueError, match=f"{name} must be true or false"):
            read_draft_config(DRAFT | {name: value})


@pytest.mark.parametrize(("name", "value"), [
    ("layer_types", 5), ("layer_types", [[1]]), ("layer_types", {"a": 1}), ("rope_parameters", [1]),
    ("rope_parameters", "yarn"), ("rope_parameters", {"rope_type": ["yarn"]}), ("rope_scaling", 2.0),
    ("rope_parameters", {"rope_type": {}}), ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": []}),
    ("model_type", ["llama"]), ("model_type", 7), ("hidden_act", ["silu"]), pytest.param("hidden_act", HUGE, id="huge"),
    ("num_experts", math.nan), ("logit_scale", [1.0]),
])
def test_lists_objects_and_texts_where_something_else_belongs(tensors, name, value):
    with pytest.raises((ValueError, NotImplementedError), match="target config: "):
        NativeTarget(TARGET | {name: value}, tensors)
    if name in ("layer_types", "rope_parameters", "rope_scaling", "hidden_act"):
        with pytest.raises((ValueError, NotImplementedError), match="draft config: "):
            read_draft_config(DRAFT | {name: value})


@pytest.mark.parametrize(("name", "value"), [
    ("architectures", 5), ("architectures", [5]), ("architectures", "DFlash"), ("is_causal", "yes"), ("causal", 1),
    ("dflash_config", [1]), ("target_layer_ids", [1.0]), ("target_layer_ids", [True]), ("target_layer_ids", []),
    ("target_layer_ids", [HUGE]), ("aux_hidden_state_layer_ids", [0]), ("block_size", 10**6),
    pytest.param("mystery", HUGE, id="huge"), ("num_hidden_layers", 10**6),
])
def test_a_drafters_fields_of_other_types(name, value):
    nested = {k: v for k, v in DRAFT["dflash_config"].items() if k != name}
    with pytest.raises((ValueError, NotImplementedError), match=f"draft config: .*{name}"):
        read_draft_config({**DRAFT, "dflash_config": nested, name: value})


def test_configs_that_are_no_objects(tensors):
    for config in (None, [], "x", 3):
        with pytest.raises(ValueError, match="must be a JSON object; got"):
            NativeTarget(config, tensors)
        with pytest.raises(ValueError, match="must be a JSON object; got"):
            read_draft_config(config)


@pytest.mark.parametrize(("rope", "match"), [
    ({"rope_type": "yarn", "rope_theta": 1, "factor": 2.0}, "rope_theta must be a number above 1; got 1"),
    ({"rope_type": "yarn", "rope_theta": 1 + 1e-9, "factor": 2.0}, "rope_theta must be a number above 1; got 1.0000"),
    ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 2}, "beta_fast must be at least beta_slow = 2"),
    ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, "truncate must be true or false; got 1"),
    ({"rope_type": "yarn", "factor": 1e38, "mscale": 3e38, "mscale_all_dim": 1e-3}, "finite frequencies; got theta"),
    ({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4,
      "original_max_position_embeddings": 64}, "high_freq_factor must be above low_freq_factor = 4; got 4"),
    ({"rope_type": "linear"}, "factor must be a number above 0; got nothing"),
])
def test_rope_parameters_that_mean_nothing_together(rope, match):
    with pytest.raises(ValueError, match=f"^test: .*{match}"):
        read_rope({"rope_parameters": rope, "max_position_embeddings": 64}, 16, "test")


def test_yarn_without_any_length_is_refused():
    with pytest.raises(ValueError, match="original_max_position_embeddings must be a number above 0; got nothing"):
        read_rope({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, 16, "test")


def test_garbage_in_files_is_a_checkpoint_error_that_names_the_file(tmp_path):
    """The whole way: what a NativeTarget or a Drafter refuses names its folder."""
    def target_of(folder):
        return _target(str(folder), "llama", torch.bfloat16, torch.device("cpu"), "model")

    target, tokenizer = target_of(tiny.write_target(tmp_path / "good")), load_tokenizer(tmp_path / "good")

    def drafter_of(folder):
        return drafter_for(target, load_checkpoint(folder), "model", tokenizer.token_id)

    for text in ('"rms_norm_eps": NaN', '"rope_theta": 0', '"rope_theta": -1e4', '"rms_norm_eps": 1e999',
                 '"rope_scaling": {"rope_type": "linear", "factor": -2}', f'"vocab_size": {"9" * 4200}',
                 f'"vocab_size": {"9" * 4400}', '"hidden_size": null', '"max_position_embeddings": [1]'):
        for write, load in ((tiny.write_target, target_of), (tiny.write_drafter, drafter_of)):
            folder = write(tmp_path / "m")
            config = (folder / "config.json").read_text()
            (folder / "config.json").write_text(f"{config[:-1]}, {text}}}")  # of two fields the later one counts
            with pytest.raises(CheckpointError, match=str(folder)) as caught:
                load(folder)
            assert len(str(caught.value)) < 600
    assert json.loads(config)["rms_norm_eps"] == 1e-6


def test_fields_are_looked_up_in_turn_and_defaults_are_their_own():
    f = Fields("w", {"a": None, "b": 2}, {"a": 3, "b": 4, "c": "x"})
    assert (f.whole("a"), f.whole("b"), f.whole("none", 0), f.number("none", None)) == (3, 2, 0, None)
    assert f.seen == {"a", "b", "none"}
    for read, kind in ((f.whole, "an integer of at least 1"), (f.number, "a number"), (f.flag, "true or false"),
                       (f.table, "a JSON object"), (f.items, "a list of values")):
        with pytest.raises(ValueError, match=f"^w: c must be {kind}; got 'x'$"):
            read("c")
        with pytest.raises(ValueError, match=f"^w: none must be {kind}; got nothing$"):
            read("none")
    with pytest.raises(CheckpointError, match="w: b must be a text; got 2"):
        Fields("w", {"b": 2}, error=CheckpointError).text("b")
    assert Fields("w", {"a": FLOAT_MAX}).number("a") == FLOAT_MAX


@pytest.mark.parametrize(("value", "text"), [
    (None, "nothing"), pytest.param(HUGE, "an integer of 14617 bits", id="huge"),
    ([10**5000], "a list that cannot be shown"),
    ([[[[[1]]]]], "[[[[...]]]]"), ("x" * 1000, None), ([0] * 1000, None), ({str(i): i for i in range(999)}, None),
])
def test_a_value_is_shown_on_one_short_line(value, text):
    found = shown(value)
    assert len(found) < 100 and "\n" not in found and (text is None or found == text)
