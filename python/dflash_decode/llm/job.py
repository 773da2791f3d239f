"""One answer in the making: what the engine decodes, and what becomes of its events."""

import time
from collections.abc import Callable, Sequence

from ..checkpoint.tokenizer import Tokenizer
from ..logprobs import TokenLogprobs
from ..requests import Event, Request
from .outputs import Chunk, Completion, GenerationError
from .params import Plan
from .text import AnswerText


class Job:
    """An answer to a prompt.

    choice: its number. deliver: is given each Chunk, the last with a completion, or a GenerationError as the last; it
    is called in the engine's thread and does not raise. ended: nothing that comes now is part of the answer.
    """

    def __init__(self, prompt: Sequence[int], plan: Plan, choice: int, tokenizer: Tokenizer,
                 deliver: Callable[[Chunk | GenerationError], None]):
        self.request = Request(id(self), prompt, plan.max_tokens, plan.stop_tokens, plan.samplings[choice],
                               plan.logprobs)
        self.choice, self.deliver, self.ended = choice, deliver, False
        self._text = AnswerText(tokenizer, plan.stops, plan.stop_tokens, plan.min_tokens)
        self._pieces: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] | None = None if plan.logprobs is None else []
        self._started, self._first, self._failed = time.perf_counter(), 0.0, False

    def take(self, event: Event) -> bool:
        """Takes an event of the decoder. Returns whether the answer has ended before the request."""
        if event.error is not None:
            self.fail(event.error.removeprefix(f"request {event.id}: "))
        if self._failed:
            return True
        new = () if self.ended else event.tokens
        if new and not self._tokens:
            self._first = time.perf_counter() - self._started
        text, count = self._text.push(new)
        tokens, logprobs = list(new[:count]), list(event.logprobs[:count])
        self._tokens += tokens
        if self._logprobs is not None:
            self._logprobs += logprobs
        self.ended = self.ended or isinstance(self._text.reason, str)
        if event.finish:
            text += self._text.flush()
        self._pieces.append(text)
        if text or tokens or event.finish:
            self.deliver(Chunk(self.choice, text, tokens, None if self._logprobs is None else logprobs,
                               self._completion(event) if event.finish else None))
        return self.ended

    def fail(self, why: str) -> None:
        """Ends the answer with an error, once."""
        if not self._failed:
            self._failed = True
            self.deliver(GenerationError(why))

    def _completion(self, event: Event) -> Completion:
        reason = self._text.reason
        finish = str(event.finish) if reason is None else "stop"
        return Completion("".join(self._pieces), self._tokens, finish, reason, self._logprobs, event.seed,
                          list(self.request.prompt), event.acceptance_lengths, event.widths, self._first,
                          time.perf_counter() - self._started)
