"""What a request comes to: its body, its prompts as token ids, and its parameters."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request

from dflash_decode import LLM, GenerationParams
from dflash_decode.messages import read_message
from dflash_decode.prompts import Reading, read_prompt

from .constraints import constraint
from .errors import ApiError, of_validation, refused
from .fields import Asked, ChatAsked, CompletionAsked, Message
from .others import unread

Kind = TypeVar("Kind", bound=Asked)
_AT_ONCE = 1 << 16  # bytes that are parsed in less than a millisecond
_DRAINED = 8  # times the limit that is read and dropped, so that the client sees the answer
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens",
             "n", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias",
             "cache_salt")
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
    if found := unread(asked):
        name = found[0][:120]
        raise ApiError(400, f"{name} must be left out: {found[1]}", name, "unsupported_parameter")
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
def told(where: str | None = None, restricts: str = "") -> Iterator[None]:
    """Errors of `LLM` in a client's request, as the client's. where: the field that they are about. restricts: the one
    that restricts the answer, if any."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ApiError(400, f"{restricts} cannot be followed: {_plain(error)}", restricts) from None
    except (TypeError, ValueError) as error:
        text = _plain(error)
        first = text.partition(" ")[0]
        named = restricts if first in ("json_schema", "regex") else first if first in _SAMPLING else None
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
    """A message as templates read it."""
    _check_calls(message.tool_calls or [], i)
    calls = {"tool_calls": message.tool_calls} if message.tool_calls else {}
    content = message.content
    parts = content if isinstance(content, str) or content is None else [part.model_dump() for part in content]
    try:
        found = read_message({"role": message.role, "content": parts} | calls, "it")
    except (TypeError, ValueError) as error:
        param = f"messages[{i}].content"
        raise ApiError(400, str(error).replace("it: content", param, 1), param) from None
    found["content"] = found["content"] or ""
    if message.role == "developer" and not developers:
        found["role"] = "system"
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            found[name] = value
    if message.reasoning is not None:
        found.setdefault("reasoning_content", message.reasoning)
    return found


def _check_calls(calls: list[dict[str, Any]], i: int) -> None:
    for call in calls:
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise refused(f"messages[{i}].tool_calls", 'calls {"function": {"name": ..., "arguments": ...}}', call)


# ---- parameters ------------------------------------------------------------------------------------------------------


def params(asked: Asked, found: list[list[int]], context: int) -> list[GenerationParams]:
    """The parameters of the answers to each prompt. They end where the context does, as in vLLM and llama.cpp."""
    longest, most, name = max(map(len, found)), asked.max_tokens, "max_tokens"
    if isinstance(asked, ChatAsked) and asked.max_completion_tokens is not None:
        most, name = asked.max_completion_tokens, "max_completion_tokens"
    if most is not None and most < 1:
        raise refused(name, "an integer of at least 1", most)
    least = max(asked.min_tokens or 0, 1)
    if longest + least > context:
        prompt = "messages" if isinstance(asked, ChatAsked) else "prompt"
        raise ApiError(400, f"{prompt} must leave room for an answer of {least} in the context of {context} tokens; "
                       f"got {longest}", prompt, "context_length_exceeded")
    if most is None:
        most = context if isinstance(asked, ChatAsked) else _COMPLETION_TOKENS
    settings = {name: value for name in _SAMPLING if (value := getattr(asked, name)) is not None}
    settings |= {"logprobs": _logprobs(asked)} | constraint(asked)
    return [GenerationParams(max_tokens=min(most, context - len(prompt)), **settings) for prompt in found]


def _logprobs(asked: Asked) -> int | None:
    if isinstance(asked, CompletionAsked):
        return asked.logprobs
    assert isinstance(asked, ChatAsked)
    if asked.top_logprobs and not asked.logprobs:
        raise refused("logprobs", "true where top_logprobs is given", asked.logprobs)
    return asked.top_logprobs or 0 if asked.logprobs else None


async def left(http: Request) -> None:
    """Returns once the client has left."""
    try:
        while not await http.is_disconnected():
            await http.receive()
    except ClientDisconnect:
        return
