"""One decoding step of a batch, on memory that never moves, so that it can be recorded as a graph."""

from collections.abc import Callable, Sequence
from typing import cast

import torch

from dflash_kernels import PagedKV, PreparedBlock, StepGraph, Verified, prepare_block

from .kv import NO_PAGE
from .model import Target
from .model.drafter import Drafter
from .requests import Live
from .verify import GreedyVerifier


class Recorded:
    """Work that is recorded on its first call and replayed afterwards, where the device and its parts allow it."""

    def __init__(self, device: torch.device, *parts, pool: tuple[int, int] | None = None):
        """parts: the objects that do the work, each with `graph_safe`, or None. pool: as for StepGraph."""
        recordable = all(part is None or part.graph_safe for part in parts)
        self.graph = StepGraph(device, pool) if recordable and StepGraph.available(device) else None

    @property
    def records(self) -> bool:
        """Whether the next call is the one that is recorded."""
        return self.graph is not None and not self.graph.captured

    def done(self, work: Callable[[], object]) -> None:
        if self.graph is None:
            work()
            return
        if self.graph.captured:
            return self.graph.replay()
        if self.graph.device.type == "cuda":
            work()  # a capture only records, and cannot compile or load a kernel
        with self.graph.capture():
            work()


class Step:
    """Draft, verify, commit for `batch` requests with blocks of `width` tokens.

    Width 1, or no drafter, is a baseline step. verifier: greedy if None. draw: drafts are sampled from the drafter's
    distribution with the settings of the verifier's requests. pool: as for StepGraph.

    Inputs, filled in place:
        anchors (B,) int64: the last token of each request, which is not in the target's cache yet.
        context_lens (B,) int32: tokens before the anchor.
        block_lens (B,) int32: valid tokens of the block; 0 for no request.
        page_table (B, max_pages) int32.

    A call returns a Verified, and writes the committed tokens to the drafter's pages. hidden (B * Q, H): the target's
    hidden states, the inputs of the LM head.
    """

    def __init__(self, target: Target, drafter: Drafter | None, target_kv: Sequence[PagedKV],
                 draft_kv: Sequence[PagedKV], batch: int, width: int, page_size: int, max_pages: int,
                 verifier: GreedyVerifier | None = None, draw: bool = False, pool: tuple[int, int] | None = None):
        self.target, self.batch, self.width, self.page_size = target, batch, width, page_size
        self.verifier, device = verifier or GreedyVerifier(target, batch, width), target.device

        def ids(*shape, dtype=torch.int64):
            return torch.zeros(shape, dtype=dtype, device=device)

        self.work = Recorded(device, target, drafter, self.verifier, pool=pool)
        self.draft = drafter.make_draft(batch, width, draft_kv, page_size,
                                        self.verifier.params if draw else None) if drafter and width > 1 else None
        self.context = drafter.make_context(batch, width, draft_kv) if drafter else None
        self.forward = target.make_pass(batch, width, target_kv, drafter.target_layer_ids if drafter else ())
        # The drafter's pass has a row for every token of the block, or for all but the last one.
        shared = self.draft is not None and self.draft.rows == width
        self.block = self.draft.block if self.draft and shared else PreparedBlock.empty(batch, width, device=device)
        self.anchors = self.draft.anchors if self.draft else ids(batch)
        self.context_lens, self.block_lens = ids(batch, dtype=torch.int32), ids(batch, dtype=torch.int32)
        self.draft_lens = self.block_lens if shared else ids(batch, dtype=torch.int32)
        self.page_table = torch.full((batch, max_pages), NO_PAGE, dtype=torch.int32, device=device)
        self.hidden: torch.Tensor = torch.empty(0)

    def seat(self, tables: Sequence[torch.Tensor], requests: Sequence[Live] = ()) -> None:
        """Sets the page-table rows of the requests, in order; the rest of the batch is empty.

        requests: the owners of the rows, needed unless all are greedy.
        """
        self.page_table.fill_(NO_PAGE)
        self.page_table[:len(tables)].copy_(torch.stack(tuple(tables)))
        self.verifier.seat(requests)

    def fill(self, requests: Sequence[tuple[int, int, int]]) -> None:
        """Sets (anchor, context length, block length) of each request, in order; the rest of the batch is empty."""
        padded = [*requests, *[(0, 0, 0)] * (self.batch - len(requests))]
        columns = zip(*padded, strict=True)
        for into, values in zip((self.anchors, self.context_lens, self.block_lens), columns, strict=True):
            into.copy_(torch.tensor(values, dtype=into.dtype))
        if self.draft and self.draft_lens is not self.block_lens:
            self.draft_lens.copy_(self.block_lens.clamp(max=self.draft.rows))

    def __call__(self) -> Verified:
        self.work.done(self.run)
        return self.verifier.out

    def run(self) -> Verified:
        block, where = self.block, (self.page_table, self.context_lens, self.block_lens)
        if self.draft is None or block is not self.draft.block:
            ids = prepare_block(self.anchors, self.context_lens, self.width, 0, page_table=self.page_table,
                                page_size=self.page_size, block_lens=self.block_lens, out=block).ids
        if self.draft:
            ids = self.draft.run(self.context_lens, self.page_table, self.draft_lens)
        slots = cast(torch.Tensor, block.slots)  # there is a page table
        rows, features = self.forward.run(ids, block.positions, slots, *where)
        self.hidden = rows
        proposal = self.draft.proposal if self.draft else None
        verified = self.verifier.run(rows, ids, self.context_lens, self.block_lens, proposal)
        if self.context:
            self.context.run(features, block.positions, slots, verified.commit_lens)
        return verified


class Prefill:
    """Runs up to `rows` tokens of one prompt through the target.

    drafter: whose pages get K/V of the tokens. target_layer_ids: without a drafter, the layers whose outputs are the
    features (rows, F * H). pool: as for StepGraph.
    """

    def __init__(self, target: Target, drafter: Drafter | None, target_kv: Sequence[PagedKV],
                 draft_kv: Sequence[PagedKV], rows: int, page_size: int, max_pages: int,
                 pool: tuple[int, int] | None = None, target_layer_ids: Sequence[int] = ()):
        self.target, self.rows, self.page_size, device = target, rows, page_size, target.device
        self.work = Recorded(device, target, drafter, pool=pool)
        self.context = drafter.make_context(1, rows, draft_kv) if drafter else None
        self.forward = target.make_pass(1, rows, target_kv, drafter.target_layer_ids if drafter else target_layer_ids)
        self.block = PreparedBlock.empty(1, rows, device=device)
        self.tokens = torch.zeros((1, rows), dtype=torch.int64, device=device)
        self.context_lens, self.block_lens = (torch.zeros(1, dtype=torch.int32, device=device) for _ in range(2))
        self.page_table = torch.full((1, max_pages), NO_PAGE, dtype=torch.int32, device=device)
        self.out: torch.Tensor  # and features: set by the first call
        self.features: torch.Tensor

    def __call__(self, tokens: Sequence[int], done: int, page_table: torch.Tensor) -> torch.Tensor:
        """tokens: at most `rows`, at positions done, done + 1, ...; page_table (max_pages,). Returns the last token's
        hidden state (1, H), the input of the LM head."""
        n = len(tokens)
        self.tokens[0, :n].copy_(torch.tensor(tokens, dtype=torch.int64))
        self.context_lens.fill_(done)
        self.block_lens.fill_(n)
        self.page_table[0].copy_(page_table)
        self.work.done(self.run)
        return self.out[n - 1:n]

    def run(self) -> None:
        lens, live, table = self.context_lens, self.block_lens, self.page_table
        block = prepare_block(self.tokens[:, 0], lens, self.rows, 0, page_table=table, page_size=self.page_size,
                              block_lens=live, out=self.block)
        slots = cast(torch.Tensor, block.slots)  # there is a page table
        self.out, self.features = self.forward.run(self.tokens, block.positions, slots, table, lens, live)
        if self.context:
            self.context.run(self.features, block.positions, slots, live)


def prefill_sizes(tokens: int, most: int, device: torch.device) -> list[int]:
    """The rows of each pass over a prompt: few different sizes, because each keeps its own memory.

    A GPU reads the weights for as long as it computes a few hundred rows; on a CPU every padded row costs arithmetic.
    """
    whole, left = divmod(tokens, most)
    if not left:
        return [most] * whole
    size = max(1 << (left - 1).bit_length(), 16)
    step = max(size // 16, 16) if device.type == "cpu" else size
    return [most] * whole + [min(most, -(-left // step) * step)]
