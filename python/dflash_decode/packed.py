"""The stages of a step whose blocks have several lengths, each recorded as a graph of its own.

    draft    (B, Q)     the drafter's block of every request that drafts
    verify   (T,)       the tokens that are worth verifying, packed request after request
    context  (C,)       K/V for the drafter, of committed tokens, when a request drafts next

Between two stages the host reads what the first found. So these stages are for a CPU; a GPU replays a whole Step.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from dflash_kernels import PagedKV, Verified

from .kv import NO_PAGE
from .model import Target
from .model.drafter import Drafter
from .step import Recorded
from .verify import GreedyVerifier

if TYPE_CHECKING:
    import numpy as np


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


def bits_of(tensor: torch.Tensor) -> "np.ndarray":
    """The tensor's memory for NumPy, which has no bfloat16. It copies a few rows in a quarter of the time that torch
    takes for it between two passes, when neither is in the caches."""
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.itemsize]).numpy()


class Input:
    """A tensor of integers that the host fills before a pass: a dozen in a step, so through NumPy's view of the memory,
    which takes far less time than torch's copy of so few numbers."""

    def __init__(self, tensor: torch.Tensor, rest: int = 0):
        """rest: what follows the values that are set."""
        self.tensor, self.rest, self._flat = tensor, rest, tensor.view(-1).numpy()
        self._set = self._flat.size  # values that may differ from the rest

    @classmethod
    def of(cls, *shape: int, dtype: torch.dtype = torch.int64, rest: int = 0) -> "Input":
        return cls(torch.full(shape, rest, dtype=dtype), rest)

    def set(self, values: Sequence[int]) -> None:
        n, before = len(values), self._set
        self._set = max(n, before)  # an interrupt leaves it too high, not too low
        self._flat[:n] = values
        if n < before:
            self._flat[n:before] = self.rest
        self._set = n


class DraftStage:
    """Drafts a block for each of `batch` requests. room: the positions that there are, past which no block goes."""

    def __init__(self, drafter: Drafter, kv: Sequence[PagedKV], batch: int, width: int, tables: Tables,
                 page_size: int, room: int):
        self.tables, self.width, self.room = tables, width, room
        self.work = Recorded(drafter.device, drafter)
        self.draft = drafter.make_draft(batch, width, kv, page_size)
        self.anchors = Input(self.draft.anchors)
        self.context_lens, self.block_lens = (Input.of(batch, dtype=torch.int32) for _ in range(2))

    def __call__(self, anchors: Sequence[int], contexts: Sequence[int]) -> tuple[list[list[int]], list[list[float]]]:
        """Drafts and their confidences, for each request."""
        widths = [min(self.width, self.room - context) for context in contexts]
        self.anchors.set(anchors)
        self.context_lens.set(contexts)
        self.block_lens.set([min(width, self.draft.rows) for width in widths])
        self.work.done(self.run)
        n = len(widths)
        drafts, confidences = self.draft.ids[:n, 1:].tolist(), self.draft.confidences()[:n].tolist()
        return tuple([row[:width - 1] for row, width in zip(rows, widths, strict=True)]  # type: ignore[return-value]
                     for rows in (drafts, confidences))

    def run(self) -> None:
        self.draft.run(self.context_lens.tensor, self.tables.rows, self.block_lens.tensor)


class VerifyStage:
    """Runs the target over blocks of up to `width` tokens of `batch` requests, and verifies them.

    rows: T, of packed blocks. None: every block has `width` rows, which a verifier that keeps logits needs.
    hidden (T, H), features (T, F * H): after a call, the target's hidden states, and, as `bits_of` has them, those that
    the drafter's context is made of.
    """

    def __init__(self, target: Target, target_layer_ids: Sequence[int], kv: Sequence[PagedKV], batch: int, width: int,
                 rows: int | None, tables: Tables, verifier: GreedyVerifier):
        self.verifier, self.tables, self.width = verifier, tables, width
        self.packed, self.rows = rows is not None, batch * width if rows is None else rows
        self.work = Recorded(target.device, target, verifier)
        self.forward = target.make_pass(batch, width, kv, target_layer_ids, rows)
        self.blocks, self.order = Input.of(batch, width), Input.of(batch, width, rest=-1)
        shape = (self.rows,) if self.packed else (batch, width)
        self.ids = Input.of(*shape) if self.packed else self.blocks
        self.positions, self.slots = Input.of(*shape), Input.of(*shape, rest=-1)
        self.context_lens, self.block_lens, self.starts = (Input.of(batch, dtype=torch.int32) for _ in range(3))
        self.hidden: torch.Tensor  # and features: set by the first call
        self.features: np.ndarray

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
        self.blocks.set(padded)
        self.positions.set(positions)
        self.slots.set(slots)
        self.context_lens.set([block.context for block in blocks])
        self.block_lens.set([len(block.tokens) for block in blocks])
        if self.packed:
            self.ids.set(ids)
            self.order.set(order)
            self.starts.set(starts)
        return starts

    def __call__(self) -> Verified:
        self.work.done(self.run)
        return self.verifier.out

    def run(self) -> None:
        lens = self.context_lens.tensor, self.block_lens.tensor
        self.hidden, features = self.forward.run(
            self.ids.tensor, self.positions.tensor, self.slots.tensor, self.tables.rows, *lens,
            self.starts.tensor if self.packed else None)
        self.features = bits_of(features)
        self.verifier.run(self.hidden, self.blocks.tensor, *lens, order=self.order.tensor if self.packed else None)


class ContextStage:
    """Writes K/V of up to `rows` committed tokens, of any requests, to the drafter's pages."""

    def __init__(self, drafter: Drafter, kv: Sequence[PagedKV], rows: int):
        self.work, self.context = Recorded(drafter.device, drafter), drafter.make_context(1, rows, kv)
        self.features = torch.zeros((rows, drafter.config.features), dtype=drafter.dtype)
        self._bits = bits_of(self.features)
        self.positions, self.slots = Input.of(1, rows), Input.of(1, rows, rest=-1)
        self.count = Input.of(1, dtype=torch.int32)

    def __call__(self, features: Sequence["np.ndarray"], positions: Sequence[int], slots: Sequence[int]) -> None:
        """features: parts (n, F * H), as `bits_of` has them, whose rows are those of the positions."""
        at = 0
        for part in features:
            self._bits[at:at + len(part)] = part
            at += len(part)
        self.positions.set(positions)
        self.slots.set(slots)
        self.count.set([len(positions)])
        self.work.done(self.run)

    def run(self) -> None:
        self.context.run(self.features, self.positions.tensor, self.slots.tensor, self.count.tensor)
