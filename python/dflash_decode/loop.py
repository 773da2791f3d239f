"""DFlash decoding of a ragged batch, greedy or sampled, and lossless.

Each request is a context, whose K/V are in its pages, and an anchor, its last token. A step drafts a block after every
anchor, lets the target check it, and commits what the target would have written itself plus one token of its own.
Plain decoding is the same loop with no drafter; a sampled request's text is plain sampling's with the same seed.
"""

from collections import deque
from collections.abc import Hashable, Iterable, Iterator

from .arguments import check_target, choice, of_type, whole
from .draft import Drafter
from .kv import OutOfPages, PagePool
from .requests import Event, Live, Request, admit
from .step import Prefill, Step, block_width, prefill_size
from .targets import Target
from .verify import first_token, verifier_for

RULES, SAMPLE_FROM = ("token", "block"), ("greedy", "request")


class Decoder:
    """block_size: Q, at most the drafter's own. None: that, and on a CPU less where many requests run at once, which
    changes no text (and is left where drafts are drawn). max_batch: requests decoded together. num_pages: default
    room for max_batch requests of max_context tokens. Pages are taken when a request starts, for all that it may write.

    sample_from: how drafts of sampled requests are made. "greedy": the likeliest, and the text for a seed is plain
    sampling's token by token. "request": drawn as the request draws, which keeps the target's law, not the text, and
    rule says how they are accepted: "token" or "block", as for verify_sample."""

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
        choice("Decoder", "sample_from", sample_from, SAMPLE_FROM)
        choice("Decoder", "rule", rule, RULES)
        self.target, self.drafter, self.max_batch = target, drafter if self.width > 1 else None, max_batch
        self.draw, self.rule = sample_from == "request", rule
        self.adapts = block_size is None and self.width > 1 and not self.draw
        self.max_context = min(target.max_context, max_context)
        pages = -(-self.max_context // page_size)
        self.pool = PagePool(max_batch * pages if num_pages is None else num_pages, page_size)
        self.max_pages, self.prefill_rows = min(pages, self.pool.num_pages), prefill_rows
        self.kv = [model.cache.allocate(self.pool.num_pages, page_size) if model else ()
                   for model in (target, self.drafter)]
        self._waiting, self._active, self._left = deque(), [], []
        self._steps, self._prefills, self._firsts, self._seated = {}, {}, {}, None

    def submit(self, request: Request) -> None:
        """Queues a request. Raises ValueError if it can never run; nothing is allocated then."""
        if any(live.request.id == request.id for live in (*self._waiting, *self._active)):
            raise ValueError(f"request {request.id!r}: id must be new; got that of a request that still runs")
        self._waiting.append(admit(request, self.target.vocab_size, self.max_context, self.pool))

    def cancel(self, request_id: Hashable) -> None:
        """The request leaves before the next step."""
        for live in [live for live in (*self._waiting, *self._active) if live.request.id == request_id]:
            self._left.append(self._leave(live, [], "cancelled"))

    def step(self) -> list[Event]:
        """Starts whatever fits, then decodes one block for everyone."""
        events, self._left = self._left, []
        while self._waiting and len(self._active) < self.max_batch:
            try:
                events.append(self._start(live := self._waiting[0]))
            except OutOfPages:
                break
            except BaseException:  # with no anchor it would fail every later step
                self._leave(live, [], "error")
                raise
        return events + self._decode() if self._active else events

    def stream(self, requests: Iterable[Request | None]) -> Iterator[Event]:
        """Pulls requests as there is room (None: no news yet) and yields events until all are done. Closing it frees
        every page. A request that cannot run gives an error event and disturbs nobody."""
        source, more = iter(requests), True
        try:
            while more or self._waiting or self._active or self._left:
                while more and len(self._waiting) + len(self._active) < self.max_batch:
                    more = (request := next(source, self)) is not self
                    if not more or request is None:
                        break
                    try:
                        self.submit(request)
                    except (TypeError, ValueError) as error:
                        yield Event(request.id, [], "error", error=str(error))
                yield from self.step()
        finally:
            self.close()

    def close(self) -> None:
        """Every request leaves; every page is free again."""
        for live in (*self._waiting, *self._active):
            self._leave(live, [], "cancelled")
        self._left = []

    def _start(self, live: Live) -> Event:
        prompt, pool = live.request.prompt, self.pool
        live.pages = pool.allocate(len(prompt) + live.limit)
        self._active.append(self._waiting.popleft())
        table = pool.table_row(live.pages, self.max_pages)
        while live.context < len(prompt):
            n = prefill_size(len(prompt) - live.context, self.prefill_rows, self.target.device)
            if n not in self._prefills:
                self._prefills[n] = Prefill(self.target, self.drafter, *self.kv, n, pool.page_size, self.max_pages)
            chunk = list(prompt[live.context:live.context + n])
            row = self._prefills[n](chunk, live.context, table)
            live.context += len(chunk)
        kind = verifier_for([live])
        if kind not in self._firsts:
            self._firsts[kind] = kind(self.target, 1, 1)
        return self._emit(live, [first_token(self._firsts[kind], live, row)])

    def _decode(self) -> list[Event]:
        batch, active = 1 << (len(self._active) - 1).bit_length(), list(self._active)
        kind = verifier_for(active)
        if (batch, kind) not in self._steps:
            width = block_width(self.width, batch, self.target.device) if self.adapts else self.width
            options = self.pool.page_size, self.max_pages, kind(self.target, batch, width, self.rule), self.draw
            self._steps[batch, kind] = Step(self.target, self.drafter, *self.kv, batch, width, *options)
        step = self._steps[batch, kind]
        step.fill([(r.anchor, r.context, min(step.width, r.limit - r.emitted)) for r in active])
        if self._seated != (step, active):
            step.seat([self.pool.table_row(r.pages, self.max_pages) for r in active], active)
            self._seated = (step, active)
        verified, events = step(), []
        for live, count, tokens in zip(active, verified.commit_lens.tolist(), verified.tokens.tolist(), strict=False):
            kept = next((i + 1 for i in range(count) if tokens[i] in live.request.stop_tokens), count)
            live.context += kept
            live.acceptance.append(kept)
            events.append(self._emit(live, tokens[:kept]))
        return events

    def _emit(self, live: Live, tokens: list[int]) -> Event:
        live.text += tokens
        why = "stop" if tokens[-1] in live.request.stop_tokens else "length" if live.emitted >= live.limit else None
        return self._leave(live, tokens, why) if why else live.event(tokens)

    def _leave(self, live: Live, tokens: list[int], why: str) -> Event:
        (self._active if live in self._active else self._waiting).remove(live)
        self.pool.free(live.pages)
        return live.event(tokens, why)
