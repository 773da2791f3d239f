"""A family of ours with a field that our layers lack: transformers' layers run it and a warning says so, or, with
native, it is an error."""

import json
import shutil
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")

from dflash_decode.checkpoint import CheckpointError  # noqa: E402
from dflash_decode.model.hf import HFTarget  # noqa: E402
from dflash_decode.model.native import NativeTarget  # noqa: E402
from dflash_decode.session import Session  # noqa: E402
from tests.support import tiny  # noqa: E402
from tests.support.decode_models import COMMON, baseline_text, randomise  # noqa: E402

PROMPT = list(range(1, 40))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A Qwen2 with another activation than our layers have, and its directory."""
    folder = tiny.write_target(tmp_path_factory.mktemp("m") / "m")
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        **COMMON, hidden_act="gelu")).eval()
    randomise(model)
    model.save_pretrained(folder)
    return model, folder


def test_transformers_layers_run_it_and_one_warning_says_so(foreign):
    model, folder = foreign
    with pytest.warns(UserWarning) as told:
        session = Session.load(folder, None, dtype="float32")
    assert [str(w.message) for w in told] == [
        f"{folder}: transformers' own layers run this model, which is slower, and in 16 bits output with a drafter can "
        "differ from output without one at a near tie: target config: hidden_act = 'gelu' changes the model into one "
        "that is not supported"]
    assert isinstance(session.target, HFTarget)
    assert session.run([PROMPT], max_tokens=16).answers[0].tokens == baseline_text(model, PROMPT, 16)


def test_the_attention_that_a_config_names_is_not_fetched(foreign, tmp_path):
    """transformers would take it from the Hub, and refuse a model whose backend is not installed."""
    model, folder = foreign
    shutil.copytree(folder, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    for name in ("kernels-community/flash-attn2", "flash_attention_2"):
        (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"_attn_implementation": name}))
        with pytest.warns(UserWarning, match="transformers' own layers run this model"):
            session = Session.load(tmp_path / "m", None, dtype="float32")
        assert session.run([PROMPT], max_tokens=4).answers[0].tokens == baseline_text(model, PROMPT, 4)


@pytest.mark.parametrize("how", [{"native": True}, {"weights": "int8"}])
def test_what_only_our_layers_do_is_an_error(foreign, how):
    with pytest.raises(CheckpointError, match="target config: hidden_act = 'gelu' changes the model"):
        Session.load(foreign[1], None, **how)


def test_a_wrong_field_is_no_reason_for_other_layers(tmp_path):
    folder = tiny.write_target(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": -1.0}))
    with pytest.raises(CheckpointError, match="rms_norm_eps must be a number above 0"):
        Session.load(folder, None)


def test_native_changes_nothing_where_our_layers_run(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(Session.load(tiny.write_target(tmp_path), None, native=True).target, NativeTarget)


def test_where_neither_runs_it_both_are_named(tmp_path):
    folder = tiny.write_target(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"clip_qkv": 8.0, "rope_scaling": {"type": "unknown"}}))
    with pytest.raises(CheckpointError, match=r"clip_qkv = 8.0 changes the model .*; .*transformers"):
        Session.load(folder, None)
