"""Penalties, biases and grammars as the tensors that verify_sample reads, with one row per block position."""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import takewhile
from typing import NamedTuple

import torch

from dflash_kernels import LogitAdjustments

from .inputs import said
from .sampling import FLOAT32, Grammar, SamplingParams


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """(..., V) bool -> (..., ceil(V / 32)) int32, bit v % 32 of word v // 32."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 32)).unflatten(-1, (-1, 32)).long()
    return (padded << torch.arange(32)).sum(-1).int()


def unpack_bits(words: torch.Tensor, n: int) -> torch.Tensor:
    """The first n bits of (ceil(n / 32),) int32, as (n,) bool."""
    return ((words.unsqueeze(1) >> torch.arange(32, dtype=torch.int32)) & 1).view(-1)[:n].bool()


class GrammarFailed(Exception):
    """A request's grammar raised, or allowed no token, so its answer cannot continue."""


class Usable(NamedTuple):
    """The rows of a block before the first that allows no token. cut: there is such a row. raised: the grammar raised
    there."""

    rows: int
    cut: bool = False
    raised: bool = False


class Adjuster:
    """Logit adjustments for `batch` blocks of `width` tokens. Row i adjusts the token after the first i drafts.

    bias (batch, width, V) float32: its memory, which each fill overwrites.
    """

    def __init__(self, bias: torch.Tensor):
        batch, width, vocab = bias.shape
        words, device = -(-vocab // 32), bias.device
        self.seen = torch.zeros((batch, width, words), dtype=torch.int32, device=device)
        self.penalty = torch.ones(batch, device=device)
        self.bias = bias
        self.bitmask = torch.full((batch, width, words), -1, dtype=torch.int32, device=device)
        self.adjustments = LogitAdjustments(self.seen, self.penalty, self.bias, self.bitmask)
        self.width, self.vocab = width, vocab

    def fill(self, b: int, sampling: SamplingParams, prompt: Sequence[int], text: Sequence[int],
             drafts: Sequence[int], stops: Collection[int] = ()) -> Usable:
        """Fills the rows of request b from its prompt, its answer so far, the drafts of its block and its stop tokens.

        Raises GrammarFailed if the first row, which is used whatever is drafted, allows no token.
        """
        width = self.width
        drafts = list(takewhile(range(self.vocab).__contains__, drafts))  # where verify_sample ends the block too
        self.penalty[b] = sampling.repetition_penalty
        counts, bias = Counter(text), torch.zeros((width, self.vocab))
        seen = torch.zeros((width, self.vocab), dtype=torch.bool)

        def value(token):
            taken = sampling.frequency_penalty * counts[token] + sampling.presence_penalty * (counts[token] > 0)
            wanted = sampling.logit_bias.get(token, 0.0) - taken
            # Penalties that float32 holds may be more together, or many times over; infinities are as they were asked.
            return wanted if math.isinf(wanted) else max(-FLOAT32.max, min(wanted, FLOAT32.max))

        if sampling.logit_bias:
            tokens, biases = sampling.biases
            bias[:, torch.frombuffer(tokens, dtype=torch.int64)] = torch.frombuffer(biases, dtype=torch.float32)
        if sampling.frequency_penalty or sampling.presence_penalty:
            bias[:, list(counts)] = torch.tensor([value(token) for token in counts])
        seen[:, list({*prompt, *counts})] = True
        for i, token in enumerate(drafts, 1):
            counts[token] += 1
            bias[i:, token] = value(token)
            seen[i:, token] = True
        self.bias[b].copy_(bias)
        self.seen[b].copy_(pack_bits(seen))
        words, usable = self._mask(sampling, text, drafts, stops, bias > -math.inf)
        self.bitmask[b].copy_(words)
        return usable

    def _mask(self, sampling, text, drafts, stops, wanted):
        """wanted (width, V) bool: the tokens that logit_bias does not ban."""
        words = torch.full(self.bitmask.shape[1:], -1, dtype=torch.int32)
        for i in range(len(drafts) + 1 if sampling.grammar else 0):
            try:
                answer = _asked(sampling.grammar, [*text, *drafts[:i]], words[i].clone())
            except GrammarFailed:
                if i:  # of a draft, which may be rejected: an answer that gets there fails there
                    return words, Usable(i, cut=True, raised=True)
                raise
            allowed = unpack_bits(answer, self.vocab)
            if not (allowed & wanted[i]).any():
                if i:
                    return words, Usable(i, cut=True)
                raise GrammarFailed(f"grammar: fill_bitmask must allow a token in [0, {self.vocab}) that logit_bias "
                                    f"does not ban; got none after {len(text)} tokens")
            words[i] = answer
            # Nothing comes after a draft that is not allowed, which is rejected, or that ends the answer: a grammar
            # that has ended may refuse to be asked.
            if i < len(drafts) and (drafts[i] in stops or not allowed[drafts[i]]):
                break
        return words, Usable(self.width)


def _asked(grammar: Grammar, tokens: list[int], words: torch.Tensor) -> torch.Tensor:
    """The grammar's answer, in words that no other row shares."""
    expected = _kind(words)
    try:
        grammar.fill_bitmask(tokens, words)
    except Exception as error:  # it is the caller's, and may raise anything
        raise GrammarFailed(f"grammar: {said(error)}") from error
    if _kind(words) != expected:
        raise GrammarFailed(f"grammar: fill_bitmask must leave words as they are, {expected}; got {_kind(words)}")
    return words


def _kind(words: torch.Tensor) -> str:
    return f"{str(words.dtype).removeprefix('torch.')} {tuple(words.shape)} on {words.device}"
