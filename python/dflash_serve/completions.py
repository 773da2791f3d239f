"""Replies of /v1/completions."""

from collections.abc import Iterator

from dflash_decode import Chunk, Completion

from .fields import CompletionAsked
from .replies import CompletionChoice, CompletionLogprobs, CompletionReply, Usage, head
from .texts import completion_logprobs


class CompletionReplies:
    def __init__(self, asked: CompletionAsked, model: str):
        self._head = head("cmpl", "text_completion", model)
        self._offsets = [0] * (asked.prompts * asked.choices)

    def whole(self, found: list[Completion], usage: Usage) -> str:
        choices = [self._choice(i, each.text, completion_logprobs(each.logprobs, 0), each)
                   for i, each in enumerate(found)]
        return CompletionReply(**self._head, choices=choices, usage=usage).text()

    def opening(self) -> Iterator[str]:
        yield from ()

    def piece(self, index: int, chunk: Chunk) -> Iterator[str]:
        logprobs = completion_logprobs(chunk.logprobs, self._offsets[index])
        self._offsets[index] += sum(map(len, logprobs.tokens)) if logprobs else 0
        if chunk.text or chunk.completion or (logprobs and logprobs.tokens):
            choice = self._choice(index, chunk.text, logprobs, chunk.completion)
            yield CompletionReply(**self._head, choices=[choice]).text()

    def ending(self, usage: Usage) -> str:
        return CompletionReply(**self._head, choices=[], usage=usage).text()

    def _choice(self, index: int, text: str, logprobs: CompletionLogprobs | None,
                found: Completion | None) -> CompletionChoice:
        made = CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=None)
        if found is not None:
            made.finish_reason, made.stop_reason = found.finish_reason, found.stop_reason
        return made
