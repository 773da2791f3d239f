"""The description of the API, /openapi.json."""

from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from dflash_kernels import __version__

from .errors import ErrorReply
from .fields import ChatAsked, CompletionAsked
from .replies import ChatReply, CompletionReply, Model, Models

_REF = "#/components/schemas/{model}"
_WRONG = (400, 401, 404, 413, 415, 429, 500, 503)


def _content(model: type[BaseModel]) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": {"$ref": _REF.format(model=model.__name__)}}}}


def _operation(summary: str, reply: type[BaseModel], body: type[BaseModel] | None = None) -> dict[str, Any]:
    made = _content(reply)
    if body is not None:
        made["content"]["text/event-stream"] = {"schema": {}}  # pieces of it
    responses = {"200": {"description": "the answer"} | made} | {
        str(code): {"description": "an error"} | _content(ErrorReply) for code in _WRONG}
    return {"summary": summary, "responses": responses} | (
        {} if body is None else {"requestBody": {"required": True} | _content(body)})


@cache
def openapi() -> dict[str, Any]:
    bodies, replies = (ChatAsked, CompletionAsked), (ChatReply, CompletionReply, Model, Models, ErrorReply)
    _, schemas = models_json_schema([*((model, "validation") for model in bodies),
                                     *((model, "serialization") for model in replies)], ref_template=_REF)
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    text = {"200": {"description": "the answer", "content": {"text/plain": {"schema": {"type": "string"}}}}}
    return {
        "openapi": "3.1.0", "info": {"title": "dflash-kernels serve", "version": __version__},
        "paths": {
            "/v1/chat/completions": {"post": _operation("Answers messages.", ChatReply, ChatAsked)},
            "/v1/completions": {"post": _operation("Continues prompts.", CompletionReply, CompletionAsked)},
            "/v1/models": {"get": _operation("The model.", Models)},
            "/v1/models/{name}": {"get": _operation("The model.", Model) | {"parameters": [name]}},
            "/health": {"get": {"summary": "Whether the server answers.", "responses": {
                "200": {"description": "it does", "content": {"application/json": {"schema": {"type": "object"}}}}}}},
            "/metrics": {"get": {"summary": "Prometheus' metrics.", "responses": text}},
        },
        "components": {"schemas": schemas["$defs"]},
    }
