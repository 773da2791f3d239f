"""Steps on a CPU: drafts where they pay, verifies what is worth it, and keeps the drafter's context for later."""

import json
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

import torch

from .costs import pass_size, pass_sizes, remembered
from .forecast import Forecast
from .lookup import Draft
from .measure import identity, measure
from .model.drafter import Drafter
from .packed import Block, ContextStage, DraftStage, Tables, VerifyStage, bits_of
from .policy import FixedWidths, Outlook, Policy
from .requests import Features, Live
from .runner import Committed, Runner, Setting, bucket, buckets, taken
from .step import Prefill
from .verify import GreedyVerifier, Memory, verifier_for
from .widths import WidthPolicy, draft_widths

if TYPE_CHECKING:
    import numpy as np

_CONTEXT_ROWS = 256  # of the longest pass that writes the drafter's context
_LONGEST = 16  # tokens of a block whose drafts are looked up: a drafter's have as many as it was trained for
_KEPT_ROWS = 1024  # whose features a request keeps at most before they are written
# What policies know of a drafter, for the next decoder that it works in.
_LEARNED: weakref.WeakKeyDictionary[Drafter, dict[str, WidthPolicy]] = weakref.WeakKeyDictionary()


class PackedRunner(Runner):
    """policy: FixedWidths, or None for a WidthPolicy with costs that are measured before the first step."""

    def __init__(self, setting: Setting, policy: Policy | None = None):
        super().__init__(setting)
        self.policy = policy if setting.drafter else FixedWidths(1)
        self.tables: dict[tuple[str, int], Tables] = {}
        self.verifies: dict[tuple[int, int, int, type[GreedyVerifier]], VerifyStage] = {}
        self.drafts: dict[tuple[int, int], DraftStage] = {}
        self.contexts: dict[int, ContextStage] = {}
        self.layers = setting.drafter.target_layer_ids if setting.drafter else ()
        self.longest = setting.width if isinstance(self.policy, FixedWidths) else max(setting.width, _LONGEST)
        self.memory_of_logits = Memory(bucket(setting.max_batch) * self.longest, setting.target.device)
        self.recording = 0.0  # seconds, of the last verify pass that was recorded
        self.passes = 0.0  # seconds of all passes so far
        self.lost: dict[tuple[int, int, type[GreedyVerifier]], float] = {}  # seconds, by what was not recorded

    # ---- passes, made when they are first needed ----

    def make_prefill(self, rows: int) -> Prefill:
        s = self.setting
        return Prefill(s.target, None, s.target_kv, (), rows, s.pool.page_size, s.max_pages, None, self.layers)

    def tables_of(self, use: str, batch: int) -> Tables:
        key = use, batch
        if key not in self.tables:
            self.tables[key] = Tables(batch, self.setting.max_pages)
        return self.tables[key]

    def verify_stage(self, requests: int, rows: int, width: int, kind: type[GreedyVerifier]) -> VerifyStage:
        """rows: that the blocks fill if they are packed; 0: every block has `width` rows. One request has passes of its
        own, whose attention is shared out by splits of its context."""
        s = self.setting
        batch = self.batch_of(requests) if rows else bucket(requests)
        packed = pass_size(rows, self.most_rows(batch)) if rows else 0
        key = batch, packed, width, kind
        if key not in self.verifies:
            self.verifies[key] = VerifyStage(s.target, self.layers, s.target_kv, batch, width, packed or None,
                                             self.tables_of("verify", batch),
                                             kind(s.target, batch, width, s.rule, self.memory_of_logits))
        return self.verifies[key]

    def batch_of(self, requests: int) -> int:
        """Of a packed pass."""
        return bucket(self.setting.max_batch) if requests > 1 else 1

    def most_rows(self, batch: int) -> int:
        """Of a packed pass: blocks as long as the drafter's, or some longer ones."""
        return max(self.longest, batch * self.setting.width)

    def rows_to_run(self, requests: int, rows: int, kind: type[GreedyVerifier]) -> int:
        """The rows of the packed pass that is to serve so many. To record one takes as long as several steps: a longer
        one that is recorded serves until the time that this has lost would have paid for a recording."""
        batch, width = self.batch_of(requests), self.longest
        rows = pass_size(rows, self.most_rows(batch))
        recorded = [known[1] for known in self.verifies if known == (batch, known[1], width, kind) and known[1] >= rows]
        if not recorded or rows in recorded or not isinstance(self.policy, WidthPolicy):
            return rows
        verify, key, longer = self.policy.costs.verify, (batch, rows, kind), min(recorded)
        self.lost[key] = self.lost.get(key, 0.0) + verify(longer) - verify(rows)
        return longer if self.lost[key] < self.recording else rows

    def draft_stage(self, requests: int, width: int) -> DraftStage:
        s, batch = self.setting, bucket(requests)
        if (batch, width) not in self.drafts:
            drafter, tables = cast(Drafter, s.drafter), self.tables_of("draft", batch)
            self.drafts[batch, width] = DraftStage(drafter, s.draft_kv, batch, width, tables, s.pool.page_size,
                                                     s.target.max_context)
        return self.drafts[batch, width]

    def context_stage(self, rows: int) -> ContextStage:
        size = bucket(rows)
        if size not in self.contexts:
            drafter = cast(Drafter, self.setting.drafter)
            self.contexts[size] = ContextStage(drafter, self.setting.draft_kv, size)
        return self.contexts[size]

    # ---- a step ----

    def decode(self, active: list[Live]) -> list[Committed]:
        kind = verifier_for([live.sampling for live in active])
        policy = self.chosen_policy()
        outlooks = [live.outlook for live in active]
        n = len(active)
        drafts = [Draft()] * n if policy.rests(n) else self.chosen_drafts(active, outlooks, policy, kind)
        blocks = [self.block(live, [live.anchor, *draft.tokens]) for live, draft in zip(active, drafts, strict=True)]
        widths = [len(block.tokens) for block in blocks]
        stage = self.verify_stage(n, self.rows_to_run(n, sum(widths), kind), self.longest, kind) if kind.packs \
            else self.verify_stage(n, 0, max(widths), kind)
        stage.tables.set([live.pages for live in active])
        stage.verifier.seat(active)
        starts = stage.fill(blocks)
        verified = self.timed(stage.work, policy, "verify", stage.rows, stage)
        counts = verified.commit_lens.tolist()
        if self.setting.drafter:
            for live, block, start, count in zip(active, blocks, starts, counts, strict=False):
                self.keep(live, block.context, stage.features[start:start + count])
        policy.verified(outlooks, drafts, [max(count - 1, 0) for count in counts[:n]])
        committed = taken(active, verified, widths, stage.hidden, starts)
        stage.verifier.seat(())
        return committed

    def chosen_drafts(self, active: Sequence[Live], outlooks: Sequence[Outlook], policy: Policy,
                      kind: type[GreedyVerifier]) -> list[Draft]:
        """The drafts of each request that are worth verifying."""
        started, passes, n = time.perf_counter(), self.passes, len(active)
        most = self.longest if kind.packs and n * self.longest <= self.most_rows(self.batch_of(n)) else \
            self.setting.width
        limits = [min(live.room, most) for live in active]
        found = [live.looked_up(limit - 1) for live, limit in zip(
            active, limits, strict=True)] if policy.looks_up(n) else [Draft()] * n
        drafts = policy.choose(outlooks, self.draft(active, policy, found), found, limits, not kind.packs)
        policy.took("choice", n, time.perf_counter() - started - (self.passes - passes))
        return drafts

    def draft(self, active: Sequence[Live], policy: Policy, found: Sequence[Draft]) -> list[Draft]:
        """The drafter's drafts for each request; none where none are made."""
        drafts = [Draft()] * len(active)
        if self.setting.drafter and self.setting.width > 1:
            whole = isinstance(policy, FixedWidths)
            open_ended = [i for i, live in enumerate(active) if live.room > 1 or whole and not live.wary]
            paying, width = policy.to_draft([active[i].outlook for i in open_ended], [found[i] for i in open_ended])
            if chosen := [open_ended[i] for i in paying]:
                requests = [active[i] for i in chosen]
                kept = [(live, kept) for live in requests for kept in live.features]
                rows = sum(len(k.rows) for _, k in kept)
                decoded = sum(len(k.rows) for live, k in kept if k.position >= len(live.request.prompt))
                seconds = self.write_context(requests)
                if seconds is not None and decoded:  # a prompt's part comes once
                    policy.took("context", len(requests), seconds * decoded / rows)
                stage = self.draft_stage(len(requests), width)
                stage.tables.set([live.pages for live in requests])
                made = self.timed(stage.work, policy, "draft", width * len(requests), lambda: stage(
                    [live.anchor for live in requests], [live.context for live in requests]))
                for i, ids, sure in zip(chosen, *made, strict=True):
                    drafts[i] = Draft(ids, sure)
        return drafts

    def block(self, live: Live, tokens: list[int]) -> Block:
        return Block(tokens, live.context, live.pages, self.setting.pool.page_size)

    def timed(self, work, policy: Policy, part: str, size: int, call: Callable):
        """call(), whose seconds the policy is told, but for the call that records."""
        records, started = work.records, time.perf_counter()
        found = call()
        seconds = time.perf_counter() - started
        self.passes += seconds
        if not records:
            policy.took(part, size, seconds)
        elif part == "verify":
            self.recording = seconds
        return found

    # ---- the drafter's context ----

    def read(self, live: Live, position: int, features: torch.Tensor) -> None:
        self.keep(live, position, bits_of(features))

    def keep(self, live: Live, position: int, features: "np.ndarray") -> None:
        """K/V of these features are written when the request drafts next, if it does."""
        if self.setting.drafter and len(features):
            live.features.append(Features(position, features.copy()))
            if position + len(features) - live.features[0].position > _KEPT_ROWS:
                self.write_context([live])

    def settle(self, live: Live) -> None:
        self.write_context([live])

    def write_context(self, requests: Sequence[Live]) -> float | None:
        """Returns the seconds that it took; None if a pass was recorded."""
        started, records = time.perf_counter(), False
        passes: list[list[np.ndarray]] = []  # parts of at most so many rows together
        positions: list[int] = []
        slots: list[int] = []
        rows = 0
        for live in requests:
            for position, states in live.features:
                block = Block(range(len(states)), position, live.pages, self.setting.pool.page_size)
                positions += block.positions()
                slots += block.slots()
                at = 0
                while at < len(states):
                    if rows % _CONTEXT_ROWS == 0:
                        passes.append([])
                    count = min(len(states) - at, _CONTEXT_ROWS - rows % _CONTEXT_ROWS)
                    passes[-1].append(states[at:at + count])
                    at, rows = at + count, rows + count
        for i, features in enumerate(passes):
            part = slice(i * _CONTEXT_ROWS, (i + 1) * _CONTEXT_ROWS)
            stage = self.context_stage(len(positions[part]))
            records |= stage.work.records
            stage(features, positions[part], slots[part])
        for live in requests:
            live.features = []
        seconds = time.perf_counter() - started
        self.passes += seconds
        return None if records else seconds

    # ---- what a step costs ----

    @property
    def forecast(self) -> Forecast | None:
        return self.policy.forecast if isinstance(self.policy, WidthPolicy) else None

    def ready(self) -> None:
        """Measures what steps cost, unless that is known, and records the passes that most steps take: for one request,
        and for a batch that fills and empties."""
        s, fixed = self.setting, isinstance(self.chosen_policy(), FixedWidths)
        for requests in sorted({1, s.max_batch}):
            most = self.longest if fixed or requests == 1 else min(2, s.width)  # rows of a request
            counts = range(most, most * requests + 1, most) if fixed else range(1, most * requests + 1)
            for rows in sorted({pass_size(count, self.most_rows(self.batch_of(requests))) for count in counts}):
                _record(self.verify_stage(requests, rows, self.longest, GreedyVerifier))
            if s.drafter:
                self.record_drafts(requests)
                for rows in buckets(most * requests):
                    self.record_context(rows)

    def chosen_policy(self) -> Policy:
        if self.policy is None:
            s, drafter, known_by = self.setting, cast(Drafter, self.setting.drafter), identity(self)
            learned = _LEARNED.setdefault(drafter, {})
            key, most = json.dumps(known_by), self.most_rows(bucket(s.max_batch))
            if key not in learned:
                learned[key] = WidthPolicy(s.width, remembered(known_by, partial(measure, self)),
                                           partial(pass_size, most=most), drafter.calibration)
            self.policy = learned[key]
        return self.policy

    def warm_up(self, kinds: Iterable[type[GreedyVerifier]], prompt_lens: Iterable[int]) -> None:
        """Runs every size of every pass once, which records it."""
        super().warm_up(kinds, prompt_lens)
        self.chosen_policy()
        s, stages = self.setting, []
        for kind in kinds:
            for batch in buckets(s.max_batch):
                if kind.packs and batch in (1, bucket(s.max_batch)):
                    stages += [self.verify_stage(batch, rows, self.longest, kind)
                               for rows in pass_sizes(self.most_rows(batch))]
                if not kind.packs:
                    stages += [self.verify_stage(batch, 0, width, kind) for width in range(1, s.width + 1)]
        for stage in stages:  # what cannot be recorded allocates at its first run
            stage.fill([])
            stage()
        for batch in buckets(s.max_batch) if s.drafter else ():
            self.record_drafts(batch)
        for rows in buckets(_CONTEXT_ROWS) if s.drafter else ():
            self.record_context(rows)

    def record_drafts(self, requests: int) -> None:
        """Records drafts of every length."""
        s, fixed = self.setting, isinstance(self.policy, FixedWidths)
        for width in [s.width] if fixed else draft_widths(s.width):
            if width > 1 and (stage := self.draft_stage(requests, width)).work.records:
                stage([], [])

    def record_context(self, rows: int) -> None:
        if (stage := self.context_stage(rows)).work.records:
            stage((), (), ())

    def unseat(self) -> None:
        for tables in self.tables.values():
            tables.set([])
        for stage in self.verifies.values():
            stage.verifier.seat(())


def _record(stage: VerifyStage) -> None:
    """Records a pass, without requests, unless it is recorded."""
    if stage.work.records:
        stage.fill([])
        stage()
