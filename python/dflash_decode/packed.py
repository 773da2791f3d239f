"""The stages of a step whose blocks have several lengths, each recorded as a graph of its own.

    draft    (B, Q)     the drafter's block of every request that drafts
    verify   (T,)       the tokens that are worth verifying, packed request after request
    context  (C,)       K/V for the drafter, of committed tokens, when a request drafts next

Between two stages the host reads what the first found. So these stages are for a CPU; a GPU replays a whole Step.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from dflash_kernels import PagedKV, Verified

from .kv import NO_PAGE
from .model import Target
from .model.drafter import Drafter
from .step import Recorded
from .verify import GreedyVerifier


class Block(NamedTuple):
    """Tokens of one request, the anchor first, after `context` tokens; the request's pages, and the page size."""

    tokens: Sequence[int]
    context: int
    pages: Sequence[int]
    page_size: int

    def positions(self) -> range:
        return range(self.context, self.context + len(self.tokens))

    def slots(self) -> list[int]:
        size = self.page_size
        return [self.pages[p // size] * size + p % size for p in self.positions()]


class Tables:
    """The page tables of a batch, which all its stages read."""

    def __init__(self, batch: int, max_pages: int):
        self.rows = torch.full((batch, max_pages), NO_PAGE, dtype=torch.int32)
        self._now: list[list[int]] = []

    def set(self, pages: Sequence[list[int]]) -> None:
        """Rows for the requests with these pages, in order; the rest of the batch is empty."""
        if len(self._now) == len(pages) and all(a is b for a, b in zip(self._now, pages, strict=True)):
            return
        self._now = []  # an interrupt leaves it as if never set
        self.rows.fill_(NO_PAGE)
        for row, owned in zip(self.rows, pages, strict=False):
            row[:len(owned)] = torch.tensor(owned, dtype=torch.int32)
        self._now = list(pages)


def _fill(into: torch.Tensor, values: Sequence[int], rest: int = 0) -> None:
    flat = into.view(-1)
    flat.copy_(torch.tensor([*values, *[rest] * (len(flat) - len(values))], dtype=into.dtype))


class DraftStage:
    """Drafts a block for each of `batch` requests."""

    def __init__(self, drafter: Drafter, kv: Sequence[PagedKV], batch: int, width: int, tables: Tables,
                 page_size: int):
        self.tables, self.width = tables, width
        self.work = Recorded(drafter.device, drafter)
        self.draft = drafter.make_draft(batch, width, kv, page_size)
        self.context_lens, self.block_lens = (torch.zeros(batch, dtype=torch.int32) for _ in range(2))

    def __call__(self, anchors: Sequence[int], contexts: Sequence[int]) -> tuple[list[list[int]], list[list[float]]]:
        """Drafts and their confidences, for each request."""
        n = len(anchors)
        _fill(self.draft.anchors, anchors)
        _fill(self.context_lens, contexts)
        _fill(self.block_lens, [self.width] * n)
        self.work.done(lambda: self.draft.run(self.context_lens, self.tables.rows, self.block_lens))
        return self.draft.ids[:n, 1:].tolist(), self.draft.confidences()[:n].tolist()


class VerifyStage:
    """Runs the target over blocks of up to `width` tokens of `batch` requests, and verifies them.

    rows: T, of packed blocks. None: every block has `width` rows, which a verifier that keeps logits needs.
    hidden (T, H), features (T, F * H): after a call, the target's hidden states, and what the drafter's context is made
    of.
    """

    def __init__(self, target: Target, target_layer_ids: Sequence[int], kv: Sequence[PagedKV], batch: int, width: int,
                 rows: int | None, tables: Tables, verifier: GreedyVerifier):
        self.verifier, self.tables, self.width = verifier, tables, width
        self.packed, self.rows = rows is not None, batch * width if rows is None else rows
        self.work = Recorded(target.device, target, verifier)
        self.forward = target.make_pass(batch, width, kv, target_layer_ids, rows)
        self.blocks, self.order = (torch.zeros((batch, width), dtype=torch.int64) for _ in range(2))
        shape = (self.rows,) if self.packed else (batch, width)
        self.ids = torch.zeros(shape, dtype=torch.int64) if self.packed else self.blocks
        self.positions, self.slots = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
        self.context_lens, self.block_lens, self.starts = (torch.zeros(batch, dtype=torch.int32) for _ in range(3))
        self.hidden: torch.Tensor = torch.empty(0)
        self.features: torch.Tensor = torch.empty(0)

    def fill(self, blocks: Sequence[Block]) -> list[int]:
        """Sets the blocks, in order; the rest of the batch is empty. Returns the row at which each begins."""
        at, width = 0, self.width
        starts: list[int] = []
        order: list[int] = []
        padded: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        ids: list[int] = []
        for block in blocks:
            n = len(block.tokens)
            gap = width - n
            starts.append(at)
            order += [*range(at, at + n), *[-1] * gap]
            padded += [*block.tokens, *[0] * gap]
            ids += block.tokens
            positions += block.positions()
            slots += block.slots()
            if not self.packed:
                positions += [0] * gap
                slots += [-1] * gap
            at += n if self.packed else width
        _fill(self.blocks, padded)
        _fill(self.positions, positions)
        _fill(self.slots, slots, -1)
        _fill(self.context_lens, [block.context for block in blocks])
        _fill(self.block_lens, [len(block.tokens) for block in blocks])
        if self.packed:
            _fill(self.ids, ids)
            _fill(self.order, order, -1)
            _fill(self.starts, starts)
        return starts

    def __call__(self) -> Verified:
        self.work.done(self.run)
        return self.verifier.out

    def run(self) -> None:
        where = (self.tables.rows, self.context_lens, self.block_lens)
        self.hidden, self.features = self.forward.run(self.ids, self.positions, self.slots, *where,
                                                      self.starts if self.packed else None)
        self.verifier.run(self.hidden, self.blocks, self.context_lens, self.block_lens,
                          order=self.order if self.packed else None)


class ContextStage:
    """Writes K/V of up to `rows` committed tokens, of any requests, to the drafter's pages."""

    def __init__(self, drafter: Drafter, kv: Sequence[PagedKV], rows: int):
        self.work, self.context = Recorded(drafter.device, drafter), drafter.make_context(1, rows, kv)
        self.features = torch.zeros((rows, drafter.config.features), dtype=drafter.dtype)
        self.positions, self.slots = (torch.zeros((1, rows), dtype=torch.int64) for _ in range(2))
        self.count = torch.zeros(1, dtype=torch.int32)

    def __call__(self, features: torch.Tensor, positions: Sequence[int], slots: Sequence[int]) -> None:
        """features (n, F * H)."""
        self.features[:len(features)].copy_(features)
        _fill(self.positions, positions)
        _fill(self.slots, slots, -1)
        self.count.fill_(len(features))
        self.work.done(lambda: self.context.run(self.features, self.positions, self.slots, self.count))
