"""Runs prompts and steps of the requests that the loop gives it, on passes that it makes when they are first needed."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dflash_kernels import PagedKV, Verified

from .forecast import Forecast
from .kv import PagePool
from .model import Target
from .model.drafter import Drafter
from .past_widths import PastWidths
from .requests import Live
from .step import Prefill, Step, prefill_sizes
from .verify import GreedyVerifier, verifier_for


class Committed(NamedTuple):
    """What a step found for a request: the tokens to commit, the tokens of its block that were verified, and the
    target's hidden states (n, H) that the n tokens were chosen from, until the next step; None unless the request asks
    for log probabilities."""

    live: Live
    tokens: list[int]
    width: int
    rows: torch.Tensor | None


@dataclass
class Setting:
    """What a decoder's passes work with. width: the most tokens of a block. rule: as for verify_sample. draw: drafts of
    sampled requests are sampled."""

    target: Target
    drafter: Drafter | None
    target_kv: Sequence[PagedKV]
    draft_kv: Sequence[PagedKV]
    pool: PagePool
    max_pages: int
    max_batch: int
    width: int
    prefill_rows: int
    rule: str = "token"
    draw: bool = False


def bucket(requests: int) -> int:
    """The batch size for this many requests: one recorded step for each power of two."""
    return 1 << (requests - 1).bit_length()


def buckets(most: int) -> list[int]:
    """The batch sizes of up to `most` requests."""
    return [1 << i for i in range(bucket(most).bit_length())]


def taken(active: Sequence[Live], verified: Verified, widths: Sequence[int], rows: torch.Tensor,
          starts: Sequence[int]) -> list[Committed]:
    """What each request commits: the accepted tokens and the target's, up to a stop token. rows: the hidden states of
    all blocks. starts: where each begins."""
    found = zip(active, verified.commit_lens.tolist(), verified.tokens.tolist(), widths, starts, strict=False)
    return [_committed(live, tokens[:count], width, rows, start)
            for live, count, tokens, width, start in found if not live.finish]


def _committed(live: Live, tokens: list[int], width: int, rows: torch.Tensor, start: int) -> Committed:
    count, stops = len(tokens), frozenset(live.request.stop_tokens)  # which it is, once submitted
    if not stops.isdisjoint(tokens):
        count = next(i for i, token in enumerate(tokens, 1) if token in stops)
    asks = live.request.logprobs is not None
    return Committed(live, tokens[:count], width, rows[start:start + count] if asks else None)


class Runner:
    """Prompts, in passes that are shared by all requests."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.prefills: dict[int, Prefill] = {}
        self.recorded = False  # whether the last prompt's pass was made for it
        # Passes and steps run one after another, so their graphs can share scratch memory.
        cuda = setting.target.device.type == "cuda"
        self.memory = torch.cuda.graph_pool_handle() if cuda else None

    def prefill(self, live: Live, most: int) -> torch.Tensor | None:
        """Runs at most `most` more tokens of the prompt. Returns the last token's hidden state (1, H) at its end."""
        s, prompt = self.setting, live.request.prompt
        done = min(live.prefilled, len(prompt) - 1)  # where an interrupt came before the first token
        most = min(most, s.prefill_rows)
        if s.target.device.type == "cuda" and most < s.prefill_rows:
            most = 1 << most.bit_length() - 1  # of few sizes, which warm_up has recorded
        rows = prefill_sizes(len(prompt) - done, most, s.target.device)[0]
        if rows not in self.prefills:
            self.prefills[rows] = self.make_prefill(rows)
        work, chunk = self.prefills[rows], prompt[done:done + rows]
        self.recorded = work.work.records
        last = work(chunk, done, s.pool.table_row(live.pages, s.max_pages))
        self.read(live, done, work.features[:len(chunk)])
        live.prefilled = done + len(chunk)
        return last if live.prefilled == len(prompt) else None

    def make_prefill(self, rows: int) -> Prefill:
        s = self.setting
        return Prefill(s.target, s.drafter, s.target_kv, s.draft_kv, rows, s.pool.page_size, s.max_pages, self.memory)

    def read(self, live: Live, position: int, features: torch.Tensor) -> None:
        """Features of the prompt's tokens from this position on, whose K/V the drafter has already."""

    def settle(self, live: Live) -> None:
        """Writes what the drafter's pages still lack of the committed tokens."""

    def warm_up(self, kinds: Iterable[type[GreedyVerifier]], prompt_lens: Iterable[int]) -> None:
        """Makes and records what prompts of these lengths and requests of these kinds need."""
        s, device = self.setting, self.setting.target.device
        nothing = s.pool.table_row([], s.max_pages)
        sizes = {size for n in prompt_lens for size in prefill_sizes(n, s.prefill_rows, device)}
        if device.type == "cuda" and sizes:  # beside a step a part of a prompt has the largest of these that fits
            sizes |= {1 << power for power in range(4, (max(sizes) - 1).bit_length())}
        for rows in sorted(sizes):
            if rows not in self.prefills:
                prefill = self.make_prefill(rows)
                prefill([], 0, nothing)
                self.prefills[rows] = prefill

    @property
    def forecast(self) -> Forecast | None:
        """What the choice of widths expected; None where another rule chooses them."""
        return None

    def ready(self) -> None:
        """Finds out what the first step needs to know."""

    def decode(self, active: list[Live]) -> list[Committed]:
        """One step of these requests."""
        raise NotImplementedError

    def unseat(self) -> None:
        """Clears the requests of the last step, so that nothing keeps those that have ended."""


class GraphRunner(Runner):
    """Whole steps of one width, each one graph: on a GPU, where nothing waits for the host; for targets whose passes do
    not pack blocks; and for drafts that are sampled.

    past: chooses each step's width; None: all have the setting's.
    """

    def __init__(self, setting: Setting, past: PastWidths | None = None):
        super().__init__(setting)
        self.past = past if setting.drafter else None
        self.steps: dict[tuple[int, int, type[GreedyVerifier]], Step] = {}
        self.seated: tuple[Step, list[Live]] | None = None

    def make_step(self, batch: int, width: int, kind: type[GreedyVerifier]) -> Step:
        s = self.setting
        return Step(s.target, s.drafter, s.target_kv, s.draft_kv, batch, width, s.pool.page_size, s.max_pages,
                    kind(s.target, batch, width, s.rule), s.draw, self.memory)

    def warm_up(self, kinds: Iterable[type[GreedyVerifier]], prompt_lens: Iterable[int]) -> None:
        super().warm_up(kinds, prompt_lens)
        for kind in kinds:
            for batch in buckets(self.setting.max_batch):
                for width in self.past.steps() if self.past else (self.setting.width,):
                    if (batch, width, kind) not in self.steps:
                        step = self.make_step(batch, width, kind)
                        step()
                        self.steps[batch, width, kind] = step

    def decode(self, active: list[Live]) -> list[Committed]:
        kind = verifier_for([live.sampling for live in active])
        batch = bucket(len(active))
        key = batch, self.past.step(batch) if self.past else self.setting.width, kind
        known = key in self.steps
        if not known:
            self.steps[key] = self.make_step(*key)
        step = self.steps[key]
        widths = [min(step.width, live.room) for live in active]
        step.fill([(live.anchor, live.context, n) for live, n in zip(active, widths, strict=True)])
        if self.seated != (step, active):
            self.unseat()
            tables = [self.setting.pool.table_row(live.pages, self.setting.max_pages) for live in active]
            step.seat(tables, active)
            self.seated = (step, active)
        started = time.perf_counter()
        verified = step()
        accepted = verified.accept_lens.tolist()[:len(active)]
        if self.past and known:  # the first call compiles or records
            self.past.observe(batch, step.width, time.perf_counter() - started, accepted)
        return taken(active, verified, widths, step.hidden, range(0, batch * step.width, step.width))

    def unseat(self) -> None:
        seated, self.seated = self.seated, None
        if seated:
            seated[0].verifier.seat(())
