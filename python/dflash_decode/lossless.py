"""Finds the first token where speculative output differs from baseline output, and the logit margin there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from dflash_kernels import prepare_block

from .kv import PagePool
from .model import Target


@dataclass(frozen=True)
class Difference:
    """The first difference of two answers.

    It has the position in the answer, the token of each (None: the answer ended), and the margin: the baseline logit of
    the baseline token minus that of the other. A margin near 0 is a near tie that another order of additions decided; a
    large margin is a bug.
    """

    index: int
    baseline: int | None
    speculative: int | None
    margin: float | None

    def __str__(self) -> str:
        margin = "one text is a prefix of the other" if self.margin is None else f"logit margin {self.margin:.3g}"
        return f"token {self.index}: baseline {self.baseline}, speculative {self.speculative} ({margin})"


def first_index(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The index of the first differing token, or None."""
    shortest = min(len(one), len(other))
    at = next((i for i in range(shortest) if one[i] != other[i]), shortest)
    return None if at == len(one) == len(other) else at


def first_difference(target: Target, prompt: Sequence[int], baseline: Sequence[int],
                     speculative: Sequence[int]) -> Difference | None:
    """None if the two answers to `prompt` are equal, else their first difference with the target's margin."""
    index = first_index(baseline, speculative)
    if index is None:
        return None
    if index == min(len(baseline), len(speculative)):
        token = lambda text: text[index] if index < len(text) else None  # noqa: E731
        return Difference(index, token(baseline), token(speculative), None)
    logits = _next_logits(target, [*prompt, *baseline[:index]])
    return Difference(index, baseline[index], speculative[index],
                      float(logits[baseline[index]] - logits[speculative[index]]))


def _next_logits(target: Target, tokens: Sequence[int]) -> torch.Tensor:
    pool = PagePool(-(-len(tokens) // 16), 16)
    caches = target.cache.allocate(pool.num_pages, pool.page_size)
    table = pool.table_row(pool.allocate(len(tokens)), pool.num_pages)[None].to(target.device)
    ids = torch.tensor([tokens], device=target.device)
    nothing, whole = (torch.tensor([n], dtype=torch.int32, device=target.device) for n in (0, len(tokens)))
    block = prepare_block(ids[:, 0], nothing, len(tokens), 0, page_table=table, page_size=pool.page_size)
    slots = cast(torch.Tensor, block.slots)  # there is a page table
    rows, _ = target.make_pass(1, len(tokens), caches).run(ids, block.positions, slots, table, nothing, whole)
    logits = torch.empty((1, target.vocab_size), dtype=target.dtype, device=target.device)
    target.logits(rows[-1:], logits)
    return logits[0].float()
