"""Replies of /v1/chat/completions."""

from collections.abc import Iterator

from dflash_decode import Chunk, Completion

from .fields import ChatAsked
from .replies import (
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatReply,
    ToolCall,
    Usage,
    head,
)
from .texts import chat_logprobs
from .tools import Call, CallReader


class ChatReplies:
    """calls: whether calls of tools are read out of the text."""

    def __init__(self, asked: ChatAsked, model: str, calls: bool):
        self._count = asked.choices
        self._head = head("chatcmpl", "chat.completion.chunk" if asked.stream else "chat.completion", model)
        most = 1 if asked.parallel_tool_calls is False else None
        self._readers = [CallReader(most) if calls else None for _ in range(self._count)]

    def whole(self, found: list[Completion], usage: Usage) -> str:
        return ChatReply(**self._head, choices=[self._choice(i, each) for i, each in enumerate(found)],
                         usage=usage).text()

    def _choice(self, index: int, found: Completion) -> ChatChoice:
        text, calls = self._read(index, found.text, True)
        message = ChatMessage(role="assistant", content=text)
        if calls:
            message.content = text or None
            message.tool_calls = [_call(call) for call in calls]
        return ChatChoice(index=index, message=message, logprobs=chat_logprobs(found.logprobs),
                          finish_reason=self._reason(index, found), stop_reason=found.stop_reason)

    def opening(self) -> Iterator[str]:
        for index in range(self._count):
            yield self._delta(index, ChatMessage(role="assistant", content=""), None)

    def piece(self, index: int, chunk: Chunk) -> Iterator[str]:
        found, reader = chunk.completion, self._readers[index]
        before = reader.count if reader else 0
        text, calls = self._read(index, chunk.text, found is not None)
        logprobs = chat_logprobs(chunk.logprobs)
        if text or (logprobs and logprobs.content):
            yield self._delta(index, ChatMessage(content=text), logprobs)
        if calls:
            yield self._delta(index, ChatMessage(tool_calls=[_call(call, before + i) for i, call in enumerate(calls)]),
                              None)
        if found is not None:
            yield self._delta(index, ChatMessage(), None, found)

    def ending(self, usage: Usage) -> str:
        return ChatChunk(**self._head, choices=[], usage=usage).text()

    def _read(self, index: int, text: str, last: bool) -> tuple[str, list[Call]]:
        reader = self._readers[index]
        if reader is None:
            return text, []
        said, calls = reader.push(text)
        rest, more = reader.flush() if last else ("", [])
        return said + rest, calls + more

    def _reason(self, index: int, found: Completion) -> str:
        reader = self._readers[index]
        return "tool_calls" if reader and reader.count and found.finish_reason == "stop" else found.finish_reason

    def _delta(self, index: int, delta: ChatMessage, logprobs: ChatLogprobs | None,
               found: Completion | None = None) -> str:
        choice = ChatDelta(index=index, delta=delta, logprobs=logprobs, finish_reason=None)
        if found is not None:
            choice.finish_reason, choice.stop_reason = self._reason(index, found), found.stop_reason
        return ChatChunk(**self._head, choices=[choice]).text()


def _call(call: Call, index: int | None = None) -> ToolCall:
    made = ToolCall(id=call.id, type="function", function=CalledFunction(name=call.name, arguments=call.arguments))
    if index is not None:
        made.index = index
    return made
