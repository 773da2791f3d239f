"""What an `LLM` is asked: parameters and their defaults; and the text that is given out."""

import json
import random

import pytest

from dflash_decode import (
    LLM,
    CheckpointError,
    GenerationError,
    GenerationParams,
    SamplingParams,
    Session,
)
from dflash_decode.llm.defaults import Defaults, read_defaults
from dflash_decode.llm.text import AnswerText, StopStrings
from dflash_decode.messages import read_message
from tests.support import tiny


@pytest.fixture(scope="module")
def llm(models):
    with LLM(models["model"], models["draft"], max_context=64) as made:
        yield made


# ---- what is wrong is said before anything runs ----------------------------------------------------------------------


HI = {"role": "user", "content": "hi"}
WRONG = [
    ({"max_token": 5}, "parameters must be among max_tokens, temperature, .*, cache_salt; got max_token$"),
    ({"max_tokens": 0}, "max_tokens must be an integer of at least 1; got 0"),
    ({"max_tokens": 2.5}, "max_tokens must be an integer of at least 1; got 2.5"),
    ({"n": 0}, "n must be an integer from 1 to 1024; got 0"), ({"n": True}, "n must be an integer from"),
    ({"stop": 5}, "stop must be a text or a list of texts; got 5"),
    ({"stop": ["a", 5]}, r"stop must be a text or a list of texts; got \['a', 5\]"),
    ({"stop": ["a", ""]}, r"stop must be texts of at least 1 character; got \['a', ''\]"),
    ({"stop_token_ids": 5}, "stop_token_ids must be a collection of token ids; got 5"),
    ({"stop_token_ids": ["a"]}, r"stop_token_ids must be token ids in \[0, 264\); got 'a'"),
    ({"stop_token_ids": [264]}, r"stop_token_ids must be token ids in \[0, 264\); got 264"),
    ({"ignore_eos": "no"}, "ignore_eos must be True or False; got 'no'"),
    ({"cache_salt": 5}, "cache_salt must be a text; got 5"),
    ({"min_tokens": -1}, "min_tokens must be an integer of at least 0; got -1"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens must be at most max_tokens, 8; got 9"),
    ({"logprobs": -1}, "logprobs must be an integer from 0 to 264; got -1"),
    ({"logprobs": True}, "logprobs must be an integer from 0 to 264; got True"),
    ({"temperature": -1}, "temperature must be a finite number of at least 0; got -1"),
    ({"top_p": "1"}, "top_p must be a finite number from 0 to 1; got '1'"),
    ({"seed": -1}, "seed must be an integer from 0 to .*; got -1"),
    ({"logit_bias": {"a": 1}}, r"logit_bias must be for token ids in \[0, 264\); got 'a'"),
    ({"grammar": 5}, "grammar must have a method fill_bitmask; got 5"),
    ({"regex": 5}, "regex must be a text; got 5"),
    ({"json_schema": 5}, "json_schema must be a dict, a JSON text or a pydantic model; got 5"),
    ({"json_schema": "{"}, "json_schema must be a JSON schema; got '{': JSONDecodeError"),
    ({"json_schema": "[]"}, "json_schema must be a dict"),
    ({"regex": "a", "json_schema": {}}, "the answer must be restricted by at most one of .*, regex and"),
    ({"params": {"n": 1}}, "params must be GenerationParams, SamplingParams, or a list of them; got {'n': 1}"),
    ({"params": "greedy"}, "params must be GenerationParams"),
    ({"params": [GenerationParams()] * 2}, "params must be one for all prompts or a list of 1, one for each; got 2"),
    ({"prompts": 5}, "prompts must be one prompt or a list of them, each a text, .*; got 5, of type int"),
    ({"prompts": ""}, "prompt 1 must have at least"),
    ({"prompts": [264]}, r"prompt 1 must hold token ids in \[0, 264\); got 264"),
    ({"prompts": ["a" * 64]}, "prompt 1 must be shorter than the context of 64 tokens; got 64"),
    ({"prompts": [HI, 5]}, "prompt 1: message 2 must be {'role': ..., 'content': ...}; got 5"),
    ({"prompts": [{"role": "user"}]}, "prompt 1: message 1: content must be a text or a list of .*; got None"),
    ({"prompts": [HI, HI | {"content": []}]}, r"prompt 1: message 2: content must be .*; got \[\]"),
    ({"prompts": [HI | {"content": [{"type": "image_url"}]}]}, "prompt 1: message 1: content must be texts alone; got "
                                                               "a part of type 'image_url'"),
    ({"prompts": [HI | {"content": ["hi"]}]}, "prompt 1: message 1: content must have parts .*; got 'hi'"),
    ({"prompts": [HI | {"content": [{"type": "text"}]}]}, "prompt 1: message 1: content must have parts"),
    ({"prompts": "a" * 60, "min_tokens": 5, "max_tokens": 5}, "prompt 1 and min_tokens must fit into the context of 64 "
                                                              "tokens; got 60 and 5"),
]


@pytest.mark.parametrize("given, message", WRONG, ids=str)
def test_wrong_arguments_are_named_before_anything_is_decoded(llm, monkeypatch, given, message):
    monkeypatch.setattr(llm._decoder, "step", None)
    given = {"prompts": "abc"} | given
    with pytest.raises((TypeError, ValueError), match=r"^LLM\.generate: " + message):
        llm.generate(given.pop("prompts"), **given)
    assert llm.workload().running == llm.workload().waiting == 0


NUMBERS = ("temperature", "top_p", "min_p", "top_k", "seed", "n", "max_tokens", "min_tokens", "logprobs",
           "repetition_penalty", "presence_penalty")


@pytest.mark.parametrize("name, value", [
    *((name, "1") for name in NUMBERS), ("stop", {}), ("regex", 1), ("stop_token_ids", ["a"]), ("logit_bias", {"a": 1}),
    ("logit_bias", {1: "a"}), ("prompts", ["a", [None]]), ("prompts", [HI | {"content": 5}])], ids=str)
def test_a_value_of_another_kind_is_a_type_error_whatever_the_field(llm, name, value):
    with pytest.raises(TypeError, match=r"^LLM\.generate: "):
        llm.generate(**{"prompts": "abc", name: value})


@pytest.mark.parametrize("arguments, read", [
    ('{"city": "Rome"}', {"city": "Rome"}), ("", {}), ({"city": "Rome"}, {"city": "Rome"}), ("{", "{"), (None, None)])
def test_calls_in_messages_are_openai_s_or_a_template_s(arguments, read):
    call = {"id": "c", "function": {"name": "weather", "arguments": arguments}}
    message = {"role": "assistant", "content": None, "tool_calls": [call, {"name": "x", "arguments": "{}"}]}
    assert read_message(message, "it") == message | {"tool_calls": [
        {"id": "c", "function": {"name": "weather", "arguments": read}}, {"name": "x", "arguments": "{}"}]}
    assert call["function"]["arguments"] == arguments  # the caller's is left alone


@pytest.mark.parametrize("kwargs, got", [(5, "5"), ({5: 1}, "5"), ({"messages": []}, "'messages'")], ids=str)
def test_wrong_names_for_templates(llm, kwargs, got):
    with pytest.raises(TypeError, match=rf"^LLM\.chat: chat_template_kwargs must be .*; got {got}"):
        llm.chat("abc", chat_template_kwargs=kwargs)


def test_one_stream_is_of_one_prompt(llm):
    with pytest.raises(TypeError, match=r"^LLM\.stream: prompt must be one prompt; got \['a', 'b'\]"):
        llm.stream(["a", "b"])
    with pytest.raises(ValueError, match=r"^LLM\.stream: n must be 1; got 2$"):
        llm.stream("a", n=2)


def test_wrong_arguments_of_the_class(models, monkeypatch):
    monkeypatch.setattr("dflash_decode.session.find_model", None)
    for given, message in (({"max_batch": 0}, "max_batch must be an integer of at least 1; got 0"),
                           ({"max_context": "8"}, "max_context must be an integer of at least 1; got '8'"),
                           ({"rule": "row"}, "rule must be one of token, block; got 'row'"),
                           ({"tokenizer": 5}, "tokenizer must be a path or a name; got 5"),
                           ({"dtype": "int4"}, "dtype must be 'auto'.*; got 'int4'")):
        with pytest.raises((TypeError, ValueError), match=message):
            LLM(models["model"], "none", **given)


def test_what_the_cache_has_no_room_for(models, monkeypatch):
    """On a GPU it is as large as its memory allows."""
    monkeypatch.setattr("dflash_decode.loop.default_pages", lambda *_: 1)
    with LLM(models["model"], "none") as small:
        assert len(small.generate("abc", max_tokens=61).token_ids) == 61
        with pytest.raises(ValueError, match="prompt 1 and its answer must fit into the cache of 64 tokens; got 65"):
            small.generate("abc", max_tokens=62)


def test_a_warning_that_is_an_error_is_that_answer_s_alone(llm, monkeypatch):
    def warned(tokens):
        if tokens > 20:
            raise UserWarning("drafts beyond 20 tokens")

    monkeypatch.setattr(llm._decoder, "_warn_of_length", warned)
    with pytest.raises(GenerationError, match="^UserWarning: drafts beyond 20 tokens$"):
        llm.generate("abc", max_tokens=20)
    assert len(llm.generate("abc", max_tokens=4).token_ids) == 4


def test_another_tokenizer(models, llm, tmp_path):
    folder = tiny.write_target(tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<a>"}))
    for given in (folder, llm.tokenizer):
        with LLM(models["model"], "none", tokenizer=given) as other:
            assert other.tokenizer.eos_token == ("<a>" if given is folder else "<end>")


# ---- defaults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file, want", [
    ({}, Defaults()), ({"temperature": 0.6, "top_p": 0.9, "top_k": 20}, Defaults(top_p=0.9, top_k=20)),
    ({"do_sample": True, "temperature": 0.6, "min_p": 0.1}, Defaults(temperature=0.6, min_p=0.1)),
    ({"do_sample": True, "max_new_tokens": 7}, Defaults(temperature=1.0, max_tokens=7)),
    ({"repetition_penalty": 1.1, "temperature": None, "bos_token_id": 1}, Defaults(repetition_penalty=1.1)),
    ({"do_sample": "yes"}, "do_sample must be true or false; got 'yes'"),
    ({"top_p": 2}, "top_p must be a number at least 0 and at most 1; got 2"),
    ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1; got 0"),
    ({"repetition_penalty": 0}, "repetition_penalty must be a number above 0"),
    ([], "expected a JSON object; got list"),
], ids=str)
def test_what_generation_config_json_says(tmp_path, file, want):
    (tmp_path / "generation_config.json").write_text(json.dumps(file))
    if isinstance(want, Defaults):
        assert read_defaults(tmp_path) == want
    else:
        with pytest.raises(CheckpointError, match=f"generation_config.json: {want}"):
            read_defaults(tmp_path)


def test_a_call_goes_before_the_model_s_file_and_that_before_greedy(tmp_path):
    folder = tiny.write_target(tmp_path)
    greedy = Session.load(folder, "none").run([[1, 2, 3]], max_tokens=9).answers[0].tokens
    (folder / "generation_config.json").write_text(json.dumps({
        "do_sample": True, "temperature": 99.0, "top_k": 30, "max_new_tokens": 9, "eos_token_id": greedy[5]}))
    with LLM(folder, "none") as llm:
        assert llm.defaults == GenerationParams(9, 99.0, 30, 1.0, 0.0, repetition_penalty=1.0)
        drawn = llm.generate([1, 2, 3], ignore_eos=True)
        named = llm.generate([1, 2, 3], ignore_eos=True, temperature=99.0, top_k=30, seed=drawn.seed)
        assert drawn.seed is not None and drawn.token_ids == named.token_ids != greedy and len(drawn.token_ids) == 9
        found = llm.generate([1, 2, 3], temperature=0)
        assert found.token_ids == greedy[:greedy.index(greedy[5]) + 1] and found.finish_reason == "stop"
        assert llm.generate([1, 2, 3], SamplingParams(), ignore_eos=True).token_ids == greedy


# ---- text ------------------------------------------------------------------------------------------------------------


def by_characters(text, stops):
    """What StopStrings must find: the first stop string to be complete, and of those that end there the longest."""
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            stop = max(found, key=len)
            return text[:end - len(stop)], stop
    return text, None


def test_stop_strings_are_found_however_the_text_is_cut():
    dice = random.Random(0)
    stopped = 0
    for _ in range(2000):
        text = "".join(dice.choices("ab", k=12))
        stops = tuple("".join(dice.choices("ab", k=dice.randint(1, 5))) for _ in range(dice.randint(0, 3)))
        want, reason = by_characters(text, stops)
        search, out, found, left = StopStrings(stops), "", None, text
        while left and found is None:
            n = dice.randint(1, 4)
            piece, found = search.push(left[:n])
            out, left = out + piece, left[n:]
            assert want.startswith(out)
        out += search.flush() if found is None else ""
        assert (out, found) == (want, reason), (text, stops)
        stopped += found is not None
    assert 500 < stopped < 1900


def test_a_stop_string_counts_if_it_ends_where_it_may():
    search = StopStrings(["aba"])
    assert [search.push(piece, i > 2) for i, piece in enumerate(("ab", "a", "x", "ab", "aba", "c"))] == [
        ("", None), ("ab", None), ("ax", None), ("", None), ("", "aba"), ("c", None)]
    search = StopStrings(["aba"])
    assert search.push("aba", False) == ("ab", None) and search.push("ba") == ("", "aba")


def test_what_is_held_back_is_no_more_than_the_beginning_of_a_stop_string():
    search = StopStrings(["END", "\n\n"])
    assert [search.push(piece) for piece in ("an E", "N", "d\n", "x", "\n", "\n")] == [
        ("an ", None), ("", None), ("ENd", None), ("\nx", None), ("", None), ("", "\n\n")]


@pytest.mark.parametrize("stops", [(), ("never",)])
def test_no_character_is_split(llm, stops):
    text = "grün 😀 ναι 中文"
    answer, pieces = AnswerText(llm.tokenizer, stops), []
    for token in llm.tokenizer.encode(text):
        pieces.append(answer.push([token])[0])
    pieces.append(answer.flush())
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces) and pieces.count("") > 9
    half = AnswerText(llm.tokenizer, stops)
    assert [half.push([token])[0] for token in llm.tokenizer.encode("aü")[:2]] == ["a", ""] and half.flush() == "\ufffd"
