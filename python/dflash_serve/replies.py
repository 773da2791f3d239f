"""Answers, with OpenAI's field names. What is set is written, null too."""

import secrets
import time
from typing import Any, Literal

from pydantic import BaseModel, Field


class PromptDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CalledFunction(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    index: int = 0  # in streams alone
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(BaseModel):
    """A message, or what a chunk adds to one."""

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    tool_calls: list[ToolCall] = Field(default_factory=list)


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: str | int | None


class ChatDelta(BaseModel):
    index: int
    delta: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None = None


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None = None


class _Reply(BaseModel):
    id: str
    object: str
    created: int
    model: str

    def text(self) -> str:
        return self.model_dump_json(exclude_unset=True)


class ChatReply(_Reply):
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(_Reply):
    choices: list[ChatDelta]
    usage: Usage | None = None


class CompletionReply(_Reply):
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "dflash-kernels"
    max_model_len: int


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


def head(kind: str, name: str, model: str) -> dict[str, Any]:
    """The fields that all replies to one request share. kind: the id's prefix. name: the reply's kind."""
    return {"id": f"{kind}-{secrets.token_hex(16)}", "object": name, "created": int(time.time()), "model": model}
