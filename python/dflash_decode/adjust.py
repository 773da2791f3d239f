"""Penalties, biases and grammars as the tensors that verify_sample reads, a row for each position of a block."""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import takewhile

import torch

from dflash_kernels import LogitAdjustments

from .inputs import FLOAT32, said
from .sampling import Sampling


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """(..., V) bool -> (..., ceil(V / 32)) int32, bit v % 32 of word v // 32."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 32)).unflatten(-1, (-1, 32)).long()
    return (padded << torch.arange(32)).sum(-1).int()


class GrammarFailed(Exception):
    """A request's grammar raised: its answer cannot go on."""


class Adjuster:
    """Adjustments of `batch` blocks of `width` tokens. Row i is for the token after the drafts before it."""

    def __init__(self, batch: int, width: int, vocab: int, device: torch.device):
        words = -(-vocab // 32)
        self.adjustments = LogitAdjustments(
            seen=torch.zeros((batch, width, words), dtype=torch.int32, device=device),
            repetition_penalty=torch.ones(batch, device=device),
            bias=torch.zeros((batch, width, vocab), device=device),
            bitmask=torch.full((batch, width, words), -1, dtype=torch.int32, device=device))
        self.width, self.vocab = width, vocab

    def fill(self, b: int, sampling: Sampling, prompt: Sequence[int], text: Sequence[int],
             drafts: Sequence[int], stops: Collection[int] = ()) -> None:
        """Request b of the batch: what it was asked, what it has answered, the drafts of its block, and the tokens that
        would end it. Raises GrammarFailed."""
        a, width = self.adjustments, self.width
        drafts = list(takewhile(range(self.vocab).__contains__, drafts))  # where verify_sample ends the block too
        a.repetition_penalty[b] = sampling.repetition_penalty
        counts, bias = Counter(text), torch.zeros((width, self.vocab))
        seen = torch.zeros((width, self.vocab), dtype=torch.bool)

        def value(token):
            taken = sampling.frequency_penalty * counts[token] + sampling.presence_penalty * (counts[token] > 0)
            wanted = sampling.logit_bias.get(token, 0.0) - taken
            # Penalties that float32 holds may be more together, or many times over; infinities are as they were asked.
            return wanted if math.isinf(wanted) else max(-FLOAT32.max, min(wanted, FLOAT32.max))

        for token in {*counts, *sampling.logit_bias}:
            bias[:, token] = value(token)
        seen[:, list({*prompt, *counts})] = True
        for i, token in enumerate(drafts, 1):
            counts[token] += 1
            bias[i:, token] = value(token)
            seen[i:, token] = True
        a.bias[b].copy_(bias)
        a.seen[b].copy_(pack_bits(seen))
        a.bitmask[b].copy_(self._mask(sampling, text, drafts, stops))

    def _mask(self, sampling, text, drafts, stops):
        words = torch.full(self.adjustments.bitmask.shape[1:], -1, dtype=torch.int32)
        for i in range(len(drafts) + 1 if sampling.grammar else 0):
            try:
                sampling.grammar.fill_bitmask([*text, *drafts[:i]], words[i])
            except Exception as error:  # it is the caller's, and may raise anything
                raise GrammarFailed(f"grammar: {said(error)}") from error
            # Nothing comes after a draft that is not allowed, which is rejected, or that ends the answer: a grammar
            # that has ended may refuse to be asked.
            if i < len(drafts) and (drafts[i] in stops
                                    or not int(words[i, drafts[i] // 32]) >> drafts[i] % 32 & 1):
                break
        return words
