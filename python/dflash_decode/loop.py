"""DFlash decoding of a ragged batch, greedy or sampled, and lossless.

A request has a context, whose K/V are in its pages, and an anchor, its last token. A step drafts a block after every
anchor, verifies it with the target, and commits the accepted drafts plus one token of the target. Baseline decoding is
the same loop with no drafter. A sampled request gives the output of baseline sampling with the same seed.
"""

import math
import time
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch

from dflash_kernels import PagedKV

from .arguments import check_target, choice, of_type, whole
from .checkpoint.errors import warn
from .choices import Rule, SampleFrom
from .forecast import Forecast
from .inputs import said, shown
from .kv import OutOfPages, PagePool, default_pages
from .logprobs import TokenLogprobs, logprobs_of
from .model import Target
from .model.drafter import Drafter
from .packed_runner import PackedRunner
from .past_widths import PastWidths
from .policy import FixedWidths
from .requests import Event, Live, Request, admit
from .runner import GraphRunner, Runner, Setting
from .sampling import SamplingParams
from .verify import VERIFIERS, GreedyVerifier, first_token, verifier_for

_PORTION = 16  # rows of a prompt, or a multiple, that run beside a step


class Decoder:
    """Decodes requests in a batch, one block per step.

    block_size: Q, the tokens of every block, at most the drafter's block size. By default the loop chooses for each
        request and step how many drafts are worth verifying, if any, by measured time and the drafter's confidence
        (widths.py), unless drafts are sampled; on a CPU a request's own text has drafts too (lookup.py). The output
        does not change.
    max_batch: the number of requests decoded concurrently.
    num_pages: by default enough for max_batch requests of max_context tokens, and on a GPU at most what fits in 0.8 of
        its free memory. A request takes its pages when it starts, for all the tokens that it can write.
    sample_from: how drafts of sampled requests are chosen. "greedy": the most likely tokens; for a given seed the
        output is that of baseline sampling, token by token. "request": sampled with the request's settings, which keeps
        the target's distribution but not the output of a seed.
    rule: how sampled drafts are accepted, "token" or "block", as for verify_sample.
    reuse: a request that begins with the tokens of an earlier one starts from its K/V, in whole pages, where the
        target's K/V depend on the tokens alone (target.reuses). The output does not change. Pages of requests that have
        ended are kept until others need them; on a CPU, where they take memory, at most as many as one context has.
    """

    def __init__(self, target: Target, drafter: Drafter | None = None, *, block_size: int | None = None,
                 max_batch: int = 8, max_context: int | None = None, num_pages: int | None = None, page_size: int = 64,
                 prefill_rows: int = 256, sample_from: str = "greedy", rule: str = "token",
                 reuse: bool = True):
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
        of_type("Decoder", "reuse", reuse, bool, "True or False")
        self.target, self.drafter, self.max_batch = target, drafter if self.width > 1 else None, max_batch
        draw = sample_from == SampleFrom.request
        self.max_context = min(target.max_context, max_context)
        pages = -(-self.max_context // page_size)
        models = [model for model in (target, self.drafter) if model]
        if num_pages is None:
            num_pages = default_pages(max_batch * pages, page_size, [model.cache for model in models])
        self.reuse = reuse and getattr(target, "reuses", False)
        most_kept = 0 if not self.reuse else pages if target.device.type == "cpu" else num_pages
        self.pool = PagePool(num_pages, page_size, most_kept)
        self.prefill_rows = prefill_rows
        self.kv: tuple[Sequence[PagedKV], Sequence[PagedKV]] = (
            target.cache.allocate(self.pool.num_pages, page_size),
            self.drafter.cache.allocate(self.pool.num_pages, page_size) if self.drafter else ())
        setting = Setting(target, self.drafter, *self.kv, self.pool, min(pages, self.pool.num_pages), max_batch,
                          self.width, prefill_rows, rule, draw)
        self.runner = _runner(setting, block_size is None and not draw)
        # All requests in order of arrival. What runs, what waits and who owns a page follow from this list alone,
        # so an interrupt cannot leave two records that disagree.
        self._requests: list[Live] = []
        self._warned = False
        self._firsts: dict[type[GreedyVerifier], GreedyVerifier] = {}
        self._row_seconds, self._step_seconds = 0.0, math.inf  # of a prompt's row and of a step, lately

    @property
    def _active(self) -> list[Live]:
        return [live for live in self._requests if live.emitted and not live.finish]

    @property
    def forecast(self) -> Forecast | None:
        """What the choice of widths expected of its steps so far and what they brought; None where another rule
        chooses them."""
        return self.runner.forecast

    def ready(self) -> None:
        """On a CPU, measures what a step costs on this machine, unless it is known, and records the passes that most
        steps take: part of a second for a small target. Without it the first steps do so."""
        self.runner.ready()

    def warm_up(
        self, prompt_lens: Iterable[int] | None = None, samplings: Iterable[SamplingParams] | None = None
    ) -> None:
        """Allocates, compiles and records prefill passes and steps of every size, before the first request.

        Nothing is decoded, and no output changes. prompt_lens: lengths of the expected prompts, in tokens; by default
        all that fit. samplings: settings of the expected requests; by default all kinds.
        """
        kinds: Iterable[type[GreedyVerifier]] = VERIFIERS
        if samplings is not None:
            kinds = {verifier_for([sampling]) for sampling in samplings}
        lens = range(1, min(self.prefill_rows, self.max_context - 1) + 1) if prompt_lens is None else set(prompt_lens)
        device = self.target.device
        for kind in kinds:
            if kind not in self._firsts:
                first = kind(self.target, 1, 1)
                row = torch.zeros((1, self.target.hidden_size), dtype=self.target.dtype, device=device)
                first.run(row, torch.zeros((1, 1), dtype=torch.int64, device=device),
                          torch.zeros(1, dtype=torch.int32, device=device))
                self._firsts[kind] = first
        self.runner.warm_up(kinds, lens)

    def submit(self, request: Request) -> None:
        """Queues a request. Raises ValueError or TypeError, and allocates nothing, if the request can never run."""
        live = admit(request, self.target.vocab_size, self.max_context, self.pool)
        if any(other.request.id == request.id for other in self._requests if not other.finish):
            raise ValueError(f"request {shown(request.id)}: id must be new; got that of a request that still runs")
        self._warn_of_length(len(live.request.prompt) + live.limit)
        self._requests.append(live)

    def _warn_of_length(self, tokens: int) -> None:
        """Says once that a request goes beyond the drafter's trained context: the output is right, the drafts are not.
        """
        trained = self.drafter.config.max_position_embeddings if self.drafter else None
        if trained is not None and tokens > trained and not self._warned:
            self._warned = True
            warn(f"Decoder: drafts beyond {trained} tokens, the drafter's max_position_embeddings, are seldom taken; "
                 f"got {tokens} tokens of prompt and answer")

    def cancel(self, request_id: Hashable) -> None:
        """Ends the request before the next step; does nothing if it has ended."""
        for live in self._requests:
            if live.request.id == request_id and not live.finish:
                live.ended = "cancelled"

    def step(self) -> list[Event]:
        """Starts the requests that fit, decodes one block for each running request, and returns the new events: none
        while there are only prompts, of which a step runs one pass.

        A request whose grammar raises ends with an error event. After any other exception, including an interrupt, the
        next step continues where this one stopped, but events that were ready to be returned can be lost.
        """
        self._start()
        if active := self._active:
            started = time.perf_counter()
            for live, tokens, width, rows in self.runner.decode(active):
                live.take(tokens, width, self._logprobs(live, tokens, rows))
            self._step_seconds = time.perf_counter() - started
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
        self.pool.forget()
        self.runner.unseat()

    def _start(self) -> None:
        """Gives pages to the requests that fit, and runs their prompts: one pass while nothing is decoded, so that who
        comes or goes is heard of after it, otherwise as many tokens as take no longer than a step."""
        rows = None
        while live := self._next_to_start():
            if self._active:
                rows = self._rows_beside_a_step() if rows is None else rows
                if rows < _PORTION:
                    break
            done, started = live.prefilled, time.perf_counter()
            try:
                last = self.runner.prefill(live, self.prefill_rows if rows is None else rows)
                if last is not None:
                    self._take_first(live, last)
                if self.target.device.type == "cuda":  # a launch returns before its work is done
                    torch.cuda.current_stream(self.target.device).synchronize()
            except Exception as error:  # it would fail every later step
                live.fail(said(error))
                raise
            ran = max(live.prefilled - done, 1)
            if not self.runner.recorded:
                self._row_seconds = (time.perf_counter() - started) / ran
            if not self._active:
                break
            rows = None if rows is None else (rows - ran) // _PORTION * _PORTION

    def _next_to_start(self) -> Live | None:
        """The first request that has pages, or gets them now, and whose prompt is not done."""
        pool, unfinished = self.pool, [live for live in self._requests if not live.finish]
        for live in unfinished[:self.max_batch]:
            if not live.pages:
                pool.keep(other.pages for other in unfinished)
                # The last token is run in any case: what follows it is drawn from its hidden state.
                begun = pool.prefixes.find(live.request.prompt[:-1], live.request.cache_salt)
                live.prefilled = live.cached = len(begun) * pool.page_size  # set anew until there are pages
                try:
                    live.pages = pool.allocate(len(live.request.prompt) + live.limit, begun)
                except OutOfPages:
                    return None
            if not live.emitted:
                return live
        return None

    def _rows_beside_a_step(self) -> int:
        fit = self._step_seconds / self._row_seconds if self._row_seconds else math.inf
        return max(int(min(fit, self.prefill_rows)) // _PORTION, 1) * _PORTION

    def _take_first(self, live: Live, row: torch.Tensor) -> None:
        kind = verifier_for([live.sampling])
        if kind not in self._firsts:
            self._firsts[kind] = kind(self.target, 1, 1)
        token = first_token(self._firsts[kind], live, row)
        if not live.finish:
            live.take([token], 1, self._logprobs(live, [token], row))
            self._remember(live)

    def _remember(self, live: Live) -> None:
        """Lets later requests begin with the pages of this one."""
        if self.reuse and live.emitted:
            self.runner.settle(live)
            self.pool.prefixes.add(live.cache, live.pages, live.request.cache_salt)

    def _logprobs(self, live: Live, tokens: list[int], rows: torch.Tensor | None) -> list[TokenLogprobs]:
        most = live.request.logprobs
        return [] if most is None or rows is None else logprobs_of(self.target, rows, tokens, most)

    def _tell(self) -> list[Event]:
        """Returns the new events, and removes the requests that have ended."""
        news = [live for live in self._requests if live.has_news]
        events = [live.event() for live in news]
        for live in news:
            if live.finish and not live.error:
                self._remember(live)
        if any(event.finish for event in events):  # first: an interrupt must not leave a removed request with pages
            self.runner.unseat()
            self.pool.keep(live.pages for live in self._requests if not live.finish)
        for live in news:
            live.told = live.emitted
            if live.finish:
                self._requests.remove(live)
        return events


def _runner(setting: Setting, adapts: bool) -> Runner:
    if setting.target.device.type == "cpu" and getattr(setting.target, "packs", False) and not setting.draw:
        return PackedRunner(setting, None if adapts else FixedWidths(setting.width))
    return GraphRunner(setting, PastWidths(setting.width) if adapts and setting.drafter else None)
