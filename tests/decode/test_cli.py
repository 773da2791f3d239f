"""The command line: outputs, exit codes, messages, and nothing half-written."""

import importlib.metadata
import json
import re
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
from dflash_decode import LLM
from dflash_decode.checkpoint import tokenizer
from dflash_kernels import build_info

# ---- info ----------------------------------------------------------------------------------------------------------


def test_info(call):
    code, out, err = call("info")
    assert code == 0 and err == "" and "\x1b" not in out
    found = build_info()
    for name, value in {"dflash-kernels": found["version"], "python, torch": f"{found['python']}, {found['torch']}",
                        "CPU kernels": "built" if found["cpu_kernels"] else "missing", "ops": found["ops"][0],
                        "GPU kernels": "torch sees a GPU" if found["cuda"] else "torch sees no GPU"}.items():
        assert re.search(rf"^{name} +{re.escape(value)}", out, re.MULTILINE), name
    assert all(op in out for op in found["ops"])


def test_info_json(call):
    code, out, _ = call("info", "--json")
    found = json.loads(out)
    parts = found.pop("parts")
    assert code == 0 and found.pop("models") == ["smollm2"] and found == build_info()
    installed = {each.metadata["Name"].lower().replace("_", "-"): each.version
                 for each in importlib.metadata.distributions()}
    assert {"gguf", "tokenizers"} < parts.keys()
    assert {name: part["version"] for name, part in parts.items()} == {name: installed.get(name) for name in parts}


@pytest.mark.slow
def test_an_instruction_set_that_the_cpu_lacks(models):
    done = subprocess.run([sys.executable, "-m", "dflash_decode.cli", "info"], capture_output=True, text=True,
                          env=environment(DFLASH_ISA="sparc"))
    built = cli_facts()["cpu_kernels"]
    assert done.returncode == (1 if built else 0)
    assert not built or ("DFLASH_ISA must be one of the sets this CPU has" in done.stderr and one_line(done.stderr))


def cli_facts():
    from dflash_decode.cli import info
    return info.facts()


def test_info_says_what_is_missing_and_how_to_get_it(call, monkeypatch):
    from dflash_decode.cli import info
    missing = {"cpu_kernels": False, "isas": [], "isa": "reference", "compiler": "", "nvcc": ""}
    monkeypatch.setattr(info, "build_info", lambda real=info.build_info: real() | missing)
    monkeypatch.setattr(info, "_PARTS", (("no-such-part", "dreams", "pip install 'dflash-kernels[dream]'"),))
    _, out, _ = call("info")
    assert "missing (not built)" in out and "install g++" in out
    assert "missing (dreams); to get it: pip install 'dflash-kernels[dream]'" in out


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, code, message", [
    (["generate"], 2, "one of --prompt, --file, --messages must be given; got none"),
    (["generate", "--prompt", "x", "--nonsense"], 2, "No such option"),
    (["frobnicate"], 2, "No such command 'frobnicate'"),
    (["generate", "--prompt", "", "--model", "MODEL"], 2, "--prompt must not be empty"),
    (["generate", "--prompt", "x", "--max-tokens", "0"], 2, "--max-tokens"),
    (["generate", "--prompt", "x", "--max-tokens", "many"], 2, "--max-tokens"),
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
    (["generate", "--prompt", "x", "--model", "MODEL", "--drafter", "no/such"], 2,
     "'auto', 'random' or 'none'; got 'no/such', which does not exist"),
    (["generate", "--prompt", "x", "--model", "MODEL", "--drafter", "DRAFT", "--block-size", "5"], 1,
     "block_size must be at most the drafter's 4; got 5"),
    (["generate", "--prompt", "x" * 200, "--model", "MODEL"], 1, "shorter than the context of 128 tokens"),
    (["generate", "--prompt", "x", "--model", "DRAFT"], 1, "model must be a target model; got a drafter"),
    (["generate", "--prompt", "x", "--model", "MODEL", "--drafter", "MODEL"], 1, "drafter must be a DFlash drafter"),
    (["bench", "decode"], 2, "Missing option '--prompts'"),
    (["bench", "decode", "--prompts", "no/such"], 2, "--prompts must be a file; got 'no/such', which does not exist"),
    (["bench", "decode", "--prompts", "MODEL"], 2, "which is a directory"),
    (["bench", "decode", "--prompts", "GOOD", "--drafter", "none"], 2, "--drafter must be a drafter's directory"),
    (["bench", "decode", "--prompts", "GOOD", "--model", "MODEL"], 2, "; drafter must be a drafter's directory"),
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
    code, _, err = call("generate", "--prompt", "x", "--model", models["model"], "--drafter", folder)
    assert code == 1 and message in err and str(folder) in err and one_line(err)


def test_an_unexpected_error_is_one_line_and_debug_shows_it(call, models, monkeypatch):
    def broken(self, *args, **kwargs):
        raise RuntimeError("the lights\nwent out")

    monkeypatch.setattr(LLM, "submit", broken)
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
    code, out, err = call("generate", "--prompt", "x", "--model", models["model"], "--max-tokens", 50)
    assert code == 130 and err == "dflash-kernels: interrupted\n" and "tokens" not in out
    assert written == ["x", "x", "x", "\n"]


def test_interrupt_in_a_bench_writes_nothing(call, models, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "bench_decode", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    code, out, err = call("bench", "decode", "--prompts", prompts_file(tmp_path, "t"), "--model", models["model"],
                          "--drafter", models["draft"], "--json", tmp_path / "x.json")
    assert code == 130 and err == "dflash-kernels: interrupted\n" and out == ""
    assert [f.name for f in tmp_path.iterdir()] == ["prompts.jsonl"]


TELLS_WHEN_IT_DECODES = """
import sys
from dflash_decode import session
from dflash_decode import cli

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


@pytest.mark.slow
def test_interrupt_of_the_process(models, tmp_path):
    rows = prompts_file(tmp_path, *(f"t{i}" for i in range(5000)))
    process = subprocess.Popen([sys.executable, "-c", TELLS_WHEN_IT_DECODES, "bench", "decode", "--prompts", str(rows),
                                "--model", models["model"], "--drafter", models["draft"], "--max-tokens", "100",
                                "--json", str(tmp_path / "x.json")], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=environment(), preexec_fn=heed_interrupts)
    assert process.stderr.readline() == "decoding\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130 and err.endswith("dflash-kernels: interrupted\n") and out == ""
    assert "Traceback" not in err
    assert sorted(f.name for f in tmp_path.iterdir()) == ["prompts.jsonl"]


# ---- where it runs -------------------------------------------------------------------------------------------------


def test_version(call):
    assert call("--version") == (0, build_info()["version"] + "\n", "")


@pytest.mark.slow
def test_a_closed_output_is_no_crash():
    command = f"exec {shlex.quote(sys.executable)} -m dflash_decode.cli info >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], env=environment()).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("words", [["info"], ["--version"], ["generate", "--prompt", "hi", "--max-tokens", "2"]],
                         ids=lambda words: words[0])
def test_a_full_disk_under_the_output_is_one_line_in_plain_words(models, words):
    words += ["--model", models["model"], "--drafter", models["draft"]] * (words[0] == "generate")
    with open("/dev/full", "w") as full:
        ran = subprocess.run([sys.executable, "-m", "dflash_decode.cli", *words], stdout=full, stderr=subprocess.PIPE,
                             env=environment(PYTHONUNBUFFERED="1" if words[0] == "info" else ""), text=True)
    assert (ran.returncode, ran.stderr) == (
        1, "dflash-kernels: standard output cannot be written: No space left on device\n")


@pytest.mark.slow
def test_an_output_that_is_not_unicode_gets_the_text_escaped(models):
    ran = subprocess.run([sys.executable, "-m", "dflash_decode.cli", "generate", "--prompt", "hi", "--model",
                          models["model"], "--drafter", models["draft"], "--max-tokens", "4", "--compare"],
                         env=environment(PYTHONIOENCODING="ascii"), capture_output=True, text=True)
    assert ran.returncode == 0 and "\\u2588" in ran.stdout, ran.stderr


@pytest.mark.slow
def test_an_instruction_set_that_is_set_to_nothing_is_not_set():
    ran = subprocess.run([sys.executable, "-c", "import dflash_kernels as d; print(d.build_info()['isa'])"],
                         env=environment(DFLASH_ISA=""), capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.strip(), ran.stderr
