"""Log probabilities of the target where it chose the tokens of an answer, for the requests that ask for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from .model import Target


class TopLogprob(NamedTuple):
    """One of the most likely tokens, as in TokenLogprobs."""

    token: int
    logprob: float
    text: str = ""


@dataclass(frozen=True)
class TokenLogprobs:
    """The target's distribution where it chose one token: at temperature 1, before filters, penalties and masks.

    token, logprob, text: the chosen token.
    top: (token, logprob, text) of the most likely tokens, the most likely first.

    A Decoder has no tokenizer, so the texts in its events are empty. The text of a part of a character is U+FFFD.
    """

    token: int
    logprob: float
    top: tuple[TopLogprob, ...] = ()
    text: str = ""

    def spelt(self, text_of: Callable[[int], str]) -> "TokenLogprobs":
        """The same with the texts."""
        top = tuple(one._replace(text=text_of(one.token)) for one in self.top)
        return replace(self, top=top, text=text_of(self.token))


def logprobs_of(target: Target, rows: torch.Tensor, tokens: Sequence[int], most: int) -> list[TokenLogprobs]:
    """rows (n, H): the target's hidden states that the n `tokens` were chosen from. most: the entries of `top`."""
    logits = torch.empty((len(tokens), target.vocab_size), dtype=target.dtype, device=rows.device)
    target.logits(rows.contiguous(), logits)
    found = logits.float().log_softmax(-1)
    chosen = found.gather(1, torch.tensor(tokens, device=rows.device)[:, None])[:, 0].tolist()
    values, ids = (part.tolist() for part in found.topk(most, dim=-1))
    return [TokenLogprobs(token, logprob, tuple(sorted(map(TopLogprob, ids[i], values[i]),
                                                       key=lambda one: (-one.logprob, one.token))))
            for i, (token, logprob) in enumerate(zip(tokens, chosen, strict=True))]
