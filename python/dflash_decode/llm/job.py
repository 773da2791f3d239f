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
    is called in the engine's thread and does not raise. whole: the answer is not read before its end, so all of it is
    one chunk. ended: nothing that comes now is part of the answer.
    """

    def __init__(self, prompt: Sequence[int], plan: Plan, choice: int, tokenizer: Tokenizer,
                 deliver: Callable[[Chunk | GenerationError], None], whole: bool = False):
        self.request = Request(id(self), prompt, plan.max_tokens, plan.stop_tokens, plan.samplings[choice],
                               plan.logprobs, plan.cache_salt)
        self.choice, self.deliver, self.ended = choice, deliver, False
        self._tokenizer, self._own_stops = tokenizer, plan.own_stops
        self._whole, self._at_once = whole, whole and not plan.stops
        self._new: list[int] = []  # that are no text yet
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
        if event.tokens and not self._first:
            self._first = time.perf_counter() - self._started
        if not self.ended:
            self._new += event.tokens
            if self._logprobs is not None:
                self._logprobs += (each.spelt(self._tokenizer.token_text) for each in event.logprobs)
        if event.finish or self._new and not self._at_once:
            self._speak(event)
        return self.ended

    def _speak(self, event: Event) -> None:
        text, count = self._text.push(self._new)
        told, tokens, self._new = len(self._tokens), self._new[:count], []
        self._tokens += tokens
        if self._logprobs is not None:
            del self._logprobs[len(self._tokens):]
        self.ended = self.ended or isinstance(self._text.reason, str)
        if event.finish:
            text += self._text.flush()
        self._pieces.append(text)
        if self._whole and event.finish:
            text, tokens, told = "".join(self._pieces), self._tokens, 0
        if event.finish or not self._whole:
            self.deliver(Chunk(self.choice, text, tokens, None if self._logprobs is None else self._logprobs[told:],
                               self._completion(event) if event.finish else None))

    def fail(self, why: str) -> None:
        """Ends the answer with an error, once."""
        if not self._failed:
            self._failed = True
            self.deliver(GenerationError(why))

    def _completion(self, event: Event) -> Completion:
        reason = self._text.reason
        finish = str(event.finish) if reason is None else "stop"
        if reason in self._own_stops:  # it ended by itself, which engines report as no reason
            reason = None
        return Completion("".join(self._pieces), self._tokens, finish, reason, self._logprobs, event.seed,
                          list(self.request.prompt), event.acceptance_lengths, event.widths, self._first,
                          time.perf_counter() - self._started, event.cached_tokens)
