"""Lets requests in up to a limit, and follows their answers to the end, whoever listens."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from dflash_decode import LLM, Chunk, Completion, GenerationError, GenerationParams
from dflash_decode.llm.streams import AsyncStream

from .errors import ApiError
from .metrics import Metrics
from .reading import told
from .replies import PromptDetails, Usage


class Desk:
    """most: the answers, running and waiting, that there is room for."""

    def __init__(self, llm: LLM, metrics: Metrics, most: int):
        self.llm, self.metrics, self.most = llm, metrics, most
        self.taken, self._open = 0, set[Answers]()

    def admit(self, prompts: int, choices: int) -> "Answers":
        """Room for the answers to a request. Raises ApiError."""
        count = prompts * choices
        if count > self.most:
            room = f"the {self.most} answers that this server has room for"
            raise ApiError(400, f"n must be at most {room}; got {choices}", "n") if prompts == 1 else ApiError(
                400, f"prompt must have at most {self.most // choices} prompts, of {room}; got {prompts}", "prompt")
        if self.taken + count > self.most:
            raise ApiError(429, f"the server is busy: {self.taken} answers run or wait; try again", code="queue_full",
                           headers={"Retry-After": "1"})
        self.taken += count
        found = Answers(self, prompts, choices)
        self._open.add(found)
        return found

    def close(self, answers: "Answers") -> None:
        self._open.discard(answers)

    def stop(self) -> None:
        """Ends what still runs."""
        for answers in list(self._open):
            answers.end(ApiError(503, "the server stopped before the answer ended"))


class Answers:
    """The answers to the prompts of one request. Each keeps its place until the decoder has done with it."""

    def __init__(self, desk: Desk, prompts: int, choices: int):
        self._desk, self._choices, self._count = desk, choices, prompts * choices
        self._places = [choices] * prompts  # that each prompt's answers still have
        self._chunks: asyncio.Queue[tuple[int, Chunk] | ApiError] = asyncio.Queue()
        self._streams: list[AsyncStream] = []
        self._tasks: set[asyncio.Task[None]] = set()  # the event loop itself holds no task
        self._over = False
        self._usage = [0, 0, 0]  # tokens of prompts, of answers, and of the former those that were cached

    async def start(self, prompts: Sequence[list[int]], params: Sequence[GenerationParams],
                    restricts: str) -> None:
        """params: of each prompt. restricts: the field that restricts the answers, if any. Raises ApiError."""
        self._usage[0] = sum(map(len, prompts))
        for i, (prompt, how) in enumerate(zip(prompts, params, strict=True)):
            with told(restricts=restricts):
                stream = await self._desk.llm.asubmit(prompt, how)
            if self._over:  # by the server's end, which has freed the place
                return stream.cancel()
            self._streams.append(stream)
            task = asyncio.create_task(self._follow(i, stream))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _follow(self, i: int, stream: AsyncStream) -> None:
        metrics = self._desk.metrics
        try:
            async for chunk in stream:
                metrics.took(chunk)
                if chunk.completion is not None:
                    self._free(i, 1)
                self._chunks.put_nowait((i * self._choices + chunk.choice, chunk))
        except GenerationError as error:
            metrics.failed()
            self.end(ApiError(500, f"the answer could not be finished: {error}"))
        finally:
            self._free(i, self._places[i])

    def _free(self, i: int, count: int) -> None:
        self._places[i] -= count
        self._desk.taken -= count
        if not any(self._places):
            self._desk.close(self)

    def end(self, error: ApiError) -> None:
        """Ends what runs, and tells it whoever listens."""
        self._chunks.put_nowait(error)
        self.leave()

    def leave(self) -> None:
        """Ends what runs, as nobody listens; frees what never started."""
        self._over = True
        for stream in self._streams:
            stream.cancel()
        for i in range(len(self._streams), len(self._places)):
            self._free(i, self._places[i])

    async def __aiter__(self) -> AsyncIterator[tuple[int, Chunk]]:
        """The chunks, with the numbers of their answers. Raises ApiError."""
        left = self._count
        while left:
            found = await self._chunks.get()
            if isinstance(found, ApiError):
                raise found
            self._usage[1] += len(found[1].token_ids)
            if (completion := found[1].completion) is not None:
                left -= 1
                if found[1].choice == 0:  # of a prompt's answers the others find what the first has left
                    self._usage[2] += completion.cached_tokens
            yield found

    async def all(self) -> list[Completion]:
        """The whole answers. Raises ApiError."""
        found = {index: chunk.completion async for index, chunk in self if chunk.completion is not None}
        return [found[index] for index in sorted(found)]

    @property
    def usage(self) -> Usage:
        """The tokens so far."""
        prompt, answers, cached = self._usage
        return Usage(prompt_tokens=prompt, completion_tokens=answers, total_tokens=prompt + answers,
                     prompt_tokens_details=PromptDetails(cached_tokens=cached))
