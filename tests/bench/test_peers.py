"""bench/peers: what is summed up and said, with peers that are made up."""

import argparse
import json
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.peers import job
from tests.support import tiny

pytest.importorskip("rich")

from bench.peers import compare as driver
from bench.peers import export, peer, sums
from dflash_decode.checkpoint import load_checkpoint
from dflash_decode.checkpoint.tokenizer import load_tokenizer

PEERS = Path(job.__file__).parent


def reply(seconds, *tokens, steps=(), accepted=()):
    return job.Reply(seconds, [*map(len, tokens)], [*tokens], [*steps], [*accepted])


def key(peer, mode, task="t", threads=2, concurrency=1):
    return sums.Key(peer, mode, threads, concurrency, task)


def test_accepted_drafts():
    assert job.accepted_drafts([1, 3, 8, 2], 8) == [3, 2, 1, 1, 1, 1, 1]
    assert job.accepted_drafts([], 4) == [0, 0, 0]


def test_a_row_is_the_median_of_its_rounds():
    found = sums.Rows()
    for seconds, prompt_seconds in ((2.0, 0.5), (8.0, 2.0), (4.0, 1.0)):
        found.add(key("vllm", "dflash"), reply(seconds, [1, 2, 3, 4], [5, 6], steps=[1, 1], accepted=[2, 1]),
                  prompt_seconds)
    row, = found.rows()
    assert (row["rounds"], row["prompts"], row["tokens"], row["steps"]) == (3, 2, 6, 2)
    assert (row["tokens_per_s"], row["slowest"], row["fastest"]) == (1.5, 0.75, 3.0)
    assert row["acceptance_length"] == 2.0 and row["by_position"] == [1.0, 0.5]  # 4 tokens in 2 steps, first ones apart
    assert row["decode_tokens_per_s"] == round(4 / 3, 2) and row["ms_per_step"] == 1500.0
    assert row["same_as_our_baseline"] is None and row["same_in_every_round"]


def test_a_row_of_baseline_decoding_of_a_peer_without_tokens():
    found = sums.Rows()
    found.add(key("ours", "baseline"), reply(1.0, [1]), 1.0)
    found.add(key("llama", "baseline"), job.Reply(1.0, [1]), 1.0)
    ours, llama = found.rows()
    assert llama["acceptance_length"] == 1.0 and llama["by_position"] == [] and llama["decode_tokens_per_s"] is None
    assert ours["same_as_our_baseline"] == 1 and llama["same_as_our_baseline"] is None


def test_a_text_that_changes_between_rounds_is_told():
    found = sums.Rows()
    for token in (1, 2):
        found.add(key("vllm", "baseline"), reply(1.0, [token]), 0.0)
    assert found.rows()[0]["same_in_every_round"] is False


def test_rows_of_tasks_of_all_and_of_many_at_once():
    found = sums.Rows()
    for who, mode, task, tokens, steps, accepted in (
            ("ours", "baseline", "a", [1, 2], [], []), ("vllm", "dflash", "a", [1, 2], [1], [0, 0]),
            ("vllm", "dflash", "b", [3, 9, 9], [1], [1]), ("ours", "baseline", "b", [3, 4, 5], [], []),
            ("llama", "baseline", "b", [3, 4, 5], [], [])):
        found.add(key(who, mode, task), reply(1.0, tokens, steps=steps, accepted=accepted), 0.0)
    found.add(key("vllm", "dflash", "all", concurrency=32), reply(1.0, [1, 2], steps=[1]), 0.0)
    found.add(key("ours", "baseline", "all", concurrency=32), reply(1.0, [7, 2]), 0.0)
    rows = found.rows()
    assert [(r["task"], r["peer"], r["concurrency"]) for r in rows] == [
        ("a", "ours", 1), ("a", "vllm", 1), ("b", "ours", 1), ("b", "vllm", 1), ("b", "llama", 1), ("all", "ours", 1),
        ("all", "vllm", 1), ("all", "vllm", 32), ("all", "ours", 32)]
    assert [r["same_as_our_baseline"] for r in rows] == [1, 1, 1, 0, 1, 2, 1, 0, 1]
    whole = rows[6]
    assert (whole["tokens"], whole["tokens_per_s"], whole["steps"], whole["prompts"]) == (5, 2.5, 2, 2)
    assert whole["by_position"] == [0.5, 0.0] and whole["acceptance_length"] == 1.5
    assert rows[-1]["ms_per_step"] is None


def test_acceptance_where_the_text_is_the_same():
    ours = reply(1.0, [1, 2, 3, 4, 5], [6, 7, 8], [9], steps=[2, 2, 0])
    theirs = reply(1.0, [1, 2, 3, 4, 5], [6, 7, 7, 7, 7, 7], [9], steps=[4, 1, 0])
    assert sums.where_same(theirs, ours) == {"prompts": 1, "acceptance_length": 1.0, "ours": 2.0}
    assert sums.where_same(reply(1.0, [1], [2], [3], steps=[1, 1, 1]), ours) == {"prompts": 0}
    without = job.Reply(1.0, [5, 3, 1], steps=[2, 2, 0])  # no tokens; then no steps of each prompt
    together = reply(1.0, [1], [2], [3], steps=[9])
    assert sums.where_same(without, ours) is None and sums.where_same(together, ours) is None
    found = sums.Rows()
    for who, answered in (("ours", ours), ("dflash", theirs)):
        found.add(key(who, "dflash"), answered, 0.0)
    assert [r["same_text"]["prompts"] for r in found.rows()] == [2, 1]


def test_turns():
    threads = [(t.peer.name, t.mode, t.threads) for t in peer.turns(["ours", "llama"], 2, True)]
    assert threads == [
        ("ours", "baseline", 2),
        ("ours", "dflash", 2),
        ("llama", "baseline", 1),
        ("llama", "baseline", 2),
        ("llama", "dflash", 2),
    ]
    assert [str(t) for t in peer.turns(["dflash", "transformers"], 2, False)] == ["transformers, baseline, 2 threads"]
    assert len(peer.turns(["llama"], 1, False)) == 1


def test_the_callers_environment_goes_first(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("PYTHONPATH", "x")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.delenv("KMP_BLOCKTIME", raising=False)
    made = {t.peer.name: peer.environment(t) for t in peer.turns(["ours", "vllm"], 2, False)}
    assert made["vllm"]["VLLM_LOGGING_LEVEL"] == "DEBUG" and "PYTHONPATH" not in made["vllm"]
    assert made["ours"]["PYTHONPATH"] == "x" and "KMP_BLOCKTIME" not in made["ours"]
    assert all(e["OMP_NUM_THREADS"] == "2" for e in made.values())


@pytest.mark.parametrize("text, line", [
    ("Traceback\n  File\nImportError: no x\nException ignored in: <y>\n", "ImportError: no x"),
    ("one\n\nlast\n\n", "last"), ("", ""), ("Collecting\nERROR: No matching distribution\nhint\n",
                                            "ERROR: No matching distribution")])
def test_the_reason_in_a_log(tmp_path, text, line):
    log = tmp_path / "log"
    log.write_text(text)
    assert peer.last_line(log) == line and peer.last_line(tmp_path / "none") == ""


def test_vllm_counters(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=object, SamplingParams=object))
    monkeypatch.delitem(sys.modules, "peer_vllm", raising=False)
    from bench.peers import peer_vllm

    metrics = [SimpleNamespace(name="vllm:other", value=3), SimpleNamespace(name=peer_vllm.DRAFTS, value=5),
               SimpleNamespace(name=peer_vllm.ACCEPTED, values=[4, 2, 0])]
    assert peer_vllm.drafted(SimpleNamespace(get_metrics=lambda: metrics)) == (5, [4, 2, 0])
    assert peer_vllm.drafted(SimpleNamespace(get_metrics=lambda: metrics[:1])) == (0, [])


def test_export(tmp_path):
    source = tiny.write_target(tmp_path / "source")
    made = export.export(str(source), tmp_path / "made")
    before, after = load_checkpoint(source), load_checkpoint(made)
    assert before.config == after.config and before.tensors.keys() == after.tensors.keys()
    assert all((before.tensors[n] == t).all() for n, t in after.tensors.items())
    assert load_tokenizer(made).chat_template == tiny.TEMPLATE
    assert load_tokenizer(made).encode("<u>hi<a>") == load_tokenizer(source).encode("<u>hi<a>")
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == []


FAKE = """
from bench.peers.job import Reply, serve

def load(job):
    if job.mode == "dflash":
        raise ValueError("cannot draft")
    asked = []
    def answering(question):
        asked.append(question)
        if job.threads == 2 and len(asked) == 6 or job.threads == 3 and question.watched:
            raise OSError("no more")
        if question.watched:
            for i in range(3):
                forward()
        return Reply(0.5, [len(p[:question.max_tokens]) for p in question.prompts],
                     [p[:question.max_tokens] for p in question.prompts])
    return answering, {"fake": "1"}, watch

def forward():
    pass

def watch(passes):
    global forward
    forward = passes.part("verify", forward, opens=True)

serve(load)
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """run(more options): the driver's result with a peer `ours` that is made up, two tasks of two prompts each."""
    model, draft = tiny.write_target(tmp_path / "model"), tiny.write_drafter(tmp_path / "draft")
    here = tmp_path / "bench" / "peers"
    here.mkdir(parents=True)
    for name in ("job.py", "passes.py"):
        shutil.copy(PEERS / name, here)
    (here / "peer_ours.py").write_text(FAKE)
    monkeypatch.setattr(peer, "ROOT", tmp_path)
    monkeypatch.setattr(peer, "ENVIRONMENTS", tmp_path / "environments")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"task": t, "turns": [f"{t} {i}"]}) + "\n" for t in "ab" for i in range(2)))

    def run(**more):
        options = {"prompts": [prompts], "drafter": str(draft), "model": str(model), "limit": None, "max_tokens": 5,
                   "block_size": None, "threads": 1, "only": ["ours", "vllm", "llama"], "timeout": 60,
                   "concurrency": [1, 3], "rounds": 2, "dtype": "bfloat16", "json": tmp_path / "out.json"}
        return driver.measure(argparse.Namespace(**options | more))

    return run


def test_a_run(fakes, tmp_path, capsys):
    result = fakes()
    driver.show(result)
    out = capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(json.dumps(result))
    assert [
        (r["peer"], r["mode"], r["task"], r["concurrency"], r["prompts"], r["tokens"], r["rounds"])
        for r in result["rows"]
    ] == [
        ("ours", "baseline", "a", 1, 2, 10, 2),
        ("ours", "baseline", "b", 1, 2, 10, 2),
        ("ours", "baseline", "all", 1, 4, 20, 2),
        ("ours", "baseline", "all", 3, 3, 15, 2),
    ]
    assert result["header"]["command"] == "python -m bench.peers --prompts prompts.jsonl --model model " \
        "--drafter draft --max-tokens 5 --concurrency 1 3 --rounds 2 --threads 1 --only ours,vllm,llama"
    assert result["header"]["block_size"] == 4 and result["header"]["versions"] == {"ours": {"fake": "1"}}
    parts, = result["parts"]
    assert [parts[name] for name in ("peer", "mode", "threads", "prompts", "steps")] == ["ours", "baseline", 1, 2, 2]
    assert parts["draft_ms"] is None and 0 <= parts["verify_ms"] <= parts["step_ms"] and "verify, ms" in out
    why = result["missing"]
    assert set(why) == {"ours, dflash, 1 thread", "vllm, baseline, 1 thread", "vllm, dflash, 1 thread",
                        "llama, baseline, 1 thread", "llama, dflash, 1 thread"}
    assert why["ours, dflash, 1 thread"].startswith("ValueError: cannot draft")
    assert why["vllm, baseline, 1 thread"].startswith("not installed") and "gguf" in why["llama, baseline, 1 thread"]


def test_a_peer_that_breaks_on_the_way_keeps_its_rounds(fakes, capsys):
    result = fakes(threads=2, only=["ours"], drafter=None, concurrency=[1])
    # A warm-up, then a question for the prompts' passes and one for the answers in each round of each task.
    assert [(r["task"], r["rounds"]) for r in result["rows"]] == [("a", 1), ("b", 1), ("all", 1)]
    assert result["missing"]["ours, baseline, 2 threads"].startswith(
        "OSError: no more; see build/peers/last-ours-baseline-2"
    )


def test_a_peer_that_breaks_when_it_is_watched_keeps_its_rows(fakes, capsys):
    result = fakes(threads=3, only=["ours"], drafter=None, concurrency=[1], rounds=1)
    assert [(r["task"], r["rounds"]) for r in result["rows"]] == [("a", 1), ("b", 1), ("all", 1)]
    assert result["parts"] == [] and result["missing"]["ours, baseline, 3 threads"].startswith("OSError: no more")


def test_many_concurrent_have_no_parts(fakes, capsys):
    result = fakes(only=["ours"], drafter=None, concurrency=[2], rounds=1)
    driver.show(result)
    assert result["rows"] and result["parts"] == []


def test_a_peer_without_the_dtype_is_missing(fakes, capsys):
    result = fakes(dtype="float32", only=["ours", "llama"], drafter=None, rounds=1)
    assert result["header"]["dtype"] == "float32" and result["header"]["command"].endswith("--dtype float32")
    assert result["missing"] == {"llama, baseline, 1 thread": "it does not run in float32"} and result["rows"]


def test_peers_take_turns(fakes, monkeypatch, capsys):
    monkeypatch.setattr(peer, "PEERS", (peer.Peer("ours", "model", modes=("baseline",), batches=True),
                                        peer.Peer("other", "model", modes=("baseline",))))
    here = peer.ROOT / "bench" / "peers"
    shutil.copy(here / "peer_ours.py", here / "peer_other.py")
    fakes(only=["ours", "other"], concurrency=[1, 2])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("round")]
    who = [("o" if ": other" in line else "u") + line.split(", ")[1] for line in lines]
    assert who == ["ua", "oa", "ob", "ub", "uall", "oa", "ua", "ub", "ob", "uall"]


@pytest.mark.parametrize("text, names", [("vllm", ["ours", "vllm"]), ("all", [p.name for p in peer.PEERS]),
                                         ("llama,dflash", ["ours", "dflash", "llama"])])
def test_the_command_line_of_the_driver(monkeypatch, tmp_path, text, names):
    monkeypatch.setattr(sys, "argv", ["run.py", "--prompts", "x", "--only", text, "--json", str(tmp_path / "o")])
    assert driver.parsed().only == names


def test_a_recorded_command_asks_for_the_same_again(monkeypatch, tmp_path):
    given = ["--prompts", "x", "y", "--model", "m", "--drafter", str(tmp_path), "--limit", "3", "--max-tokens", "9",
             "--concurrency", "1", "4", "--rounds", "2", "--block-size", "6", "--threads", "5", "--only", "vllm",
             "--dtype", "float32"]
    monkeypatch.delenv("DFLASH_ISA", raising=False)
    monkeypatch.setattr(sys, "argv", ["peers", *given, "--no-write"])
    asked = vars(driver.parsed())
    again = shlex.split(driver.command(argparse.Namespace(**asked)))
    assert again[:3] == ["python", "-m", "bench.peers"]
    monkeypatch.setattr(sys, "argv", ["peers", *again[3:], "--no-write"])
    assert vars(driver.parsed()) == asked | {"drafter": tmp_path.name}  # without this machine's folders


def test_an_unknown_peer_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "--prompts", "x", "--only", "tgi"])
    with pytest.raises(SystemExit):
        driver.parsed()
    assert "must be of ours,ours8,oursfile,dflash,transformers,vllm,llama,llama8; got tgi" in capsys.readouterr().err
