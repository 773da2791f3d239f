"""`dflash-kernels bench`: figures, files, and what it hands to the repository's scripts."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.support.cli_calls import environment, one_line, prompts_file

pytest.importorskip("typer")

from dflash_bench import decode as bench
from dflash_bench import repository, results
from dflash_decode import session
from dflash_decode.checkpoint import CheckpointError

# ---- bench ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["decode", "protocol"])
def test_help_shows_the_form_of_a_prompt_whole(call, command):
    """The help is rendered with markup, which takes a word in brackets for a style and drops it."""
    _, out, _ = call("bench", command, "--help")
    assert '"turns": [...]}' in " ".join(re.sub("[^\\w\\s.:\"{}\\[\\]]", " ", out).split())


@pytest.mark.parametrize("concurrency", [1, 4])
def test_bench_decode(call, models, tmp_path, concurrency):
    out_file = tmp_path / "out.json"
    code, out, err = call("bench", "decode", "--model", models["model"], "--drafter", models["draft"], "--prompts",
                          prompts_file(tmp_path, "alpha", "beta"), "--max-tokens", 7, "--concurrency", concurrency,
                          "--json", out_file)
    assert code == 0 and err == "" and "alpha" in out and "identical" in out
    found = json.loads(out_file.read_text())
    for part in (found, found["tasks"]["alpha"], found["tasks"]["beta"]):
        assert part["identical_to_baseline"] is True and part["different_requests"] == 0
        assert part["acceptance_length"] >= 1 and part["tokens_per_s"] > 0 and part["baseline_tokens_per_s"] > 0
        assert part["speedup"] == pytest.approx(part["tokens_per_s"] / part["baseline_tokens_per_s"], rel=0.05)
    assert found["requests"] == 6 and found["tokens"] == sum(t["tokens"] for t in found["tasks"].values())
    assert found["concurrency"] == concurrency and found["kind"] == "decode" and found["differences"] == []
    for key in ("cpu", "threads", "isa", "versions", "commit", "model", "drafter", "prompts", "limit"):
        assert key in found
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == []


@pytest.mark.parametrize("kind", ["decode", "protocol"])
def test_a_task_may_be_called_anything(call, models, tmp_path, kind):
    code, out, err = call("bench", kind, "--model", models["model"], "--drafter", models["draft"], "--max-tokens", 3,
                          "--prompts", prompts_file(tmp_path, "a [/b] [red]"), "--concurrency", 1, "--block-size", 4,
                          *(["--journal", tmp_path / "journal.jsonl"] if kind == "protocol" else []))
    assert code == 0 and "a [/b] [red]" in out, err


def test_bench_decode_by_temperature(call, models, tmp_path):
    out_file = tmp_path / "out.json"
    arguments = ["bench", "decode", "--model", models["model"], "--drafter", models["draft"], "--prompts",
                 prompts_file(tmp_path, "alpha"), "--max-tokens", 7, "--concurrency", 2, "--json", out_file]
    code, out, err = call(*arguments, "--temperature", 0, "--temperature", 0.5, "--temperature", 1.25, "--seed", 3)
    found = json.loads(out_file.read_text())
    assert code == 0 and err == "" and found["kind"] == "decode by temperature" and "1.25 alpha" in out
    assert "acceptance" in out and "identical" in out
    assert [t["temperature"] for t in found["temperatures"]] == [0, 0.5, 1.25]
    assert (found["seed"], found["top_p"], found["sample_from"], found["rule"]) == (3, 1.0, "greedy", "token")
    for part in found["temperatures"]:
        assert part["identical_to_baseline"] is True and part["acceptance_length"] >= 1 and part["tasks"]["alpha"]
    code, _, err = call(*arguments, "--temperature", 0.5, "--sample-from", "request")
    found = json.loads(out_file.read_text())
    assert code == 0 and "follow the distribution" in err and (found["kind"], found["temperature"]) == ("decode", 0.5)


def test_bench_decode_by_instruction_set(call, models, tmp_path):
    """Every set and concurrency in one file: figures, and what the choice of widths expected of its steps."""
    out_file = tmp_path / "out.json"
    arguments = ["bench", "decode", "--model", models["model"], "--drafter", models["draft"], "--prompts",
                 prompts_file(tmp_path, "alpha"), "--max-tokens", 9, "--json", out_file]
    code, out, err = call(*arguments, "--isa", "generic", "--concurrency", 1, "--concurrency", 3)
    found = json.loads(out_file.read_text())
    assert code == 0 and err == "" and found["kind"] == "decode by instruction set" and "generic" in out
    assert [(c["isa"], c["concurrency"]) for c in found["cells"]] == [("generic", 1), ("generic", 3)]
    for cell in found["cells"]:
        assert cell["identical_to_baseline"] is True and cell["tasks"]["alpha"]["speedup"] > 0
        assert all(1 <= tokens <= 3 * 8 for tokens in cell["forecast"]["tokens_per_step"])
        assert all(ms > 0 for ms in cell["forecast"]["ms_per_step"])
    assert "forecast" in found["cells"][0]["tasks"]["alpha"]
    code, _, _ = call(*arguments, "--isa", "generic", "--concurrency", 1, "--block-size", 3)
    assert code == 0 and "forecast" not in json.loads(out_file.read_text())["cells"][0]
    code, _, err = call(*arguments, "--isa", "avx3")
    assert code == 2 and "--isa must be one of generic" in " ".join(err.split()), err


def test_bench_reports_differences(models, monkeypatch):
    loaded = session.Session.load(models["model"], models["draft"])
    whole = session.Session.run

    def planted(self, *args, speculative=True, **options):
        found = whole(self, *args, speculative=speculative, **options)
        if speculative:
            found.answers[1].tokens.pop()
        return found

    monkeypatch.setattr(session.Session, "run", planted)
    rows = [bench.Prompt("t", f"t/{i}", ("x",)) for i in range(2)]
    found = bench.bench_decode(loaded, rows, concurrency=2, max_tokens=5)
    assert found["identical_to_baseline"] is False and found["different_requests"] == 1
    assert [d["id"] for d in found["differences"]] == ["t/1"] and found["differences"][0]["got"] is None


def test_each_portion_turns_the_order(models, monkeypatch):
    loaded = session.Session.load(models["model"], models["draft"])
    whole, order = session.Session.run, []

    def noted(self, ids, speculative=True, **options):
        order.append(("drafter" if speculative else "baseline", len(ids)))
        return whole(self, ids, speculative=speculative, **options)

    monkeypatch.setattr(session.Session, "run", noted)
    rows = [bench.Prompt("t", f"t/{i}", ("x",)) for i in range(2)]
    found = bench.bench_decode(loaded, rows, concurrency=1, max_tokens=5, rounds=2)
    assert order == [("baseline", 2), ("drafter", 2), ("drafter", 2), ("baseline", 2)]
    assert found["requests"] == 2 and found["tokens"] == 20 and found["identical_to_baseline"]
    order.clear()
    monkeypatch.setattr(bench, "PORTION", 2)
    rows = [bench.Prompt("t", f"t/{i}", ("x" * (i + 1),)) for i in range(5)]
    found = bench.bench_decode(loaded, rows, concurrency=1, max_tokens=5)
    assert order == [("baseline", 2), ("drafter", 2), ("drafter", 3), ("baseline", 3)]
    assert found["requests"] == 5 and found["tokens"] == 25 and found["tasks"]["t"]["requests"] == 5


def test_bench_limit(tmp_path):
    file = prompts_file(tmp_path, "a", "b")
    assert [p.id for p in bench.read_prompts(file, 4)] == ["a/0", "a/1", "a/2", "b/0"]
    assert bench.read_prompts(file)[0].text == "hello 0"


def test_prompts_are_read_as_json_lines_are_written(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes('\ufeff{"turns": ["one\u2028two"]}\r\n\r\n{"turns": ["three"]}'.encode())
    assert [(p.id, p.text) for p in bench.read_prompts(file)] == [("1", "one\u2028two"), ("3", "three")]
    file.write_text('{"turns": "a text, not a list of texts"}')
    with pytest.raises(CheckpointError, match="prompts.jsonl:1: expected"):
        bench.read_prompts(file)


def test_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "x.json"
    file.write_text("before")
    with pytest.raises(TypeError):
        results.write_json(file, {"a": object()})
    assert file.read_text() == "before" and [f.name for f in tmp_path.iterdir()] == ["x.json"]
    results.write_json(tmp_path / "a" / "machine" / "x.json", {"a": 1})
    assert (tmp_path / "a" / "machine" / "x.json").read_text() == '{\n "a": 1\n}\n'


# ---- what the repository measures ------------------------------------------------------------------------------------


@pytest.fixture
def scripts(monkeypatch):
    """The words of every script that was started; the last one's exit code is 3."""
    started = []

    def run(words, env):
        started.append(words[1:])
        return subprocess.CompletedProcess(words, 3)

    monkeypatch.setattr(repository, "subprocess", SimpleNamespace(run=run))
    return started


def test_bench_decode_with_peers(call, models, tmp_path, scripts):
    file, out = prompts_file(tmp_path, "a"), tmp_path / "out.json"
    words = ("bench", "decode", "--model", models["model"], "--drafter", models["draft"], "--prompts", file, "--peers",
             "dflash,vllm", "--max-tokens", 5, "--limit", 2, "--concurrency", 32)
    assert call(*words, "--json", out) == (3, "", "")
    ran, = scripts
    assert ran == ["-m", "bench.peers", "--only", "dflash,vllm", "--prompts", str(file),
                   "--model", models["model"], "--drafter", models["draft"], "--limit", "2", "--concurrency", "32",
                   "--max-tokens", "5", "--dtype", "bfloat16", "--json", str(out)]
    call(*words)
    assert scripts[1][-1] == "--no-write"


def test_the_driver_takes_what_the_command_gives_it(call, models, tmp_path, scripts, monkeypatch):
    from bench.peers import compare as driver

    call("bench", "decode", "--model", models["model"], "--drafter", models["draft"], "--prompts",
         prompts_file(tmp_path, "a"), "--peers", "all", "--threads", 1, "--block-size", 2)
    monkeypatch.setattr(sys, "argv", scripts[0][1:])
    taken = driver.parsed()
    assert (taken.only[0], taken.concurrency, taken.threads, taken.block_size, taken.json) == ("ours", [1], 1, 2, None)


@pytest.mark.parametrize("more", [("--temperature", 0.5), ("--dtype", "float16")])
def test_peers_are_compared_greedily_in_bfloat16(call, models, tmp_path, scripts, more):
    code, _, err = call("bench", "decode", "--model", models["model"], "--drafter", models["draft"], "--prompts",
                        prompts_file(tmp_path, "a"), "--peers", "all", *more)
    assert code == 2 and "greedy, in bfloat16 or float32" in err and one_line(err) and scripts == []


def test_bench_ops(call, tmp_path, scripts):
    out = tmp_path / "out.json"
    assert call("bench", "ops", "linear", "small", "--tiny", "--runs", 3, "--threads", 1, "--json", out)[0] == 3
    assert scripts == [["-m", "bench.ops", "linear", "small", "--runs", "3", "--device", "cpu",
                        "--tiny", "--threads", "1", "--json", str(out)]]


@pytest.mark.parametrize("words, script", [(("ops",), "bench/ops"),
                                           (("decode", "--prompts", "FILE", "--peers", "all"), "bench/peers")])
def test_without_the_repository_it_says_what_is_missing(call, tmp_path, monkeypatch, words, script):
    monkeypatch.setattr(repository, "ROOT", tmp_path)
    file = prompts_file(tmp_path, "a")
    code, _, err = call("bench", *(file if word == "FILE" else word for word in words))
    assert code == 2 and "needs the source repository" in err and script in err and one_line(err)


def test_bench_ops_of_tiny_shapes(tmp_path):
    out = tmp_path / "out.json"
    words = ["-m", "dflash_decode.cli", "bench", "ops", "small", "--tiny", "--runs", "1", "--json", str(out)]
    done = subprocess.run([sys.executable, *words], env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert {row["op"] for row in found["rows"]} == {"combine_argmax", "combine_topk", "sample_draft",
                                                    "select_candidates"}
    assert {"copy_gbps", "read_gbps", "matrix_tflops", "threads", "commit"} <= set(found["header"])
    assert all({"us", "p20", "p80", "gbps", "pct_of_limit", "tflops", "peers"} <= set(row) for row in found["rows"])
