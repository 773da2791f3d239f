"""Requests that are wrong: OpenAI's shape of error, one sentence, no traceback, and the server goes on."""

import json
import socket

import pytest
from pydantic import ValidationError

from dflash_serve.fields import ChatAsked
from dflash_serve.others import HARMLESS, NOT_SERVED
from tests.support.serving import CONTEXT, WEATHER, request, serving

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
ABC = {"prompt": "abc", "max_tokens": 2}
DEEP = b'{"messages": ' + b"[" * 200_000


def message(**fields):
    return HELLO | {"messages": [fields]}


# (path, body, status, param, part of the message)
WRONG = [
    (CHAT, b"{", 400, None, "the body must be JSON"), (CHAT, b"", 400, None, "the body must be JSON"),
    (CHAT, b"\xff\xfe{}", 400, None, "the body must be JSON"), (CHAT, DEEP, 400, None, "the body must be JSON"),
    (CHAT, [], 400, None, "the body must be an object"), (CHAT, b"{}", 400, "messages", "messages must be given"),
    (TEXT, {}, 400, "prompt", "prompt must be given"),
    (CHAT, HELLO | {"model": "gpt-5"}, 404, "model", "model must be 'tiny'; got 'gpt-5'"),
    (CHAT, HELLO | {"messages": []}, 400, "messages", "messages must not be empty"),
    (CHAT, HELLO | {"messages": "hello"}, 400, "messages", "messages must be a list; got 'hello'"),
    (CHAT, message(role="robot", content="x"), 400, "messages[0].role", "got 'robot'"),
    (CHAT, message(role="user", content=5), 400, "messages[0].content", "must be a text or a list; got 5"),
    (CHAT, message(role="user", content=[{"type": "image_url"}]), 400, "messages[0].content",
     "messages[0].content must be texts alone; got a part of type 'image_url'"),
    (CHAT, message(role="user"), 400, "messages[0].content", "must be a text or a list of {'type': 'text', 'text': .."),
    (CHAT, message(role="user", content="\ud800"), 400, None, "the body must be JSON"),
    (CHAT, message(role="assistant", tool_calls=[{}]), 400, "messages[0].tool_calls", "must be calls"),
    (CHAT, HELLO | {"max_tokens": "many"}, 400, "max_tokens", "must be an integer; got 'many'"),
    (CHAT, HELLO | {"max_tokens": 0}, 400, "max_tokens", "an integer of at least 1; got 0"),
    (CHAT, HELLO | {"max_tokens": 1.5}, 400, "max_tokens", "must be an integer; got 1.5"),
    (CHAT, message(role="user", content="x" * CONTEXT), 400, "messages", f"of 1 in the context of {CONTEXT} tokens"),
    (TEXT, ABC | {"prompt": "x" * CONTEXT}, 400, "prompt", f"of 1 in the context of {CONTEXT} tokens; got {CONTEXT}"),
    (TEXT, ABC | {"prompt": ["x", "x" * (CONTEXT - 4)], "min_tokens": 5, "max_tokens": 9}, 400, "prompt",
     f"prompt must leave room for an answer of 5 in the context of {CONTEXT} tokens; got {CONTEXT - 4}"),
    (TEXT, ABC | {"prompt": ""}, 400, "prompt", "at least 1 token"),
    (TEXT, ABC | {"prompt": []}, 400, "prompt", "at least 1 token"),
    (TEXT, ABC | {"prompt": [1, "a"]}, 400, "prompt", "must be a text, token ids, or a list of either; got [1, 'a']"),
    (TEXT, ABC | {"prompt": [[1], []]}, 400, "prompt", "at least 1 token"),
    (TEXT, ABC | {"prompt": [10**9]}, 400, "prompt", "token ids in [0, 264)"),
    (TEXT, ABC | {"prompt": 5}, 400, "prompt", "must be a text, token ids, or a list of either; got 5"),
    (CHAT, HELLO | {"temperature": "hot"}, 400, "temperature", "must be a number; got 'hot'"),
    (CHAT, HELLO | {"temperature": True}, 400, "temperature", "must be a number; got True"),
    (CHAT, HELLO | {"temperature": -1}, 400, "temperature", "got -1"),
    (CHAT, b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 400, "temperature", "got nan"),
    (CHAT, HELLO | {"top_p": 1.5}, 400, "top_p", "got 1.5"), (CHAT, HELLO | {"seed": -1}, 400, "seed", "got -1"),
    (CHAT, HELLO | {"n": 0}, 400, "n", "got 0"), (CHAT, HELLO | {"n": 129}, 400, "n", "must be at most 128; got 129"),
    (CHAT, HELLO | {"stop": [""]}, 400, "stop", "at least 1 character"),
    (CHAT, HELLO | {"stop": 5}, 400, "stop", "stop must be a text or a list; got 5"),
    (CHAT, HELLO | {"stop": ["a", 5]}, 400, "stop[1]", "stop[1] must be a text; got 5"),
    (CHAT, message(role="user", content=[{"type": 5}]), 400, "messages[0].content[0].type", "must be a text; got 5"),
    (CHAT, HELLO | {"logit_bias": {"x": 1}}, 400, "logit_bias", "must have numbers, and token ids as their names; got"),
    (CHAT, HELLO | {"logit_bias": {"3": "y"}}, 400, "logit_bias", "as their names; got '3': 'y'"),
    (CHAT, HELLO | {"logit_bias": {"3": True}}, 400, "logit_bias", "as their names; got '3': True"),
    (CHAT, HELLO | {"stop": ["x"] * 129}, 400, "stop", "must be a text or a list of at most 128; got"),
    (CHAT, HELLO | {"stop": ["y", "x" * 1025]}, 400, "stop[1]", "must be a text of at most 1024 characters; got"),
    (CHAT, HELLO | {"stop": "x" * 1025}, 400, "stop", "must be a text of at most 1024 characters"),
    (CHAT, HELLO | {"logit_bias": {"999": 1}}, 400, "logit_bias", "token ids in [0, 264); got 999"),
    (CHAT, HELLO | {"top_logprobs": 2}, 400, "logprobs", "true where top_logprobs is given"),
    (CHAT, HELLO | {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "got 21"),
    (TEXT, ABC | {"logprobs": True}, 400, "logprobs", "must be an integer; got True"),
    (CHAT, HELLO | {"stream": "yes"}, 400, "stream", "must be true or false; got 'yes'"),
    (CHAT, HELLO | {"tools": [{}]}, 400, "tools", "must have functions"),
    (CHAT, HELLO | {"tools": [WEATHER], "tool_choice": "required"}, 400, "tool_choice", "got 'required'"),
    (CHAT, HELLO | {"response_format": {"type": "xml"}}, 400, "response_format.type",
     "must be 'text', 'json_object' or 'json_schema'; got 'xml'"),
    (CHAT, HELLO | {"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema", "must be given"),
    (CHAT, HELLO | {"structured_outputs": {}}, 400, "structured_outputs", "json, regex, choice, json_object; got no"),
    (CHAT, HELLO | {"structured_outputs": {"regex": "a", "choice": ["b"]}}, 400, "structured_outputs", "and choice"),
    (TEXT, ABC | {"structured_outputs": {"choice": []}}, 400, "structured_outputs.choice", "must not be empty"),
    (TEXT, ABC | {"structured_outputs": {"regex": 5}}, 400, "structured_outputs.regex", "must be a text; got 5"),
    (TEXT, ABC | {"structured_outputs": {"regex": "a" * 8193}}, 400, "structured_outputs.regex",
     "must be a text of at most 8192 characters; got"),
    (TEXT, ABC | {"structured_outputs": {"choice": ["a" * 1000] * 70}}, 400, "structured_outputs",
     "must have at most 65,536 characters; got 70,069"),
    (CHAT, HELLO | {"response_format": {"type": "json_schema", "json_schema": {"schema": {"title": "a" * 65537}}}}, 400,
     "response_format", "must have at most 65,536 characters; got 65,550"),
    (TEXT, ABC | {"structured_outputs": {"grammar": "root ::= x"}}, 400, "structured_outputs.grammar", "must be left"),
    (TEXT, ABC | {"structured_outputs": {"json_object": True}, "response_format": {"type": "json_object"}}, 400,
     "response_format", "must be left out where structured_outputs is given"),
    (CHAT, HELLO | {"response_format": {"type": "json_object", "schema": {"type": "object"}}}, 400,
     "response_format.schema", '{"type": "json_schema", "json_schema": {"schema": ...}} does that here'),
    (CHAT, HELLO | {"response_format": {"type": "text", "json_schema": {"schema": {}}}}, 400,
     "response_format.json_schema", "must be left out where type is 'text'"),
    (CHAT, HELLO | {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "stric": True}}}, 400,
     "response_format.json_schema.stric", "must be left out: this server does not support it"),
    (CHAT, HELLO | {"stream": True, "stream_options": {"continuous_usage_stats": True}}, 400,
     "stream_options.continuous_usage_stats", "must be left out: this server does not support it"),
    (CHAT, HELLO | {"n_predict": 5}, 400, "n_predict", "this server does not know it; max_tokens does that here"),
    (CHAT, HELLO | {"guided_json": {}}, 400, "guided_json", "structured_outputs does that here"),
    (CHAT, HELLO | {"tempreature": 0.5}, 400, "tempreature", "must be left out: this server does not know it"),
    (CHAT, HELLO | {"max_completion_tokens": 0}, 400, "max_completion_tokens",
     "max_completion_tokens must be an integer of at least 1; got 0"),
    (TEXT, ABC | {"max_completion_tokens": 5}, 400, "max_completion_tokens", "this server does not know it"),
    (TEXT, ABC | {"prompt": ["a"] * 200}, 400, "prompt", "must have at most 132 prompts, of the 132 answers that"),
    (CHAT, HELLO | {"reasoning_effort": "low"}, 400, "reasoning_effort", "does not read it"),
    (CHAT, HELLO | {"chat_template_kwargs": {"messages": []}}, 400, "chat_template_kwargs", "got 'messages'"),
    (CHAT, HELLO | {"chat_template_kwargs": []}, 400, "chat_template_kwargs", "must be an object"),
    ("/v1/nothing", HELLO, 404, None, "POST /v1/nothing: not found"),
    ("/v1/models", HELLO, 405, None, "POST /v1/models: method not allowed"),
]


@pytest.mark.parametrize("field, wrong", [
    ("messages", [0]), ("messages", [{"role": "user", "content": [0, 0, 0]}]), ("stop", [0]), ("stop_token_ids", ["x"]),
    ("tools", [0]), ("structured_outputs", {"choice": [0, 0, 0]}), ("logit_bias", {"x": 0, "y": 0, "z": 0}),
    ("messages", [{"role": "assistant", "tool_calls": [0, 0, 0]}])], ids=str)
def test_a_long_list_of_faults_ends_with_the_first(field, wrong):
    """Millions of them would take gigabytes. A field that may be of several types has a fault of each."""
    many = wrong * 1000 if isinstance(wrong, list) and len(wrong) == 1 and not isinstance(wrong[0], dict) else wrong
    with pytest.raises(ValidationError) as found:
        ChatAsked.model_validate_json(json.dumps(HELLO | {field: many}))
    assert found.value.error_count() <= 2


def error_of(text):
    """The error, in OpenAI's shape."""
    found = json.loads(text)
    assert [*found] == ["error"] and set(found["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in text and "LLM." not in text and len(found["error"]["message"]) < 400
    assert "\n" not in found["error"]["message"] and "Input should" not in text and "pydantic" not in text
    return found["error"]


@pytest.mark.parametrize("path, body, status, param, said", WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_said(server, path, body, status, param, said):
    found, _, text = request(server.url, "POST", path, body)
    error = error_of(text)
    assert (found, error["param"]) == (status, param) and said in error["message"], error
    assert server.desk.taken == 0


@pytest.mark.parametrize("name", NOT_SERVED)
def test_fields_that_are_not_served_are_refused_unless_they_change_nothing(server, name):
    status, _, text = request(server.url, "POST", CHAT, HELLO | {name: {"a": 1}})
    assert (status, error_of(text)["param"]) == (400, name) and "must be left out" in text
    for value in NOT_SERVED[name]:
        assert request(server.url, "POST", CHAT, HELLO | {name: value})[0] == 200


def test_harmless_fields_are_ignored_and_null_is_no_value(server):
    for body, path in ((HELLO, CHAT), (ABC, TEXT)):
        assert request(server.url, "POST", path, body | dict.fromkeys(HARMLESS, {"a": "b"}) | {"mine": None})[0] == 200
    nothing = dict.fromkeys(("temperature", "n", "stop", "tools", "tool_choice", "logit_bias", "stream", "max_tokens"))
    assert request(server.url, "POST", CHAT, nothing | HELLO)[0] == 200


def test_a_body_that_is_too_large_is_refused_and_not_kept(llm):
    with serving(llm, max_body=100_000) as server:
        large = HELLO | {"messages": [{"role": "user", "content": "x" * 100_000}]}
        status, _, text = request(server.url, "POST", CHAT, large)
        assert (status, error_of(text)["message"]) == (413, "the body must have at most 100000 bytes; got more")
        with socket.create_connection(server.url.removeprefix("http://").split(":")) as endless:
            endless.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                            b"Content-Length: 100000000000\r\n\r\n" + b" " * 900_000)
            assert endless.recv(12) == b"HTTP/1.1 413"
        assert request(server.url, "POST", CHAT, HELLO)[0] == 200


def test_ten_megabytes(server):
    status, _, text = request(server.url, "POST", CHAT, HELLO | {"messages": [
        {"role": "user", "content": "x" * (10 << 20)}]})
    assert status == 413 and error_of(text)["type"] == "invalid_request_error"


def test_other_content_types_are_refused(server):
    """As no page of a browser may send JSON to another server unasked."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        status, _, text = request(server.url, "POST", CHAT, HELLO, **{"Content-Type": kind})
        assert status == 415 and "Content-Type must be application/json" in error_of(text)["message"]
    assert request(server.url, "POST", CHAT, HELLO, **{"Content-Type": "Application/JSON; charset=utf-8"})[0] == 200


def test_a_key_is_asked_for(llm):
    with serving(llm, api_key="secret") as server:
        for given in ("", "Bearer wrong", "secret", "Bearer é"):
            more = {"Authorization": given} if given else {}
            status, headers, text = request(server.url, "POST", CHAT, HELLO, **more)
            assert (status, error_of(text)["code"]) == (401, "invalid_api_key") and "secret" not in text
            assert headers["www-authenticate"] == "Bearer"
        assert request(server.url, "GET", "/v1/models")[0] == 401
        assert request(server.url, "POST", CHAT, HELLO, Authorization="bearer secret")[0] == 200
        assert [request(server.url, "GET", path)[0] for path in ("/health", "/metrics")] == [200, 200]


def test_a_wrong_method_is_told_the_right_one(server):
    status, headers, _ = request(server.url, "TRACE", CHAT)
    assert (status, headers["allow"]) == (405, "POST")


def test_a_fault_of_the_server_is_no_traceback_for_clients(server, monkeypatch):
    monkeypatch.setattr("dflash_serve.app.reading.params", None)
    status, _, text = request(server.url, "POST", CHAT, HELLO)
    assert (status, error_of(text)["message"]) == (500, "the server failed; its log says how")
    assert server.desk.taken == 0
