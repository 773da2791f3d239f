"""What `generate` is asked with, and the command `chat`: for people line by line, for programs in lines of JSON."""

import builtins
import json
import os
import sys

import pytest

from dflash_decode import LLM, GenerationParams
from tests.support.cli_calls import one_line

pytest.importorskip("typer")

from dflash_decode.cli.chat import Chat
from dflash_decode.cli.conversation import read_conversation, read_names
from dflash_decode.cli.streams import UsageError

HI = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def words(models):
    return "--model", models["model"], "--drafter", models["draft"], "--max-tokens", 6, "--dtype", "float32"


@pytest.fixture(scope="module")
def llm(models):
    with LLM(models["model"], "none", dtype="float32") as made:
        yield made


@pytest.fixture
def lines(monkeypatch):
    """lines(...): what standard input has; of a person where `person`."""
    def give(*given, person=False):
        left = list(given)

        def read(prompt):
            if not left:
                raise EOFError
            if isinstance(left[0], BaseException):
                raise left.pop(0)
            return left.pop(0)

        monkeypatch.setattr(builtins, "input", read)
        monkeypatch.setattr(sys.stdin, "isatty", lambda: person, raising=False)

    return give


# ---- what generate is asked ------------------------------------------------------------------------------------------


def test_the_ways_to_ask_the_same(call, words, llm, tmp_path):
    (tmp_path / "hi.txt").write_text("hi")
    (tmp_path / "hi.json").write_text(json.dumps([HI]))
    want = llm.chat("hi", max_tokens=6)
    for asked in (("--prompt", "hi"), ("--file", tmp_path / "hi.txt"), ("--messages", tmp_path / "hi.json"),
                  ("--messages", json.dumps([HI])),
                  ("--messages", json.dumps([HI | {"content": [{"type": "text", "text": "hi"}]}]))):
        found = json.loads(call("generate", *words, *asked, "--json")[1])
        assert (found["text"], found["tokens"]) == (want.text, want.token_ids)
    want = llm.chat([{"role": "system", "content": "be"}, HI], max_tokens=6)
    found = json.loads(call("generate", *words, "--prompt", "hi", "--system", "be", "--json")[1])
    assert found["tokens"] == want.token_ids and found["prompt"] == [{"role": "system", "content": "be"}, HI]


def test_stop_and_names_for_the_template_reach_the_model(call, words, llm, monkeypatch):
    given = []
    whole = LLM.submit
    monkeypatch.setattr(LLM, "submit", lambda *args, **more: given.append((args, more)) or whole(*args, **more))
    code, out, _ = call("generate", *words, "--prompt", "hi", "--stop", "x", "--stop", "yz", "--json", "--compare",
                        "--template-kwargs", '{"enable_thinking": false}')
    assert code == 0 and json.loads(out)["stop"] == ["x", "yz"] and json.loads(out)["identical_to_baseline"]
    assert len(given) == 2
    for (_, prompt, params), more in given:
        assert prompt == [HI] and params.stop == ("x", "yz") and params.repetition_penalty == 1.0
        assert more == {"chat_template_kwargs": {"enable_thinking": False}}


def test_generate_is_greedy_whatever_the_model_s_file_says(call, models, words, tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    for name in os.listdir(models["model"]):
        (folder / name).symlink_to(os.path.join(models["model"], name))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 99.0,
                                                               "repetition_penalty": 9.0, "top_k": 3}))
    found = [json.loads(call("generate", "--prompt", "hi", *words[2:], "--model", model, "--json")[1])["tokens"]
             for model in (folder, models["model"])]
    assert found[0] == found[1]


@pytest.mark.parametrize("asked, message", [
    ((), "one of --prompt, --file, --messages must be given; got none"),
    (("--prompt", "a", "--file", "b"), "one of --prompt, --file, --messages must be given; got --prompt and --file"),
    (("--file", "no/such"), "--file must be a file of text; got 'no/such', which does not exist"),
    (("--file", "FOLDER"), "which is a directory"), (("--file", "/dev/null"), "which is not a regular file"),
    (("--file", "EMPTY"), "--file must not be empty"), (("--file", "BINARY"), "which cannot be read: 'utf-8' codec"),
    (("--messages", "no/such"), "--messages must be a file of text; got 'no/such', which does not exist"),
    (("--messages", "[1"), "--messages must be a JSON list of messages; got "),
    (("--messages", "[]"), "--messages must be a JSON list of at least one message; got '[]'"),
    (("--messages", "[5]"), "--messages: message 1 must be {'role': ..., 'content': ...}; got 5"),
    (("--messages", '[{"role": "user", "content": [{"type": "image_url"}]}]'), "got a part of type 'image_url'"),
    (("--messages", '[{"role": "user", "content": 5}]'), "--messages: message 1: content must be a text or a list of"),
    (("--messages", '[{"role": "system", "content": "a"}]', "--system", "x"),
     "must not be given where --messages begin with a system"),
    (("--prompt", "x", "--system", ""), "--system must not be empty"),
    (("--prompt", "x", "--stop", ""), "--stop must not be empty"),
    (("--prompt", "x", "--template-kwargs", "[]"), "--template-kwargs must be a JSON object; got '[]'"),
    (("--prompt", "x", "--template-kwargs", "{"), "--template-kwargs must be a JSON object; got '{'"),
], ids=str)
def test_what_is_asked_wrongly_is_one_line(call, tmp_path, monkeypatch, asked, message):
    monkeypatch.setattr("dflash_decode.session.Session.load", None)
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    names = {"FOLDER": tmp_path, "EMPTY": tmp_path / "empty", "BINARY": tmp_path / "binary"}
    code, out, err = call("generate", *(names.get(word, word) for word in asked))
    assert code == 2 and out == "" and one_line(err) and message in err


def test_half_characters_are_no_text():
    with pytest.raises(UsageError, match="--prompt must be text in UTF-8"):
        read_conversation("\udcff", None, None, None)
    with pytest.raises(UsageError, match="must be a JSON object; got '\\["):
        read_names("[" * 100_000)


# ---- a conversation --------------------------------------------------------------------------------------------------


def answers(llm, *texts, first=()):
    """What greedy answers to these messages in one conversation are."""
    history, found = list(first), []
    for text in texts:
        history.append({"role": "user", "content": text})
        found.append(llm.chat(history, max_tokens=6).text)
        history.append({"role": "assistant", "content": found[-1]})
    return found


def test_a_conversation_has_its_history_until_it_is_cleared(call, words, llm, lines, monkeypatch):
    asked, whole = [], LLM.submit
    monkeypatch.setattr(LLM, "submit", lambda self, prompt, *args, **more: asked.append(prompt) or whole(
        self, prompt, *args, **more))
    lines("one", "", "two", "/clear", "two", "/exit", "never read")
    code, out, err = call("chat", *words, "--system", "be")
    first = {"role": "system", "content": "be"}
    want = [*answers(llm, "one", "two", first=[first]), *answers(llm, "two", first=[first])]
    assert code == 0 and err == "" and out == "".join(f"{text}\n" for text in want)
    one, two = ({"role": "user", "content": text} for text in ("one", "two"))
    assert asked == [[first, one], [first, one, {"role": "assistant", "content": want[0]}, two], [first, two]]


def test_a_person_is_told_what_there_is_and_how_fast_it_was(call, words, lines):
    lines("one", person=True)
    code, out, err = call("chat", *words)
    assert code == 0 and "note: /clear forgets the conversation" in err
    assert out.splitlines()[1].startswith("6 tokens, ") and "acceptance length" in out


def test_a_message_that_does_not_fit_ends_nothing(call, words, llm, lines):
    lines("x" * 200, "one")
    code, out, err = call("chat", *words)
    assert code == 0 and out == f"\n{answers(llm, 'one')[0]}\n" and "must be shorter than the context of 128" in err


def test_an_interrupt_of_a_person_ends_the_answer_alone(llm):
    def write(text):
        raise KeyboardInterrupt

    chat = Chat(llm, None, GenerationParams(max_tokens=100), {})
    found = chat.say(HI, write, True)
    assert found.finish_reason == "cancelled" and 0 < len(found.token_ids) < 100
    assert chat.history == [HI, {"role": "assistant", "content": found.text}]
    with pytest.raises(KeyboardInterrupt):
        chat.say(HI, write, False)
    assert len(chat.history) == 2 and llm.workload() == (0, 0, 0.0) or llm.generate("a", max_tokens=1)


def test_an_interrupt_before_a_message_ends_the_command(call, words, lines):
    lines(KeyboardInterrupt(), person=True)
    code, _, err = call("chat", *words)
    assert code == 130 and err.endswith("dflash-kernels: interrupted\n")


def test_each_answer_of_a_seed_has_a_seed_of_its_own(call, words, llm, lines):
    lines('"one"', "null", '"one"')
    _, out, _ = call("chat", *words, "--json", "--temperature", 1, "--seed", 4)
    assert [json.loads(line)["tokens"] for line in out.splitlines()] == [
        llm.chat("one", max_tokens=6, temperature=1.0, seed=seed).token_ids for seed in (4, 5)]


def test_lines_of_json(call, words, llm, lines):
    two = '{"role": "user", "content": [{"type": "text", "text": "two"}]}'
    lines('"one"', two, "x", "5", '"' + "x" * 200 + '"', "null", '"two"')
    code, out, _ = call("chat", *words, "--json")
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(found) == 6
    assert [found[i]["text"] for i in (0, 1, 5)] == [*answers(llm, "one", "two"), *answers(llm, "two")]
    assert found[2]["error"].startswith("a line must be JSON: a text or a message; got 'x'")
    assert "a line must be {" in found[3]["error"] and "shorter than the context of 128" in found[4]["error"]
    assert {"tokens", "finish", "seconds", "acceptance_length"} <= found[0].keys()
