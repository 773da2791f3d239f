"""`python -m tools.training` from end to end, on a tiny target: what a stage keeps, and what a second command does."""

import json
import sys

import pytest

from tests.support.tiny import write_target
from tools.training import train, write

TEXTS = [{"source": "t", "prompt": f"prompt {i}", "answer": "abcdefghij"[i % 7:] * 4, "temperature": 0.0,
          "finish": "stop", "tokens": 20} for i in range(24)]


@pytest.fixture
def run(tmp_path, monkeypatch, eager):
    """run(option, ...): the command; texts are written by the hand of the test, in `asked` tokens and minutes."""
    model, asked = write_target(tmp_path / "target"), []

    def written(_model, folder, tokens, _prompts, _without, *, minutes, **_):
        folder.mkdir(parents=True, exist_ok=True)
        asked.append((tokens, minutes))
        write.keep_part(folder, TEXTS[:12] if tokens == 240 else TEXTS)

    monkeypatch.setattr(train, "write_texts", written)

    def command(*options):
        given = ["--model", model, "--work", tmp_path / "work", "--mask-token", "5", "--layers", "1", "--block-size", 4,
                 "--texts-per-step", 2, "--blocks-per-text", 2, "--save-seconds", 0, *options]
        monkeypatch.setattr(sys, "argv", ["training", *map(str, given)])
        train.main()

    command.asked, command.work = asked, tmp_path / "work"
    return command


def test_the_same_command_goes_on_where_it_ended(run, capsys):
    run("--write-tokens", 240, "--write-minutes", 2, "--steps", 3)
    folder = run.work / "checkpoint"
    record = json.loads((folder / "training.json").read_text())
    assert record["steps"] == 3 and record["texts"] + record["held_out"] == 12
    made = (run.work / "features" / "states").stat().st_mtime_ns
    run("--write-tokens", 240, "--write-minutes", 2, "--steps", 5)
    assert "going on at step 3" in capsys.readouterr().out
    assert json.loads((folder / "training.json").read_text())["steps"] == 5
    assert run.asked == [(240, 2.0)] and (run.work / "features" / "states").stat().st_mtime_ns == made
    same = "--write-tokens", 240, "--write-minutes", 2, "--steps", 6
    with pytest.raises(SystemExit, match=r"has features of other texts, of other layers than \[0, 1\], or cut"):
        run(*same, "--target-layer-ids", 0, 1)
    with pytest.raises(SystemExit, match="state.pt is of a run that differs in texts, .*: remove it, or use another"):
        run(*same, "--features", "live", "--limit", 11)
    with pytest.raises(SystemExit, match="state.pt is of a run that differs in seed, .*held-out texts: remove it"):
        run(*same, "--seed", 1)
    with pytest.raises(SystemExit, match="has features of other texts"):
        run("--write-tokens", 480, "--steps", 6)
    assert run.asked == [(240, 2.0), (480, float("inf"))]
    with pytest.raises(SystemExit, match="or cut to another length than 828: remove it"):
        run("--write-tokens", 480, "--steps", 6, "--answer-tokens", 316)


def test_a_selector_stays_until_the_weights_are_others(run):
    same = "--write-tokens", 240, "--steps"
    run(*same, 2)
    selector = run.work / "checkpoint" / "candidate_selector" / "model.safetensors"
    selector.parent.mkdir()
    selector.write_bytes(b"1")
    run(*same, 2)
    assert selector.is_file()
    run(*same, 3)
    assert not selector.exists()


def test_every_saved_state_has_a_whole_checkpoint(run, monkeypatch):
    class Off(Exception):
        pass

    def cut_off(folder, *_):
        names = {file.name for file in folder.iterdir()}
        assert names == {"config.json", "model.safetensors", "draft_vocabulary.json", "training.json",
                         "training_prompts.json.gz"}
        assert json.loads((folder / "training.json").read_text())["steps"] == 1
        raise Off

    monkeypatch.setattr(train.plots, "plot", lambda _, file: cut_off(file.parent))
    with pytest.raises(Off):
        run("--write-tokens", 240, "--steps", 3)
    assert train.checkpoint.read_prompts(run.work / "checkpoint") == {text["prompt"] for text in TEXTS[:12]}
