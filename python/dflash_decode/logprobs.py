"""Log probabilities of the target where it chose the tokens of an answer, for the requests that ask for them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .model import Target


@dataclass(frozen=True)
class TokenLogprobs:
    """The target's distribution where it chose one token: at temperature 1, before filters, penalties and masks.

    token, logprob: the chosen token.
    top: (token, log probability) of the most likely tokens, the most likely first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def logprobs_of(target: Target, rows: torch.Tensor, tokens: Sequence[int], most: int) -> list[TokenLogprobs]:
    """rows (n, H): the target's hidden states that the n `tokens` were chosen from. most: the entries of `top`."""
    logits = torch.empty((len(tokens), target.vocab_size), dtype=target.dtype, device=rows.device)
    target.logits(rows.contiguous(), logits)
    found = logits.float().log_softmax(-1)
    chosen = found.gather(1, torch.tensor(tokens, device=rows.device)[:, None])[:, 0].tolist()
    values, ids = (part.tolist() for part in found.topk(most, dim=-1))
    return [TokenLogprobs(token, logprob, tuple(sorted(zip(ids[i], values[i], strict=True),
                                                       key=lambda one: (-one[1], one[0]))))
            for i, (token, logprob) in enumerate(zip(tokens, chosen, strict=True))]
