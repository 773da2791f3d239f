"""bench/peers: what is summed up and said, with peers that are made up."""

import argparse
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import job
import pytest
import tiny

pytest.importorskip("rich")

import export
import run as driver
import sums

from dflash_decode.tokenizer import load_tokenizer
from dflash_decode.weights import load_checkpoint

PEERS = Path(job.__file__).parent


def reply(*answers, prompt_seconds=0.5):
    return {"versions": {}, "prompt_seconds": prompt_seconds,
            "answers": [{"tokens": t, "seconds": s, "steps": n, "accepted": a} for t, s, n, a in answers]}


def test_accepted_drafts():
    assert job.accepted_drafts([1, 3, 8, 2], 8) == [3, 2, 1, 1, 1, 1, 1]
    assert job.accepted_drafts([], 4) == [0, 0, 0]


def test_a_row():
    found = sums.Sums.of("vllm", "dflash", 2, "t", reply(([1, 2, 3, 4], 1.0, 2, [1, 0]), ([5, 6], 1.0, 2, [2, 1])))
    row = found.row()
    assert (row["prompts"], row["tokens"], row["seconds"], row["tokens_per_s"]) == (2, 6, 2.0, 3.0)
    assert row["acceptance_length"] == 2.0 and row["by_position"] == [0.75, 0.25] and row["steps"] == 4
    assert row["decode_tokens_per_s"] == round(4 / 1.5, 2) and row["same_as_our_plain"] is None


def test_a_row_of_plain_decoding():
    row = sums.Sums.of("llama", "plain", 1, "t", reply(([1], 1.0, 0, []), prompt_seconds=1.0)).row()
    assert row["acceptance_length"] == 1.0 and row["by_position"] == [] and row["decode_tokens_per_s"] is None


def test_rows_of_tasks_and_of_all():
    def one(peer, mode, task, tokens, steps=0, accepted=()):
        return sums.Sums.of(peer, mode, 2, task, reply((tokens, 1.0, steps, list(accepted))))

    found = [one("ours", "plain", "a", [1, 2]), one("vllm", "dflash", "a", [1, 2], 2, [1, 1]),
             one("vllm", "dflash", "b", [3, 9], 1, []), one("ours", "plain", "b", [3, 4]),
             one("llama", "plain", "b", [3, 4])]
    rows = sums.rows(found)
    assert [(r["task"], r["peer"]) for r in rows] == [
        ("a", "ours"), ("a", "vllm"), ("b", "ours"), ("b", "vllm"), ("b", "llama"), ("all", "ours"), ("all", "vllm")]
    assert [r["same_as_our_plain"] for r in rows] == [1, 1, 1, 0, 1, 2, 1]
    whole = rows[-1]
    assert whole["tokens"] == 4 and whole["seconds"] == 2.0 and whole["steps"] == 3
    assert whole["by_position"] == [0.3333, 0.3333] and whole["acceptance_length"] == 1.6667


def test_turns():
    threads = [(t.peer.name, t.mode, t.threads) for t in driver.turns(["ours", "llama"], 2, True)]
    assert threads == [("ours", "plain", 2), ("ours", "dflash", 2), ("llama", "plain", 1), ("llama", "plain", 2)]
    assert [t.mode for t in driver.turns(["ours", "dflash"], 2, False)] == ["plain", "plain"]
    assert len(driver.turns(["llama"], 1, True)) == 1


def test_the_callers_environment_goes_first(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("PYTHONPATH", "x")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.delenv("KMP_BLOCKTIME", raising=False)
    made = {t.peer.name: driver.environment(t) for t in driver.turns(["ours", "vllm"], 2, False)}
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
    assert driver.last_line(log) == line and driver.last_line(tmp_path / "none") == ""


def test_vllm_counters(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=object, SamplingParams=object))
    monkeypatch.delitem(sys.modules, "peer_vllm", raising=False)
    import peer_vllm

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
from job import Answer, serve

def load(job):
    if job.mode == "dflash":
        raise ValueError("cannot draft")
    def answering(prompts, max_new_tokens):
        return [Answer(prompt[:max_new_tokens], 0.5) for prompt in prompts]
    return answering, {"fake": "1"}

serve(load)
"""


def test_a_run(tmp_path, monkeypatch, capsys):
    model, draft = tiny.write_target(tmp_path / "model"), tiny.write_drafter(tmp_path / "draft")
    here = tmp_path / "peers"
    here.mkdir()
    shutil.copy(PEERS / "job.py", here)
    (here / "peer_ours.py").write_text(FAKE)
    monkeypatch.setattr(driver, "HERE", here)
    monkeypatch.setattr(driver, "ENVIRONMENTS", tmp_path / "environments")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"task": t, "turns": [f"{t} {i}"]}) + "\n" for t in "ab" for i in range(2)))
    out = tmp_path / "out.json"
    options = argparse.Namespace(prompts=[prompts], draft=str(draft), model=str(model), limit=None, max_new_tokens=5,
                                 block_size=None, threads=1, only=["ours", "vllm", "llama"], timeout=60, json=out)
    result = driver.measure(options)
    driver.show(result)
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    assert [(r["peer"], r["mode"], r["task"], r["tokens"]) for r in result["rows"]] == [
        ("ours", "plain", "a", 10), ("ours", "plain", "b", 10), ("ours", "plain", "all", 20)]
    assert result["header"]["command"] == "python bench/peers/run.py --prompts prompts.jsonl --draft draft " \
        "--max-new-tokens 5 --threads 1"
    assert result["header"]["block_size"] == 4 and result["header"]["versions"] == {"ours": {"fake": "1"}}
    why = result["missing"]
    assert set(why) == {"ours, dflash, 1 thread", "vllm, plain, 1 thread", "vllm, dflash, 1 thread",
                        "llama, plain, 1 thread"}
    assert why["ours, dflash, 1 thread"].startswith("ValueError: cannot draft")
    assert why["vllm, plain, 1 thread"].startswith("not installed") and "gguf" in why["llama, plain, 1 thread"]
    assert "cannot draft" in capsys.readouterr().out
