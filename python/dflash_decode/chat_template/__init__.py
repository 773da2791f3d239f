"""Renders chat templates, with the names and values that transformers gives a template.

A template is code from the checkpoint's author. It runs in Jinja's sandbox (sandbox.py), on copies of plain data,
within a budget (budget.py). Every failure in it is a CheckpointError.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

import jinja2
import numpy as np
from jinja2.ext import Extension, loopcontrols

from ..checkpoint.errors import CheckpointError, brief
from .budget import LONGEST_TEMPLATE, TooMuch, spending
from .costs import paid_filter
from .sandbox import Environment

_REASONING = ("reasoning_content", "thinking", "reasoning")  # what a message's reasoning is called, the standard first


def render(template: str, source: str, messages: Iterable, tools: Iterable | None, documents: Iterable | None,
           add_generation_prompt: bool, variables: Mapping) -> str:
    """The text that `template` makes of `messages`. source: named in errors. variables: special tokens and further
    names for the template. Raises TypeError and ValueError for malformed messages, and CheckpointError for a template
    that fails."""
    values = {"messages": _messages(messages), "tools": _dicts("tools", tools),
              "documents": _dicts("documents", documents), "add_generation_prompt": bool(add_generation_prompt)}
    values = _plain("variables", variables) | values
    try:
        with spending(values) as budget:
            pieces, size = [], 0
            for piece in _compiled(template).generate(values):
                size = budget.allow(size + len(piece))
                pieces.append(piece)
            return "".join(pieces)
    except (Exception, MemoryError) as error:  # a template can raise anything
        raise CheckpointError(f"{source}: the chat template failed: {_said(error)}") from None


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    if len(template) > LONGEST_TEMPLATE:
        raise TooMuch(f"it must have at most {LONGEST_TEMPLATE} characters; got {len(template)}")
    return _environment().template(template)


def _said(error: BaseException) -> str:
    text = brief(error)
    return text if isinstance(error, (jinja2.TemplateError, TooMuch)) else f"{type(error).__name__}: {text}"


# ---- what a template sees --------------------------------------------------------------------------------------------


def _messages(messages: object) -> list[dict]:
    """The messages without keys that are None, and with the reasoning under each of its names."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise TypeError(f'messages must be a list of {{"role": ..., "content": ...}}; got {type(messages).__name__}')
    made = []
    for message in _plain("messages", [*messages]):
        if not isinstance(message, dict):
            raise TypeError(f'a message must be a mapping of "role" and "content"; got {message!r:.60}')
        message = {key: value for key, value in message.items() if value is not None}
        reasoning = next((message[key] for key in _REASONING if key in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        made.append(message)
    if not made:
        raise ValueError("messages must be at least one; got none")
    return made


def _dicts(name: str, values: object) -> list[dict] | None:
    if values is None:
        return None
    found = [*values] if isinstance(values, Iterable) and not isinstance(values, (str, bytes, Mapping)) else None
    if found is None or not all(isinstance(value, Mapping) for value in found):
        raise TypeError(f"{name} must be a list of dicts; got {brief(ValueError(repr(values)[:200]))}")
    return _plain(name, found)


def _plain(name: str, value: object) -> Any:
    try:
        return plain(value)
    except RecursionError:
        raise ValueError(f"{name} must not be nested without end; got {type(value).__name__}") from None


def plain(value: Any) -> Any:
    """A copy made of JSON's types, as in transformers: other objects have methods that no sandbox controls. Anything
    else becomes the text "<its type>"."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):  # an enum, or a NumPy scalar
        if isinstance(value, kind):
            return getattr(kind, f"__{kind.__name__}__")(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [plain(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, np.generic):
        return plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):  # a pydantic model
        return plain(value.model_dump())
    return f"<{type(value).__name__}>"


@functools.cache
def _environment() -> Environment:
    made = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = paid_filter("tojson", _tojson)
    made.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now, "dict": _Dict(),
                     "namespace": _Namespace}
    return made


class _Generation(Extension):
    """{% generation %} marks the assistant's text for training; here its body is ordinary text."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller):
        return caller()


class _Dict:
    """A dict without the attributes of its class."""

    def __call__(self, *args, **kwargs):
        return dict(*args, **kwargs)

    def fromkeys(self, *args, **kwargs):
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """A namespace that refuses names with a leading underscore. It is mutable, so it cannot be written out: a list of
    it could grow after it was measured."""

    def __init__(*args, **kwargs):  # `self` may be a variable
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name, value):
        _Namespace._check(name)
        super().__setitem__(name, value)

    def __repr__(self):
        return "<Namespace>"

    @staticmethod
    def _check(name):
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace's names must not start with _; got {name!r}")


def raise_exception(message):
    raise jinja2.TemplateError(message)


def strftime_now(format):   # the name of transformers' argument
    return datetime.now().strftime(format)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
