"""Acceptance over answers that are there: what decoding accepts, by task and position."""

import json
import sys

from dflash_decode import Session
from tools.training import acceptance


def test_blocks_accept_what_decoding_accepts(tmp_path, monkeypatch, capsys):
    prompts = {"counts": "Count from one to ten.", "days": "Name the days of the week."}
    file, out = tmp_path / "p.jsonl", tmp_path / "out.json"
    file.write_text("".join(json.dumps({"task": t, "id": t, "turns": [p]}) + "\n" for t, p in prompts.items()))
    monkeypatch.setattr(sys, "argv", ["acceptance", "--prompts", str(file), "--max-tokens", "40", "--json", str(out)])
    acceptance.main()
    found = json.loads(out.read_text())["drafters"]["auto"]
    assert f"mean {found['mean_of_tasks']:.3f}" in capsys.readouterr().out
    session = Session.load("smollm2", block_size=8)
    for task, prompt in prompts.items():
        steps = session.run(prompt, max_tokens=40).steps
        got = found["tasks"][task]
        assert got["blocks"] == len(steps)
        # The last step's drafts may go beyond the answer.
        assert abs(got["acceptance_length"] * len(steps) - sum(steps)) <= 8


def test_figures_of_blocks():
    found = acceptance.figures([0, 2, 2, 1], 4)
    assert found == {"blocks": 4, "acceptance_length": 2.25, "by_position": [0.75, 0.6667, 0.0]}
    assert acceptance.figures([0], 3)["by_position"] == [0.0, None]
