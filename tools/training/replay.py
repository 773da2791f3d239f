"""Drafts over texts that are there already: the blocks that decoding would draft, without decoding.

A block is drafted after each place where decoding the text would go on: after the accepted drafts and the token that
the target puts in place of the first rejected one. So places where drafts are rejected occur as often as they do in
decoding, which random places do not.
"""

from collections.abc import Iterable, Iterator
from functools import cache
from typing import NamedTuple

import torch

from dflash_decode import Session
from dflash_decode.model.drafter import DraftPass
from dflash_decode.step import Prefill
from dflash_kernels import lm_head_topk

from .target import PAGE, passes_over
from .texts import CONTEXT, coded


class Text(NamedTuple):
    """ids: of prompt and answer. start: where the answer begins."""

    number: int
    ids: list[int]
    start: int


class Blocks(NamedTuple):
    """N drafted blocks of Q tokens: texts (N,), the text's number; anchors (N,), their first tokens; hidden (N, Q - 1,
    H), the drafter's final hidden states; values, ids (N, Q - 1, K), the candidates, most likely first; truth (N,
    Q - 1), the text's tokens, -1 after its end; accepted (N,), how many of the drafts are the text's."""

    texts: torch.Tensor
    anchors: torch.Tensor
    hidden: torch.Tensor
    values: torch.Tensor
    ids: torch.Tensor
    truth: torch.Tensor
    accepted: torch.Tensor


def greedy_texts(session: Session, rows: Iterable[dict], longest: int = CONTEXT) -> Iterator[Text]:
    """The conversations that were written greedily, as ids: those of at most `longest` tokens."""
    tokenizer = session.tokenizer
    for number, row in enumerate(rows):
        ids, start = coded(tokenizer, row)
        if row["temperature"] == 0 and start + 2 <= len(ids) <= longest:
            yield Text(number, ids, start)


def weights_to_rejection(accepted: torch.Tensor, width: int) -> torch.Tensor:
    """accepted (...) -> (..., width - 1): 1 up to the first rejected draft, less and less after it."""
    late = torch.arange(width - 1, device=accepted.device) - accepted[..., None]
    return torch.exp(-late.clamp_min(0) / 2.0)


def rates_by_position(accepted: torch.Tensor, width: int) -> list[float | None]:
    """accepted (N,) -> how often each of `width` - 1 drafts was accepted where those before it were; None if they never
    were."""
    reached = [int((accepted >= at).sum()) for at in range(width)]
    return [after / before if before else None for before, after in zip(reached, reached[1:], strict=False)]


class Replay:
    """Runs `batch` texts of at most `longest` tokens next to each other. session: with the drafter."""

    def __init__(self, session: Session, batch: int, candidates: int, longest: int = CONTEXT):
        target, self.drafter = session.target, session.drafter
        self.width, self.candidates, pages = self.drafter.block_size, candidates, longest // PAGE + 1
        self.kv = [model.cache.allocate(batch * pages, PAGE) for model in (target, self.drafter)]
        self.prefill = cache(lambda rows: Prefill(target, self.drafter, *self.kv, rows, PAGE, pages))
        self.draft = DraftPass(self.drafter, batch, self.width, self.kv[1], PAGE)
        self.tables = torch.arange(batch * pages, dtype=torch.int32).view(batch, pages)
        self.lens, self.block = (torch.zeros(batch, dtype=torch.int32) for _ in range(2))

    def _read(self, text: Text, table: torch.Tensor) -> None:
        """Writes the text's K/V of the drafter to the pages of `table`."""
        for _ in passes_over(self.prefill, text.ids, table, self.drafter.device):
            pass

    def blocks(self, texts: Iterable[Text]) -> Iterator[Blocks]:
        """The blocks of all texts, those of a pass at a time."""
        waiting = iter(texts)
        live: list[tuple[Text, int] | None] = [None] * len(self.tables)  # and the place of its next anchor
        while True:
            for i, table in enumerate(self.tables):
                if live[i] is None and (text := next(waiting, None)):
                    self._read(text, table)
                    live[i] = text, text.start
            which = [i for i, one in enumerate(live) if one]
            if not which:
                return
            yield (found := self._draft(live, which))
            for i, accepted in zip(which, found.accepted.tolist(), strict=True):
                text, place = live[i]
                place += accepted + 1
                live[i] = (text, place) if place < len(text.ids) - 1 else None

    def _draft(self, live, which: list[int]) -> Blocks:
        for i, one in enumerate(live):
            text, place = one or (None, 0)
            self.draft.anchors[i], self.lens[i] = text.ids[place] if text else 0, place
            self.block[i] = self.draft.rows if text else 0
        d, draft = self.drafter, self.draft
        drafts = draft.run(self.lens, self.tables, self.block)[which, 1:]
        shape = (len(live), self.width - 1, -1)
        ids, values, _ = lm_head_topk(draft.masked, d.head, self.candidates, bias=d.head_bias, num_valid=d.num_valid,
                                      scale=d.config.output_multiplier, softcap=d.config.final_logit_softcapping)
        ids = ids if d.ids_of_draft is None else d.ids_of_draft[ids]
        truth = torch.full((len(which), self.width - 1), -1)
        for row, i in zip(truth, which, strict=True):
            text, place = live[i]
            after = text.ids[place + 1:place + self.width]
            row[:len(after)] = torch.tensor(after)
        accepted = (drafts == truth).long().cumprod(-1).sum(-1)
        return Blocks(torch.tensor([live[i][0].number for i in which]), draft.anchors[which].clone(),
                      draft.masked.view(shape)[which], values.view(shape)[which], ids.view(shape)[which], truth,
                      accepted)
