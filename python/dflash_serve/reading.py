"""What a request comes to: its body, its prompts as token ids, and its parameters."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request

from dflash_decode import LLM, GenerationParams
from dflash_decode.prompts import Reading, read_prompt

from .errors import ApiError, of_validation, refused
from .fields import NOT_SERVED, Asked, ChatAsked, CompletionAsked, Message

Kind = TypeVar("Kind", bound=Asked)
_AT_ONCE = 1 << 16  # bytes that are parsed in less than a millisecond
_DRAINED = 8  # times the limit that is read and dropped, so that the client sees the answer
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens",
             "n", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias")
_NOT_VARIABLES = ("messages", "tools")
_COMPLETION_TOKENS = 16  # OpenAI's default for completions


async def read(http: Request, kind: type[Kind], model: str, most: int) -> Kind:
    """The checked fields of a request. most: bytes of its body."""
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "Content-Type must be application/json; got "
                       f"{http.headers.get('content-type', 'none')[:80]!r}")
    body = await _body(http, most)
    asked = _parse(kind, body) if len(body) <= _AT_ONCE else await asyncio.to_thread(_parse, kind, body)
    if asked.model not in (None, model):
        raise ApiError(404, f"model must be {model!r}; got {str(asked.model)[:80]!r}", "model", "model_not_found")
    for name, value in (asked.model_extra or {}).items():
        if name in NOT_SERVED and value not in NOT_SERVED[name]:
            raise ApiError(400, f"{name} must be left out: this server does not support it", name,
                           "unsupported_parameter")
    return asked


async def _body(http: Request, most: int) -> bytes:
    parts, size = [], 0
    async for part in http.stream():
        size += len(part)
        if size <= most:
            parts.append(part)
        elif size > _DRAINED * most:
            break
    if size > most:
        raise ApiError(413, f"the body must have at most {most} bytes; got more")
    return b"".join(parts)


def _parse(kind: type[Kind], body: bytes) -> Kind:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise of_validation(error) from None


@contextmanager
def told(where: str | None = None) -> Iterator[None]:
    """Errors of `LLM` in a client's request, as the client's. where: the field that they are about."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ApiError(400, f"response_format cannot be followed: {_plain(error)}", "response_format") from None
    except (TypeError, ValueError) as error:
        text = _plain(error)
        first = text.partition(" ")[0]
        named = "response_format" if first == "json_schema" else first if first in _SAMPLING else None
        raise ApiError(400, text, where or named) from None
    except RuntimeError as error:
        raise ApiError(503, f"the decoder has ended: {_plain(error)}") from None


def _plain(error: Exception) -> str:
    return str(error).removeprefix("LLM.asubmit: ")


# ---- prompts, which a thread of their own reads ----------------------------------------------------------------------


def prompts(llm: LLM, asked: Asked) -> list[list[int]]:
    """The token ids of each prompt."""
    if isinstance(asked, ChatAsked):
        return [_chat_prompt(llm, asked)]
    assert isinstance(asked, CompletionAsked)
    each: Any = asked.prompt if asked.has_many else [asked.prompt]
    with told("prompt"):
        return [read_prompt(llm.tokenizer, llm.session.target.vocab_size, one, "prompt", Reading(chat=False))
                for one in each]


def _chat_prompt(llm: LLM, asked: ChatAsked) -> list[int]:
    template = json.dumps(llm.tokenizer.chat_template)
    variables = dict(asked.chat_template_kwargs or {})
    for name in _NOT_VARIABLES:
        if name in variables:
            raise refused("chat_template_kwargs", f"names for the template other than {' and '.join(_NOT_VARIABLES)}",
                          name)
    called = tools(asked)
    for name, given, it in (("reasoning_effort", asked.reasoning_effort, "it"), ("tools", called, "them")):
        if given is not None and name not in template:
            raise ApiError(400, f"{name} must be left out: the model's chat template does not read {it}", name,
                           "unsupported_parameter")
    if asked.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", asked.reasoning_effort)
    messages = [_message(message, i, "developer" in template) for i, message in enumerate(asked.messages)]
    with told("messages"):  # the template may refuse them, or there is none
        return read_prompt(llm.tokenizer, llm.session.target.vocab_size, messages, "messages",
                           Reading(True, called, variables))


def tools(asked: ChatAsked) -> list[dict[str, Any]] | None:
    """The tools that the model may call."""
    if asked.tool_choice not in (None, "auto", "none"):
        raise refused("tool_choice", "'auto' or 'none'", asked.tool_choice, "unsupported_value")
    return None if asked.tool_choice == "none" else asked.tools or None


def _message(message: Message, i: int, developers: bool) -> dict[str, Any]:
    """A message as templates read it: one text, and the arguments of calls as objects."""
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.role == "developer" and not developers:
        found["role"] = "system"
    if not isinstance(message.content, str):
        for part in message.content or []:
            if part.type != "text" or part.text is None:
                raise refused(f"messages[{i}].content", "texts alone", part.type, "unsupported_value")
        found["content"] = "\n".join(part.text or "" for part in message.content or [])
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            found[name] = value
    if message.tool_calls:
        found["tool_calls"] = [_call(call, i) for call in message.tool_calls]
    return found


def _call(call: dict[str, Any], i: int) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise refused(f"messages[{i}].tool_calls", 'calls {"function": {"name": ..., "arguments": ...}}', call)
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except (TypeError, ValueError, RecursionError):  # of no JSON, or an object already
        return call
    return call | {"function": function | {"arguments": arguments}}


# ---- parameters ------------------------------------------------------------------------------------------------------


def params(asked: Asked, found: list[list[int]], context: int) -> GenerationParams:
    """The parameters of an answer to prompts, which must fit into the context with it."""
    longest, most = max(map(len, found)), asked.max_tokens
    if isinstance(asked, ChatAsked):
        most = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    elif most is None:
        most = _COMPLETION_TOKENS
    if most is not None and most < 1:
        raise refused("max_tokens", "an integer of at least 1", most)
    if longest + (most or 1) > context:
        given = f"{longest} and max_tokens {most}" if most else f"a prompt of {longest}"
        param = "max_tokens" if most and longest < context else _prompt_of(asked)
        raise ApiError(400, f"prompt and answer must have at most {context} tokens together; got {given}", param,
                       "context_length_exceeded")
    settings = {name: value for name in _SAMPLING if (value := getattr(asked, name)) is not None}
    return GenerationParams(max_tokens=context - longest if most is None else most, logprobs=_logprobs(asked),
                            json_schema=_schema(asked), **settings)


def _prompt_of(asked: Asked) -> str:
    return "messages" if isinstance(asked, ChatAsked) else "prompt"


def _logprobs(asked: Asked) -> int | None:
    if isinstance(asked, CompletionAsked):
        return asked.logprobs
    assert isinstance(asked, ChatAsked)
    if asked.top_logprobs and not asked.logprobs:
        raise refused("logprobs", "true where top_logprobs is given", asked.logprobs)
    return asked.top_logprobs or 0 if asked.logprobs else None


def _schema(asked: Asked) -> dict[str, Any] | None:
    form = asked.response_format
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"type": "object"}
    if form.json_schema is None:
        raise ApiError(400, "response_format.json_schema must be given", "response_format.json_schema")
    return form.json_schema.schema_


async def left(http: Request) -> None:
    """Returns once the client has left."""
    try:
        while not await http.is_disconnected():
            await http.receive()
    except ClientDisconnect:
        return
