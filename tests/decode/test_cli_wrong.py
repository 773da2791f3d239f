"""Command lines that are written wrongly: exit code 2, one line that says what was expected and what was got, nothing
read, decoded or written before it."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.cli_calls import environment, one_line, prompts_file

pytest.importorskip("typer")

from dflash_bench import repository
from dflash_bench.options import check_written
from dflash_decode import session
from dflash_decode.cli import options

LONG = "x" * 5000
GENERATE = ["generate", "--prompt", "x", "--model", "MODEL", "--drafter", "DRAFT"]
CHAT = ["chat", "--model", "MODEL", "--drafter", "DRAFT"]
DECODE = ["bench", "decode", "--prompts", "FILE", "--model", "MODEL", "--drafter", "DRAFT"]
PROTOCOL = ["bench", "protocol", "--prompts", "FILE", "--model", "MODEL", "--drafter", "DRAFT", "--journal", "NEW"]
# What is wrong with every command that has the option: (option, values).
DRAWING = [("--temperature", ["-1", "nan", "inf", "1e39", "hot", ""]), ("--top-k", ["-2", "2147483648", "1.5", "nan"]),
           ("--top-p", ["-0.1", "1.1", "nan", "inf", "all"]), ("--min-p", ["-0.1", "1.1", "nan", "many"]),
           ("--seed", ["-1", "9223372036854775808", "x"]), ("--rule", ["row", ""]), ("--sample-from", ["target"])]
LOADING = [("--dtype", ["int4", "float64", "", "torch"]), ("--device", ["gpu", "cuda:0", ""]),
           ("--threads", ["0", "-1", "100000", "1e3", "all"]), ("--weights", ["int4"]), ("--drafter-weights", ["fp8"]),
           ("--block-size", ["0", "33", "four"]), ("--max-tokens", ["0", "-1", "2.5", "many"]),
           ("--drafter", ["~nobody-of-that-name", LONG, "a\0b", "no/such", ""]),
           ("--model", ["no/such", "a\0b", ""])]
COUNTS = [("--limit", ["0", "x"]), ("--concurrency", ["0", "-1", "all"])]
OUTPUTS = ["-", "FOLDER", "no/such/x.json", "FILE/x.json", "~nobody-of-that-name/x.json", LONG, f"a/{LONG}", "x" * 255,
           "a\0b", "/dev/null", "/proc/x.json", "FIFO", "FILE", ""]
INPUTS = ["no/such", "FOLDER", "FIFO", "~nobody-of-that-name/x", LONG, "a\0b", "FILE/x", "/dev/null", ""]


def lines():
    for command, groups in ((GENERATE, (DRAWING, LOADING)), (DECODE, (DRAWING, LOADING, COUNTS)),
                            (CHAT, (DRAWING[:5], LOADING)), (PROTOCOL, (LOADING, COUNTS))):
        for option, values in (pair for group in groups for pair in group):
            yield from ([*command, option, value] for value in values)
    for command in (DECODE, PROTOCOL, ["bench", "ops", "linear"], [*DECODE, "--peers", "all"]):
        yield from ([*command, "--json", value] for value in OUTPUTS if command[1] != "ops" or value != "FILE")
    for value in OUTPUTS[:10]:
        yield [*PROTOCOL, "--journal", value]
    yield [*PROTOCOL, "--json", "NEW"]
    for command in ("decode", "protocol"):
        yield from (["bench", command, "--prompts", value] for value in INPUTS)
    for url in ("localhost:8000", "ftp://x", "http://", "http://[::1", "http://x:99999", "http://x:port", ""):
        yield ["bench", "protocol", "--prompts", "FILE", "--journal", "NEW", "--base-url", url]
    for extra in ("[1]", "{", "[" * 100_000, LONG, "5"):
        yield ["bench", "protocol", "--prompts", "FILE", "--base-url", "http://x", "--extra-body", extra]
    yield from ([*GENERATE[:1], *rest] for rest in ([], ["--prompt"], ["--prompt", ""], ["--promt", "x"], ["x"]))
    yield from (["bench", "ops", "--runs", "0"], ["bench", "ops", "--device", "tpu"],
                ["bench", "ops", "--threads", "65535"], ["bench", "ops", "no-such-op"], ["bench", "speed"], ["generte"],
                ["--nonsense"], ["info", "--yaml"], ["info", "x"],
                [*DECODE, "--peers", "all", "--temperature", "1"], [*DECODE[:-2], "--drafter", "none"],
                [*GENERATE[:-2], "--drafter", "none", "--block-size", "4"], [*CHAT, "--system", ""],
                [*CHAT, "--stop", ""], [*CHAT, "--template-kwargs", "[]"], [*CHAT, "--prompt", "x"])


WRONG = list(lines())


def test_they_are_many():
    assert len(WRONG) >= 240 and len({tuple(words) for words in WRONG}) == len(WRONG)


@pytest.fixture(scope="module")
def names(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    os.mkfifo(folder / "fifo")
    return {"MODEL": models["model"], "DRAFT": models["draft"], "FILE": str(prompts_file(folder, "t")),
            "FOLDER": str(folder), "FIFO": str(folder / "fifo"), "NEW": str(folder / "new"),
            "FILE/x.json": str(folder / "prompts.jsonl" / "x.json"), "FILE/x": str(folder / "prompts.jsonl" / "x")}


@pytest.mark.parametrize("words", WRONG, ids=lambda words: " ".join(w[:20] for w in words if w.isupper() is False)[:70])
def test_a_wrong_command_line_is_one_line(call, names, monkeypatch, words):
    monkeypatch.setattr(session.Decoder, "step", None)  # nothing is decoded
    monkeypatch.setattr(repository, "subprocess", None)  # no script is started
    monkeypatch.setattr("torch.set_num_threads", print)  # nor threads, of which too many end the process
    before = sorted(os.listdir(names["FOLDER"])), Path(names["FILE"]).read_bytes()
    code, out, err = call(*(names.get(word, word) for word in words))
    assert code == 2 and out == "" and one_line(err) and len(err) < 500, (code, out[:200], err[:500])
    assert (sorted(os.listdir(names["FOLDER"])), Path(names["FILE"]).read_bytes()) == before


@pytest.mark.parametrize("shell, words", [
    ("exec {} <&-", "--prompt - reads standard input, which is closed"),
    ("printf '\\377' | {}", "--prompt - must be text on standard input; got 'utf-8' codec")], ids=["closed", "no text"])
def test_a_prompt_that_cannot_be_read_from_standard_input(shell, words):
    command = shell.format(f"{shlex.quote(sys.executable)} -m dflash_decode.cli generate --prompt -")
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True,
                          env=environment(PYTHONIOENCODING="utf-8:strict"))
    assert done.returncode == 2 and words in done.stderr and one_line(done.stderr), done.stderr


def test_threads_have_a_bound_that_no_machine_needs_more_than(call, monkeypatch):
    monkeypatch.setattr("torch.set_num_threads", print)
    assert max(os.cpu_count(), 64) <= options.MOST_THREADS
    code, _, err = call("generate", "--prompt", "x", "--threads", options.MOST_THREADS + 1)
    assert code == 2 and "'--threads'" in err and str(options.MOST_THREADS) in err


def test_outputs_are_tried_and_left_as_they_were(tmp_path):
    kept = tmp_path / "kept.json"
    kept.write_text("before")
    check_written({"--json": kept, "--journal": tmp_path / "new.json"})
    assert kept.read_text() == "before" and os.listdir(tmp_path) == ["kept.json"]
    with pytest.raises(options.UsageError, match="--journal must be a file .*: it is also an input"):
        check_written({"--json": kept, "--journal": tmp_path / "." / "kept.json"})


@pytest.mark.slow
@pytest.mark.parametrize("script", ["bench.ops", "bench.peers --prompts x", "bench.engines"])
def test_the_repositorys_scripts_try_their_output_first(tmp_path, script):
    done = subprocess.run([sys.executable, "-m", *script.split(), "--json", str(tmp_path)], cwd=ROOT,
                          capture_output=True, text=True, env=environment())
    assert done.returncode == 2 and "--json: must be a file that can be written; got" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []
