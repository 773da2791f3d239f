"""Answers as they arrive, for whoever waits in a thread or in an event loop."""

import asyncio
import queue
from collections.abc import AsyncIterator, Iterator, Sequence

from ..checkpoint.tokenizer import Tokenizer
from .engine import Engine
from .job import Job
from .outputs import Chunk, Completion, GenerationError
from .params import Plan


class _Answers:
    """The n answers to one prompt. owner: is kept alive while they arrive, as its end would end the engine. whole: each
    is one chunk."""

    def __init__(self, owner: object, engine: Engine, tokenizer: Tokenizer, prompt: Sequence[int], plan: Plan,
                 whole: bool = False):
        self._owner, self._engine, self._left = owner, engine, len(plan.samplings)
        self._done: dict[int, Completion] = {}
        self._jobs = [Job(prompt, plan, i, tokenizer, self._deliver, whole) for i in range(self._left)]
        for job in self._jobs:
            engine.submit(job)

    def cancel(self) -> None:
        """Ends what still runs. The answers that were cut off have the finish reason "cancelled"."""
        if self._left:
            for job in self._jobs:
                self._engine.cancel(job)

    def _deliver(self, chunk: Chunk | GenerationError) -> None:
        raise NotImplementedError

    def _seen(self, chunk: Chunk | GenerationError) -> Chunk:
        if isinstance(chunk, GenerationError):
            self.cancel()
            self._left = 0
            raise chunk
        if chunk.completion is not None:
            self._done[chunk.choice] = chunk.completion
            self._left -= 1
        return chunk

    def _result(self) -> Completion:
        if len(self._done) < len(self._jobs):
            raise GenerationError("the answer was not finished")
        first, *others = (self._done[i] for i in range(len(self._jobs)))
        first.others = others
        return first


class Stream(_Answers):
    """Iterates over the chunks of the answers to one prompt."""

    def __init__(self, owner: object, engine: Engine, tokenizer: Tokenizer, prompt: Sequence[int], plan: Plan,
                 whole: bool = False):
        self._chunks: queue.SimpleQueue[Chunk | GenerationError] = queue.SimpleQueue()
        super().__init__(owner, engine, tokenizer, prompt, plan, whole)

    def _deliver(self, chunk: Chunk | GenerationError) -> None:
        self._chunks.put(chunk)

    def __iter__(self) -> Iterator[Chunk]:
        while self._left:
            yield self._seen(self._chunks.get())

    def result(self) -> Completion:
        """Waits for the answers. Raises GenerationError."""
        for _ in self:
            pass
        return self._result()


class Texts(Iterator[str]):
    """The texts of a stream. A generator would not do: closing one that has not started runs nothing."""

    def __init__(self, stream: Stream):
        self._stream, self._pieces = stream, (chunk.text for chunk in stream if chunk.text)

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except BaseException:  # of an interrupt, too, after which a traceback may keep this object
            self._stream.cancel()
            raise

    def close(self) -> None:
        """Ends the request."""
        self._pieces.close()
        self._stream.cancel()

    __del__ = close


class AsyncStream(_Answers):
    """Iterates over the chunks of the answers to one prompt, in the event loop that it was made in."""

    def __init__(self, owner: object, engine: Engine, tokenizer: Tokenizer, prompt: Sequence[int], plan: Plan,
                 whole: bool = False):
        self._chunks: asyncio.Queue[Chunk | GenerationError] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        super().__init__(owner, engine, tokenizer, prompt, plan, whole)

    def _deliver(self, chunk: Chunk | GenerationError) -> None:
        try:
            self._loop.call_soon_threadsafe(self._chunks.put_nowait, chunk)
        except RuntimeError:  # the loop is closed: nobody listens
            self.cancel()

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        while self._left:
            yield self._seen(await self._chunks.get())

    async def result(self) -> Completion:
        """Waits for the answers. Raises GenerationError."""
        async for _ in self:
            pass
        return self._result()
