"""Requests, with OpenAI's field names, and vLLM's for what `GenerationParams` has beside them."""

from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    field_validator,
)

from dflash_decode.inputs import shown

MOST_CHOICES, MOST_LOGPROBS = 128, 20  # OpenAI's
# Of stop strings, which are looked for in every token's text, and of what is compiled, which takes time and stack.
MOST_STOPS, LONGEST_STOP, LONGEST_REGEX, LONGEST_GRAMMAR = 128, 1024, 1 << 13, 1 << 16
_T = TypeVar("_T")
# Errors end with the first one: a long body of wrong elements would have millions.
Many: TypeAlias = Annotated[list[_T], Field(fail_fast=True)]
Tokens: TypeAlias = Many[int]
Stop: TypeAlias = Annotated[str, Field(max_length=LONGEST_STOP)]


def _of_tokens(given: dict[str, Any]) -> dict[int, float]:
    found: dict[int, float] = {}
    for token, bias in given.items():
        if not (token.isascii() and token.isdigit()) or isinstance(bias, bool) or not isinstance(bias, int | float):
            raise ValueError(f"must have numbers, and token ids as their names; got {shown(token)}: {shown(bias)}")
        found[int(token)] = bias
    return found


Biases: TypeAlias = Annotated[dict[str, Any], AfterValidator(_of_tokens), WithJsonSchema(
    {"type": "object", "additionalProperties": {"type": "number"}})]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class StreamOptions(_Fields):
    include_usage: bool | None = None


class JsonSchema(_Fields):
    name: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Fields):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(_Fields):
    """vLLM's: exactly one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: Annotated[str, Field(max_length=LONGEST_REGEX)] | None = None
    choice: Annotated[Many[str], Field(min_length=1)] | None = None
    json_object: bool | None = None


class Part(_Fields):
    """A piece of a message."""

    type: str
    text: str | None = None


class Message(_Fields):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Many[Part] | None = None
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: Many[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class Asked(_Fields):
    """The fields that both endpoints have."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: Stop | Annotated[Many[Stop], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Tokens | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Biases | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    cache_salt: str | None = None

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def prompts(self) -> int:
        return 1

    @property
    def reports_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatAsked(Asked):
    """POST /v1/chat/completions"""

    messages: Annotated[Many[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: Many[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @field_validator("tools")
    @classmethod
    def _tools_are_functions(cls, tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        for i, tool in enumerate(tools or []):
            function = tool.get("function")
            if tool.get("type") != "function" or not isinstance(function, dict) or not isinstance(
                    function.get("name"), str):
                raise ValueError('must have functions {"type": "function", "function": {"name": ...}}; got another '
                                 f"thing at {i}")
        return tools


class CompletionAsked(Asked):
    """POST /v1/completions"""

    prompt: str | Tokens | Many[str] | Many[Tokens]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _prompts_in_a_word(cls, value: object, read: ValidatorFunctionWrapHandler) -> Any:
        try:
            return read(value)
        except ValidationError:  # it would speak of one of the four kinds
            raise ValueError(f"must be a text, token ids, or a list of either; got {shown(value)}") from None

    @property
    def prompts(self) -> int:
        return len(self.prompt) if self.has_many else 1

    @property
    def has_many(self) -> bool:
        return isinstance(self.prompt, list) and bool(self.prompt) and not isinstance(self.prompt[0], int)
