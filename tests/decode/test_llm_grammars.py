"""Answers that follow a JSON schema or a regular expression, with and without a drafter."""

import json
import random
import sys

import pytest
import torch

from dflash_decode import LLM
from tests.support import tiny


@pytest.fixture(scope="module")
def llm(models):
    with LLM(models["model"], models["draft"], max_context=64) as made:
        yield made


SCHEMA = {"type": "object", "properties": {"a": {"enum": ["xy", "z"]}, "b": {"type": "boolean"}},
          "required": ["a", "b"], "additionalProperties": False}


@pytest.mark.parametrize("how", [{}, {"temperature": 1.5, "seed": 4}], ids=str)
@pytest.mark.parametrize("schema", [SCHEMA, json.dumps(SCHEMA)], ids=["dict", "text"])
def test_an_answer_follows_a_schema(llm, how, schema):
    pytest.importorskip("llguidance")
    # Blanks are allowed anywhere, and a model of random weights would write nothing else.
    blanks = {token: -float("inf") for token in llm.tokenizer.encode(" \t\n\r")}
    found = llm.chat("abc", json_schema=schema, max_tokens=50, logit_bias=blanks, n=2, **how)
    with llm.without_drafter() as baseline:
        same = baseline.chat("abc", json_schema=schema, max_tokens=50, logit_bias=blanks, n=2, **how)
    for one, other in zip(found.choices, same.choices, strict=True):
        assert one.token_ids == other.token_ids and one.finish_reason == "stop"
        value = json.loads(one.text)
        assert [*value] == ["a", "b"] and value["a"] in ("xy", "z") and isinstance(value["b"], bool)


def test_an_answer_matches_a_regular_expression_and_is_long_enough(llm):
    pytest.importorskip("llguidance")
    assert llm.chat("abc", regex="(yes|no)!", max_tokens=9).text in ("yes!", "no!")
    for least in (2, 5):
        found = llm.chat("abc", regex="[ab]{2,8}", min_tokens=least, max_tokens=20, temperature=1.0, seed=1)
        assert set(found.text) <= {"a", "b"} and least <= len(found.text) <= 8 and found.finish_reason == "stop"


def test_a_grammar_is_asked_in_any_order(llm):
    pytest.importorskip("llguidance")
    answer = llm.tokenizer.encode('{"a":"xy"}')
    constraint = llm._constraints.grammar("x", SCHEMA, None, None)
    dice = random.Random(0)

    def words(one, n):
        found = torch.full((-(-tiny.VOCAB // 32),), -1, dtype=torch.int32)
        one.fill_bitmask(answer[:n], found)
        return found.tolist()

    for n in (dice.randint(0, 9) for _ in range(30)):
        assert words(constraint, n) == words(constraint.fresh().fresh(), n) != [-1] * 9


def test_what_llguidance_refuses(llm):
    pytest.importorskip("llguidance")
    for given, name in (({"type": "blob"}, "json_schema"), ("(", "regex")):
        with pytest.raises(ValueError, match=rf"^LLM\.chat: {name} must be one that llguidance .* can follow; got "):
            llm.chat("abc", **{name: given})


def test_without_llguidance(llm, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ModuleNotFoundError, match=r"^LLM\.chat: regex needs the package llguidance: pip install 'dfla"):
        llm.chat("abc", regex="a")
