"""The model cards' protocol: our loop, the journal, the command, the bar."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.chat_server import VLLM, FakeChat
from tests.support.cli_calls import heed_interrupts

pytest.importorskip("typer")

from rich.console import Console

from dflash_bench import protocol, protocol_report
from dflash_bench.answerers import OurLoop
from dflash_bench.decode import Prompt
from dflash_decode.checkpoint import CheckpointError
from dflash_decode.cli import app as cli
from dflash_decode.cli import report
from dflash_decode.session import Session
from tests.support.protocol_runs import ONE, TWO, measured


@pytest.fixture(scope="module")
def loaded(models):
    return Session.load(models["model"], models["draft"], dtype="float32")


# ---- our loop ------------------------------------------------------------------------------------------------------


def test_our_loop_takes_every_turn_in_turn(loaded, tmp_path):
    rows = measured(OurLoop(loaded, 6), ONE + TWO, [1, 2, 32], tmp_path / "j")
    assert [(r["concurrency"], r["task"], r["prompts"], r["turns"]) for r in rows] == [
        (c, task, n, turns) for c in (1, 2, 32) for task, n, turns in (("gsm8k", 4, 4), ("mt_bench", 3, 6))]
    lines = [json.loads(line) for line in (tmp_path / "j").read_text().splitlines()[1:]]
    answers = {(r["concurrency"], r["id"]): [(t["tokens"], t["prompt_tokens"], t["steps"]) for t in r["turns"]]
               for r in lines}
    # Greedy: the same answers, and steps, whoever else is decoded.
    assert all(answers[2, i] == answers[32, i] == answers[1, i] for _, i in answers)
    assert rows[0]["tokens"] == sum(t[0] for i in range(4) for t in answers[1, f"g{i}"])
    steps = [n for i in range(4) for t in answers[1, f"g{i}"] for n in t[2]]
    assert rows[0]["acceptance_length"] == pytest.approx(sum(steps) / len(steps), abs=1e-4)
    assert rows[0]["acceptance_from"] == "steps" and sum(rows[0]["acceptance_histogram"]) == len(steps)


def test_the_answer_is_in_the_history_of_our_loop(loaded, tmp_path, monkeypatch):
    asked = []
    template = loaded.tokenizer.apply_chat_template
    monkeypatch.setattr(loaded.tokenizer, "apply_chat_template", lambda m, **_: asked.append([*m]) or template(m))
    measured(OurLoop(loaded, 6), TWO[:1], [1], tmp_path / "j")
    first, second = asked[-2:]
    assert first == [{"role": "user", "content": "first 0"}]
    run = loaded.run([loaded.prompt_ids("first 0")], max_tokens=6)
    said = loaded.tokenizer.decode(run.answers[0].tokens)
    assert second == [*first, {"role": "assistant", "content": said}, {"role": "user", "content": "second 0"}]


def test_a_conversation_that_fills_the_context_ends(loaded, tmp_path):
    long = Prompt("mt_bench", "m", ("x" * 60, "y" * 120, "z"))
    row, = measured(OurLoop(loaded, 40), [long], [1], tmp_path / "j")
    assert row["prompts"] == 1 and row["turns"] == 1
    with pytest.raises(ValueError, match="g: the prompt must be shorter than the model's context of 128"):
        measured(OurLoop(loaded, 4), [Prompt("t", "g", ("x" * 200,))], [1], tmp_path / "k")


def test_several_turns_need_a_template(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(loaded.tokenizer, "chat_template", None)
    with pytest.raises(CheckpointError, match="expected a chat template"):
        measured(OurLoop(loaded, 4), TWO, [1], tmp_path / "j")
    assert measured(OurLoop(loaded, 4), ONE, [2], tmp_path / "k")[0]["prompts"] == 4


# ---- the journal ---------------------------------------------------------------------------------------------------


class Scripted:
    """Answers at one second a prompt, by a clock that it moves; breaks off before the prompt `until`."""

    def __init__(self, monkeypatch, until=None):
        self.about, self.now, self.until = {"who": "me"}, 0.0, until
        monkeypatch.setattr(protocol, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def counters(self):
        return None

    def answer(self, prompts, concurrency):
        for prompt in prompts:
            self.now += 0.75
            yield 3, None
            if prompt.id == self.until:
                raise KeyboardInterrupt
            self.now += 0.25
            yield 7, protocol.Answered(prompt, (protocol.Turn(10, 1.0, "stop", 5, (4, 6)),))


def test_a_resumed_measurement(tmp_path, monkeypatch):
    file = tmp_path / "j"
    with pytest.raises(KeyboardInterrupt):
        measured(Scripted(monkeypatch, until="g2"), ONE, [1], file)
    assert len(file.read_text().splitlines()) == 3
    with file.open("a") as out:
        out.write('{"task": "gsm8k", "concurr')  # killed while it wrote
    row, = measured(Scripted(monkeypatch), ONE, [1], file)
    # two prompts in two seconds, and again; the tokens of the third that came before it was broken off do not count,
    # as their time does not
    assert (row["prompts"], row["runs"], row["tokens"], row["seconds"], row["tokens_per_s"]) == (4, 2, 40, 4.0, 10.0)
    assert row["acceptance_length"] == 5.0 and row["cut_at_the_limit"] == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    assert [(r["id"], r["run"], r["at"], r["so_far"]) for r in lines] == [
        ("g0", 1, 1.0, 10), ("g1", 1, 2.0, 20), ("g2", 2, 1.0, 10), ("g3", 2, 2.0, 20)]
    again = Scripted(monkeypatch)
    measured(again, ONE, [1], file)
    assert again.now == 0.0  # nothing was left to do


def test_a_journal_of_something_else(tmp_path):
    file = tmp_path / "j"
    protocol.Journal(file, {"model": "a", "limit": 3})
    with pytest.raises(CheckpointError, match="model 'a' there, 'b' here"):
        protocol.Journal(file, {"model": "b", "limit": 3})
    for text in ("hello\n", "[1]\n", '{"about": {}}\n{"x": 1}\n', '{"about": {}}\n\xff\n'):
        file.write_text(text, encoding="latin-1")
        with pytest.raises(CheckpointError, match=r"j:\d: expected a journal"):
            protocol.Journal(file, {})
        assert file.read_text(encoding="latin-1") == text
    file.write_text('{"about": {"limi')
    assert protocol.Journal(file, {"limit": 1}).lines == [] and json.loads(file.read_text()) == {"about": {"limit": 1}}


def test_an_id_that_comes_twice():
    with pytest.raises(CheckpointError, match="'g1' twice"):
        protocol.by_task([*ONE, ONE[1]])


def test_tasks_stand_as_on_the_card():
    rows = [Prompt(t, "1", ("x",)) for t in ("other", "mt_bench", "humaneval", "math500", "gsm8k")]
    assert [*protocol.by_task(rows)] == ["math500", "gsm8k", "humaneval", "mt_bench", "other"]


# ---- the command ---------------------------------------------------------------------------------------------------


def prompts_file(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"task": p.task, "id": p.id, "turns": p.turns}) + "\n" for p in ONE + TWO))
    return file


def test_the_command_with_our_loop(models, tmp_path, capfd):
    out = tmp_path / "out.json"
    words = ["bench", "protocol", "--prompts", prompts_file(tmp_path), "--model", models["model"], "--drafter",
             models["draft"], "--block-size", 4, "--max-tokens", 5, "--concurrency", 1, "--concurrency", 3,
             "--journal", tmp_path / "j", "--json", out]
    assert cli.run([str(w) for w in words]) == 0
    shown, err = capfd.readouterr()
    assert "Throughput, tokens/s" in shown and "Acceptance length" in shown and "Math500" in shown
    assert "331.1" in shown and "3.561" in shown and "MT-Bench, 3 concurrent: 3 prompts" in err and "\x1b" not in shown
    found = json.loads(out.read_text())
    assert found["kind"] == "protocol" and len(found["rows"]) == 4 and found["max_tokens"] == 5
    assert [found[name] for name in ("model", "drafter")] == [Path(models[name]).name for name in ("model", "draft")]
    assert found["prompts"] == ["prompts.jsonl"] and found["block_size"] == 4 and "cpu" in found
    assert cli.run([str(w) for w in words]) == 0
    assert "14 of 14 prompts are in" in capfd.readouterr().err
    assert cli.run([str(w) for w in [*words, "--limit", 2]]) == 1
    assert "limit None there, 2 here" in capfd.readouterr().err


def test_the_command_with_a_server(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with FakeChat(VLLM) as fake:
        words = ["bench", "protocol", "--prompts", prompts_file(tmp_path), "--base-url", fake.url, "--journal",
                 tmp_path / "j", "--extra-body", '{"chat_template_kwargs": {"enable_thinking": true}}']
        assert cli.run([str(w) for w in words]) == 0
    shown, err = capfd.readouterr()
    assert shown.count("4.000") == 4 and "the server's own: vllm counters" in err
    assert fake.seen[-1]["chat_template_kwargs"] == {"enable_thinking": True}
    assert fake.seen[-1]["max_tokens"] == 4096 and fake.seen[-1]["authorization"] is None


@pytest.mark.parametrize("words, message", [
    (["--extra-body", "[1]", "--base-url", "http://x"], "--extra-body must be a JSON object"),
    (["--extra-body", "{}x"], "--extra-body must be a JSON object"),
    (["--extra-body", '{"a": 1}'], "--extra-body needs --base-url"),
    (["--base-url", "http://x", "--drafter", "none"], "--drafter is for our loop"),
    (["--base-url", "http://x", "--block-size", "8"], "--block-size is for our loop"),
    (["--base-url", "http://x", "--drafter-weights", "auto"], "--drafter-weights is for our loop"),
    (["--journal", "/no/such/folder/j"], "--journal must be a file in a directory")])
def test_commands_written_wrongly(tmp_path, capfd, words, message):
    assert cli.run(["bench", "protocol", "--prompts", str(prompts_file(tmp_path)), *words]) == 2
    assert message in capfd.readouterr().err


def test_interrupted_and_resumed(tmp_path, capfd):
    """Once three questions were asked, no answer goes on until the process that asked is gone."""
    go = threading.Event()
    with FakeChat(VLLM, wait=lambda request: len(fake.seen) > 4 and go.wait()) as fake:  # one is the warm-up's
        words = ["bench", "protocol", "--prompts", str(prompts_file(tmp_path)), "--base-url", fake.url, "--journal",
                 str(tmp_path / "j"), "--concurrency", "2", "--max-tokens", "30"]
        first = subprocess.Popen([sys.executable, "-m", "dflash_decode.cli", *words], stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts,
                                 env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)})
        while first.poll() is None and not ((tmp_path / "j").exists() and '"id"' in (tmp_path / "j").read_text()):
            time.sleep(0.02)
        first.send_signal(signal.SIGINT)
        out, err = first.communicate()
        go.set()
        assert first.returncode == 130 and "Traceback" not in err and "the same command continues" in err
        kept = (tmp_path / "j").read_text().count('"id"')
        assert 1 <= kept <= 3
        assert cli.run(words) == 0
    out, err = capfd.readouterr()
    assert f"{kept} of 7 prompts are in" in err and "a run was interrupted" in err and "4.000" in out


def test_a_bar_with_the_time_that_is_left(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(report, "err", Console(file=shown, force_terminal=True, width=100))
    with protocol_report.Watch() as watch:
        for done in range(5):
            watch(protocol.Stage("gsm8k", 8, 4, done, 100 * done, 2.0))
            watch.progress.refresh()
        stage = protocol.Stage("mt_bench", 8, 9, 6)
        watch(stage)
        watch.progress.refresh()
    text = shown.getvalue()
    assert "GSM8K, 8 concurrent" in text and "3/4" in text and "150.0 tokens/s" in text and "0:00" in text
    assert "MT-Bench, 8 concurrent" in text and "6/9" in text


def test_the_time_that_is_left_of_long_answers(monkeypatch):
    shown, now = io.StringIO(), [0.0]
    monkeypatch.setattr(report, "err", Console(file=shown, force_terminal=True, width=100))
    with protocol_report.Watch() as watch:
        watch.progress.get_time = lambda: now[0]
        stage = protocol.Stage("gsm8k", 1, 5, 0)
        for done in range(3):
            stage.done, now[0] = done, 40.0 * done
            watch(stage)
        watch.progress.refresh()
    assert "2/5" in shown.getvalue() and "0:02:00" in shown.getvalue()


def test_fewer_prompts_than_requests_at_once_are_told():
    row = {"acceptance_from": "steps", "retries": 0, "runs": 1, "task": "gsm8k"}
    assert protocol_report.notes([row | {"of": 32, "concurrency": 32}]) == []
    assert protocol_report.notes([row | {"of": 24, "concurrency": c} for c in (1, 32)]) == [
        "there are fewer prompts than concurrent requests: GSM8K 24 of 32"]
