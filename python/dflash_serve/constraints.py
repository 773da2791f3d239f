"""What an answer must be: OpenAI's response_format and vLLM's structured_outputs, as fields of `GenerationParams`."""

import json
import re
from typing import Any

from .errors import ApiError
from .fields import LONGEST_GRAMMAR, Asked, ResponseFormat, StructuredOutputs

_ANY_OBJECT: dict[str, Any] = {"type": "object"}


def field_of(asked: Asked) -> str:
    """The field that restricts the answer, if one does."""
    return "response_format" if asked.structured_outputs is None else "structured_outputs"


def constraint(asked: Asked) -> dict[str, Any]:
    """At most one of json_schema and regex, by name. Raises ApiError."""
    schema = None if asked.response_format is None else _schema(asked.response_format)
    if asked.structured_outputs is None:
        found = {} if schema is None else {"json_schema": schema}
    elif schema is not None:
        raise ApiError(400, "response_format must be left out where structured_outputs is given", "response_format")
    else:
        found = _of_vllm(asked.structured_outputs)
    for text in found.values():
        if (size := len(text if isinstance(text, str) else json.dumps(text))) > LONGEST_GRAMMAR:
            name = field_of(asked)
            raise ApiError(400, f"{name} must have at most {LONGEST_GRAMMAR:,} characters; got {size:,}", name)
    return found


def _schema(form: ResponseFormat) -> dict[str, Any] | None:
    if form.json_schema is not None and form.type != "json_schema":
        raise ApiError(400, f"response_format.json_schema must be left out where type is {form.type!r}",
                       "response_format.json_schema")
    if form.type == "text":
        return None
    if form.type == "json_object":
        return _ANY_OBJECT
    if form.json_schema is None:
        raise ApiError(400, "response_format.json_schema must be given", "response_format.json_schema")
    return form.json_schema.schema_


def _of_vllm(given: StructuredOutputs) -> dict[str, Any]:
    kinds = {"json": given.json_, "regex": given.regex, "choice": given.choice,
             "json_object": given.json_object or None}
    named = [name for name, value in kinds.items() if value is not None]
    if len(named) != 1:
        raise ApiError(400, f"structured_outputs must have one of {', '.join(kinds)}; got "
                       f"{' and '.join(named) or 'none'}", "structured_outputs")
    if given.choice is not None:
        return {"regex": "|".join(map(re.escape, given.choice))}
    if given.regex is not None:
        return {"regex": given.regex}
    return {"json_schema": _ANY_OBJECT if given.json_ is None else given.json_}
