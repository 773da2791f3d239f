"""Checks messages, and makes one text of their parts. It loads no heavy module, so that commands can use it early."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .inputs import shown


def read_message(message: object, what: str) -> dict[str, Any]:
    """The message as templates read it: one text as its content, and the arguments of calls as objects. Text parts are
    joined by newlines, as in vLLM. Raises TypeError, and ValueError for parts that are no text, with messages that
    begin with `what`."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise TypeError(f"{what} must be {{'role': ..., 'content': ...}}; got {shown(message)}")
    if isinstance(calls := message.get("tool_calls"), (list, tuple)):
        message = {**message, "tool_calls": [_call(call) for call in calls]}
    content = message.get("content")
    if isinstance(content, str) or content is None and message["role"] == "assistant":  # its calls may be all it says
        return dict(message)
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)) or not content:
        raise TypeError(f"{what}: content must be a text or a list of {{'type': 'text', 'text': ...}}; "
                        f"got {shown(content)}")
    return {**message, "content": "\n".join(_text(part, what) for part in content)}


def _text(part: object, what: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(kind, str) and kind != "text":
        raise ValueError(f"{what}: content must be texts alone; got a part of type {shown(kind)}")
    text = part.get("text") if isinstance(part, Mapping) and kind else None
    if not isinstance(text, str):
        raise TypeError(f"{what}: content must have parts {{'type': 'text', 'text': ...}}; got {shown(part)}")
    return text


def _call(call: Any) -> Any:
    """A call whose arguments are an object: OpenAI's are the JSON of one, which a template would write as a text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"] or "{}")}}
    except (ValueError, RecursionError):  # no JSON: what a model wrote
        return call
