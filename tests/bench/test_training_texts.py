"""Training texts: what the target writes, and that writing goes on where it stopped."""

import gzip
from dataclasses import replace

import pytest

from dflash_decode import Session
from tests.support.tiny import write_target
from tools.training import texts, write


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    return Session.load(write_target(tmp_path_factory.mktemp("target")), "none")


def test_answers_are_those_of_decoding_alone(session):
    """Prompts are answered once; a follow-up is answered in its conversation."""
    given = [("g", text) for text in ("one", "two", "never", "three", "two")]
    writer = texts.Writer(session, given, {"never"}, concurrency=2, seed=0, own=False, budget=8, sampled=0.0, follow=0)
    writer.ready.append(texts.Turn("g", "and then?", (("first", "answer"),)))
    rows = list(writer.conversations())
    assert sorted(row["prompt"] for row in rows) == ["and then?", "one", "three", "two"]
    for row in rows:
        messages = texts.messages_of(row["prompt"], row.get("before", ()))
        alone = session.run([messages], max_tokens=8).answers[0]
        ends = alone.finish == "stop"
        assert (row["answer"], row["finish"]) == (session.tokenizer.decode(alone.tokens[:-1 if ends else None]),
                                                  alone.finish)
        assert row["tokens"] == len(alone.tokens) - ends and ("before" in row) == (row["prompt"] == "and then?")


def test_own_prompts_are_those_that_ended_and_come_once(session):
    writer = texts.Writer(session, (), (), concurrency=2, seed=0)
    turn = texts.Turn("code", "Write", answers=False)
    ends = ("kept", "stop", 4), ("cut", "length", 9), ("short", "stop", 3), ("kept", "stop", 4)
    for prompt, finish, tokens in ends:
        writer._ask(prompt, turn, finish, tokens)
    asked = [writer._next() for _ in range(2)]
    assert asked[0].prompt == "kept" and not asked[1].answers
    requests = [request for request, _ in zip(writer._requests(), range(4), strict=False)]
    assert all(not turn.answers for turn in writer.turns.values()) and len(requests) == 4
    opening = texts.open_turn(session.tokenizer, (("first", "answer"),), "Why")
    assert session.tokenizer.decode(opening).endswith("Why")


def test_writing_goes_on_where_it_stopped(session, tmp_path):
    given = [("g", f"prompt {i}") for i in range(12)]
    how = dict(concurrency=3, own=False, budget=6, sampled=0.5, follow=0, part=2)
    write.write(session, tmp_path, 20, given, ["prompt 5"], **how)
    first = [row for file in write.parts(tmp_path) for row in texts.read_jsonl(file)]
    assert len(write.parts(tmp_path)) == 2 and 20 <= sum(row["tokens"] for row in first) < 20 + 6
    (tmp_path / "texts-0002.part").write_bytes(b"cut off")
    write.write(session, tmp_path, 10_000, given, ["prompt 5"], **how)
    every = [row for file in write.parts(tmp_path) for row in texts.read_jsonl(file)]
    assert every[:len(first)] == first
    assert sorted(row["prompt"] for row in every) == sorted(f"prompt {i}" for i in range(12) if i != 5)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    write.write(session, tmp_path, 10, given, [], **how)
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}


def test_an_answer_is_the_tokens_that_the_target_wrote(session):
    """Also special ones, which its text has not, and with variables of the template."""
    tokenizer = session.tokenizer
    special = {tokenizer.token_id(f"<x{i}>"): 30.0 for i in range(5)}
    writer = texts.Writer(session, [("g", "one"), ("g", "x" * 600)], (), concurrency=1, seed=0, own=False, budget=8,
                          sampled=0.0, follow=0, template={"bos_token": "!"})
    requests = writer._requests
    writer._requests = lambda: (request and replace(request, sampling=replace(request.sampling, logit_bias=special))
                                for request in requests())
    row, = writer.conversations()
    assert len(row["ids"]) == 8 and set(row["ids"]) <= set(special) and row["answer"] == "" and writer.skipped == 1
    ids, start = texts.coded(tokenizer, row)
    assert ids[start:] == row["ids"] and row["template"] == {"bos_token": "!"}
    assert texts.coded(tokenizer, {"prompt": "p", "answer": "abc", "finish": "stop"})[0][-4:] == [
        *tokenizer.encode("abc"), tokenizer.eos_id]


def test_prompts_are_read_from_every_kind_of_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"turns": ["x", "y"]}\n{"prompt": "[z]", "answer": "."}\n')
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(b'["p", "q"]'))
    assert write.read_prompts(tmp_path / "a.jsonl") == ["x", "[z]"]
    assert write.read_prompts(tmp_path / "b.json.gz") == ["p", "q"]
