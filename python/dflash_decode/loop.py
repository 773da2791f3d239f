"""DFlash decoding of a ragged batch, greedy or sampled, and lossless.

A request has a context, whose K/V are in its pages, and an anchor, its last token. A step drafts a block after every
anchor, verifies it with the target, and commits the accepted drafts plus one token of the target. Baseline decoding is
the same loop with no drafter. A sampled request gives the output of baseline sampling with the same seed.
"""

import itertools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch

from dflash_kernels import PagedKV

from .arguments import check_target, choice, of_type, whole
from .choices import Rule, SampleFrom
from .inputs import said, shown
from .kv import OutOfPages, PagePool, default_pages
from .model import Target
from .model.drafter import Drafter
from .requests import Event, Live, Request, admit
from .sampling import SamplingParams
from .step import Prefill, Step, block_width, prefill_sizes
from .verify import VERIFIERS, GreedyVerifier, first_token, verifier_for


class Decoder:
    """Decodes requests in a batch, one block per step.

    block_size: Q, at most the drafter's block size, which is the default. By default a CPU uses smaller blocks while
        many requests run concurrently, unless drafts are sampled; the output does not change.
    max_batch: the number of requests decoded concurrently.
    num_pages: by default enough for max_batch requests of max_context tokens, and on a GPU at most what fits in 0.8 of
        its free memory. A request takes its pages when it starts, for all the tokens that it can write.
    sample_from: how drafts of sampled requests are chosen. "greedy": the most likely tokens; for a given seed the
        output is that of baseline sampling, token by token. "request": sampled with the request's settings, which keeps
        the target's distribution but not the output of a seed.
    rule: how sampled drafts are accepted, "token" or "block", as for verify_sample.
    """

    def __init__(self, target: Target, drafter: Drafter | None = None, *, block_size: int | None = None,
                 max_batch: int = 8, max_context: int | None = None, num_pages: int | None = None, page_size: int = 64,
                 prefill_rows: int = 256, sample_from: str = "greedy", rule: str = "token"):
        check_target("Decoder", target)
        of_type("Decoder", "drafter", drafter, (Drafter, type(None)), "a Drafter or None")
        block_size = None if block_size is None else whole("Decoder", "block_size", block_size, 1)
        self.width = 1 if drafter is None else drafter.block_size if block_size is None else block_size
        if drafter and not 1 <= self.width <= drafter.block_size:
            most = drafter.block_size
            raise ValueError(f"Decoder: block_size must be between 1 and the drafter's {most}; got {block_size}")
        max_batch, prefill_rows, page_size, max_context = (whole("Decoder", name, value, 1) for name, value in (
            ("max_batch", max_batch), ("prefill_rows", prefill_rows), ("page_size", page_size),
            ("max_context", target.max_context if max_context is None else max_context)))
        num_pages = None if num_pages is None else whole("Decoder", "num_pages", num_pages, 1)
        choice("Decoder", "sample_from", sample_from, SampleFrom)
        choice("Decoder", "rule", rule, Rule)
        self.target, self.drafter, self.max_batch = target, drafter if self.width > 1 else None, max_batch
        self.draw, self.rule = sample_from == SampleFrom.request, rule
        self.adapts = block_size is None and self.width > 1 and not self.draw
        self.max_context = min(target.max_context, max_context)
        pages = -(-self.max_context // page_size)
        models = [model for model in (target, self.drafter) if model]
        self.pool = PagePool(default_pages(max_batch * pages, page_size, [model.cache for model in models])
                             if num_pages is None else num_pages, page_size)
        self.max_pages, self.prefill_rows = min(pages, self.pool.num_pages), prefill_rows
        self.kv: tuple[Sequence[PagedKV], Sequence[PagedKV]] = (
            target.cache.allocate(self.pool.num_pages, page_size),
            self.drafter.cache.allocate(self.pool.num_pages, page_size) if self.drafter else ())
        # All requests in order of arrival. What runs, what waits and who owns a page follow from this list alone,
        # so an interrupt cannot leave two records that disagree.
        self._requests: list[Live] = []
        self._steps: dict[tuple[int, type[GreedyVerifier]], Step] = {}
        self._prefills: dict[int, Prefill] = {}
        self._firsts: dict[type[GreedyVerifier], GreedyVerifier] = {}
        self._seated: tuple[Step, list[Live]] | None = None
        # Passes and steps run one after another, so their graphs can share scratch memory.
        self._memory = torch.cuda.graph_pool_handle() if target.device.type == "cuda" else None

    @property
    def _active(self) -> list[Live]:
        unfinished = (live for live in self._requests if not live.finish)
        return list(itertools.takewhile(lambda live: live.emitted, unfinished))

    def warm_up(
        self, prompt_lens: Iterable[int] | None = None, samplings: Iterable[SamplingParams] | None = None
    ) -> None:
        """Allocates, compiles and records prefill passes and steps for every batch size, before the first request.

        Nothing is decoded, and no output changes. prompt_lens: lengths of the expected prompts, in tokens; by default
        all that fit. samplings: settings of the expected requests; by default all kinds.
        """
        kinds: Iterable[type[GreedyVerifier]] = VERIFIERS
        if samplings is not None:
            kinds = {verifier_for([sampling]) for sampling in samplings}
        lens = range(1, min(self.prefill_rows, self.max_context - 1) + 1) if prompt_lens is None else set(prompt_lens)
        device, nothing = self.target.device, self.pool.table_row([], self.max_pages)
        for rows in sorted({size for n in lens for size in prefill_sizes(n, self.prefill_rows, device)}):
            if rows not in self._prefills:
                prefill = self._make_prefill(rows)
                prefill([], 0, nothing)
                self._prefills[rows] = prefill
        batches = [1 << i for i in range(_bucket(self.max_batch).bit_length())]
        for kind, batch in itertools.product(kinds, batches):
            if kind not in self._firsts:
                first = kind(self.target, 1, 1)
                row = torch.zeros((1, self.target.hidden_size), dtype=self.target.dtype, device=device)
                first.run(row, torch.zeros((1, 1), dtype=torch.int64, device=device),
                          torch.zeros(1, dtype=torch.int32, device=device))
                self._firsts[kind] = first
            if (batch, kind) not in self._steps:
                step = self._make_step(batch, kind)
                step()
                self._steps[batch, kind] = step

    def submit(self, request: Request) -> None:
        """Queues a request. Raises ValueError or TypeError, and allocates nothing, if the request can never run."""
        live = admit(request, self.target.vocab_size, self.max_context, self.pool)
        if any(other.request.id == request.id for other in self._requests if not other.finish):
            raise ValueError(f"request {shown(request.id)}: id must be new; got that of a request that still runs")
        self._requests.append(live)

    def cancel(self, request_id: Hashable) -> None:
        """Ends the request before the next step; does nothing if it has ended."""
        for live in self._requests:
            if live.request.id == request_id and not live.finish:
                live.ended = "cancelled"

    def step(self) -> list[Event]:
        """Starts the requests that fit, decodes one block for each running request, and returns the new events.

        A request whose grammar raises ends with an error event. After any other exception, including an interrupt, the
        next step continues where this one stopped, but events that were ready to be returned can be lost.
        """
        while len(active := self._active) < self.max_batch:
            live = next((live for live in self._requests if not live.emitted and not live.finish), None)
            if live is None:
                break
            try:
                self._start(live)
            except OutOfPages:
                break
            except Exception as error:  # it would fail every later step
                live.fail(said(error))
                raise
        if active:
            self._decode(active)
        return self._tell()

    def stream(self, requests: Iterable[Request | None]) -> Iterator[Event]:
        """Pulls requests while there is room (None: none at the moment) and yields events until all are done.

        Closing the generator frees every page. A request that cannot run, or whose grammar raises, gives an error event
        and does not affect the others; for an object that is no Request the event's id is None. If `requests` raises,
        all requests are dropped and the exception is raised here.
        """
        of_type("Decoder.stream", "requests", requests, Iterable, "an iterable of Requests")
        try:
            try:
                yield from self._answer(iter(requests))
            finally:
                self.close()
        finally:
            self.close()  # an interrupt can end the first call before it begins

    def _answer(self, source: Iterator[Request | None]) -> Iterator[Event]:
        more = True
        while more or self._requests:
            while more and sum(not live.finish for live in self._requests) < self.max_batch:
                more = (request := next(source, self)) is not self
                if not more or request is None:
                    break
                if refused := self._refusal(request):
                    yield refused
            yield from self.step()

    def _refusal(self, request: Any) -> Event | None:
        """Submits the request; returns an error event if it is refused."""
        try:
            self.submit(request)
            return None
        except (TypeError, ValueError) as error:
            why = str(error)
        except Exception as error:  # the caller's objects can raise anything when they are read
            why = said(error)
        return Event(request.id if isinstance(request, Request) else None, [], "error", error=why)

    def close(self) -> None:
        """Drops every request and frees every page."""
        self._requests.clear()
        self.pool.keep(())
        self._unseat()

    def _start(self, live: Live) -> None:
        prompt, pool = live.request.prompt, self.pool
        if not live.pages:
            pool.keep(other.pages for other in self._requests if not other.finish)
            live.pages = pool.allocate(len(prompt) + live.limit)
        table, done = pool.table_row(live.pages, self.max_pages), 0
        for size in prefill_sizes(len(prompt), self.prefill_rows, self.target.device):
            if size not in self._prefills:
                self._prefills[size] = self._make_prefill(size)
            chunk = prompt[done:done + size]
            row = self._prefills[size](chunk, done, table)
            done += len(chunk)
        kind = verifier_for([live.sampling])
        if kind not in self._firsts:
            self._firsts[kind] = kind(self.target, 1, 1)
        token = first_token(self._firsts[kind], live, row)
        if not live.finish:
            live.take([token])

    def _make_prefill(self, rows: int) -> Prefill:
        return Prefill(self.target, self.drafter, *self.kv, rows, self.pool.page_size, self.max_pages, self._memory)

    def _make_step(self, batch: int, kind: type[GreedyVerifier]) -> Step:
        width = block_width(self.width, batch, self.target.device) if self.adapts else self.width
        return Step(self.target, self.drafter, *self.kv, batch, width, self.pool.page_size, self.max_pages,
                    kind(self.target, batch, width, self.rule), self.draw, self._memory)

    def _decode(self, active: list[Live]) -> None:
        batch, kind = _bucket(len(active)), verifier_for([live.sampling for live in active])
        if (batch, kind) not in self._steps:
            self._steps[batch, kind] = self._make_step(batch, kind)
        step = self._steps[batch, kind]
        step.fill([(r.anchor, r.context, min(step.width, r.limit - r.emitted)) for r in active])
        if self._seated != (step, active):
            self._unseat()
            step.seat([self.pool.table_row(r.pages, self.max_pages) for r in active], active)
            self._seated = (step, active)
        verified = step()
        for live, count, tokens in zip(active, verified.commit_lens.tolist(), verified.tokens.tolist(), strict=False):
            if not live.finish:
                live.take(tokens[:next((i + 1 for i in range(count) if tokens[i] in live.request.stop_tokens), count)])

    def _tell(self) -> list[Event]:
        """Returns the new events, and removes the requests that have ended."""
        news = [live for live in self._requests if live.has_news]
        events = [live.event() for live in news]
        if any(event.finish for event in events):  # first: an interrupt must not leave a removed request with pages
            self._unseat()
            self.pool.keep(live.pages for live in self._requests if not live.finish)
        for live in news:
            live.told = live.emitted
            if live.finish:
                self._requests.remove(live)
        return events

    def _unseat(self) -> None:
        """Clears the requests of the last step, so that nothing keeps those that have ended."""
        seated, self._seated = self._seated, None
        if seated:
            seated[0].verifier.seat(())


def _bucket(requests: int) -> int:
    """The batch size for this many requests: one recorded step for each power of two."""
    return 1 << (requests - 1).bit_length()
