"""Sampling parameters of a request."""

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch

from .inputs import integer, number, shown

FLOAT32 = torch.finfo(torch.float32)


class Grammar(Protocol):
    """Restricts the next token. It is called for any prefix of an answer, in any order, so it must keep no state."""

    def fill_bitmask(self, tokens: Sequence[int], words: torch.Tensor) -> None:
        """Clears the bits of the tokens that must not follow the answer `tokens`.

        words (ceil(V / 32),) int32, on the CPU: bit v % 32 of word v // 32 stands for token v, as in xgrammar. All bits
        are set before the call. Bits from V on have no meaning.

        The request ends with an error event, without effect on others, if this raises an Exception, changes the shape,
        dtype or device of words, or allows no token in [0, V) (or only tokens whose logit_bias is -inf) after the
        answer so far. It can allow none after drafts that are then not accepted.
        """


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request. The filters combine as in verify_sample.

    temperature: 0 is greedy.
    top_k: keeps the K most likely tokens; 0 or -1 keeps all.
    top_p: keeps the most likely tokens with this probability together; 1 keeps all, 0 only the most likely and those
        that tie with it.
    min_p: keeps tokens with at least this share of the highest probability; 0 keeps all.
    seed: the output depends only on the seed, the prompt and these settings, never on other requests. None selects a
        fresh seed, which the request's events report.
    repetition_penalty: divides positive logits of tokens in the prompt or the answer, and multiplies negative ones; 1
        is off.
    presence_penalty: is subtracted from the logit of each token in the answer; 0 is off.
    frequency_penalty: is subtracted from it once per occurrence; 0 is off.
    logit_bias: is added to the logits of these tokens.
    grammar: restricts the next token.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    grammar: Grammar | None = None

    def __post_init__(self):
        if integer(self.top_k) == -1:
            object.__setattr__(self, "top_k", 0)

    @property
    def adjusts(self) -> bool:
        """Whether the logits are adjusted before a token is chosen."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.logit_bias
                    or self.grammar is not None)

    @cached_property
    def biases(self) -> tuple[array, array]:
        """logit_bias as tokens (N,) in 64 bits and their values (N,) in float32, made once for all steps."""
        return array("q", self.logit_bias), array("f", self.logit_bias.values())


GREEDY = SamplingParams()
# Field: (lowest, highest).
_RANGES = {
    "temperature": (0.0, FLOAT32.max), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0),
    "presence_penalty": (-FLOAT32.max, FLOAT32.max), "frequency_penalty": (-FLOAT32.max, FLOAT32.max),
    "repetition_penalty": (FLOAT32.tiny, FLOAT32.max),
}
_SAID = {0.0: " of at least 0", FLOAT32.tiny: " above 0"}


def check_sampling(sampling: SamplingParams, what: str, vocab: int | None = None) -> SamplingParams:
    """The same settings as Python numbers. Raises TypeError or ValueError, with a message that begins with `what`, for
    invalid settings and for numbers that float32, in which they are applied, cannot hold."""
    if not isinstance(sampling, SamplingParams):
        raise TypeError(f"{what}: sampling must be a SamplingParams; got {shown(sampling)}")
    read: dict[str, Any] = {name: _number(getattr(sampling, name), name, what) for name in _RANGES}
    top_k = _integer(sampling.top_k, "top_k", what, 31, "an integer, -1 or 0 (off), or up to")
    seed = None if sampling.seed is None else _integer(sampling.seed, "seed", what, 63, "an integer from 0 to")
    grammar = sampling.grammar
    if grammar is not None and not callable(getattr(grammar, "fill_bitmask", None)):
        raise TypeError(f"{what}: grammar must have a method fill_bitmask; got {shown(grammar)}")
    return replace(sampling, **read, top_k=top_k, seed=seed, logit_bias=_biases(sampling.logit_bias, what, vocab))


def _integer(given: object, name: str, what: str, bits: int, words: str) -> int:
    value = integer(given)
    if value is None or not 0 <= value < 2**bits:
        raise _wrong(value)(f"{what}: {name} must be {words} 2**{bits} - 1; got {shown(given)}")
    return value


def _wrong(value: object) -> type[Exception]:
    """The error of a value that could be read as a number, or not (None)."""
    return TypeError if value is None else ValueError


def _number(given: Any, name: str, what: str) -> float:
    value, (low, high) = number(given), _RANGES[name]
    if value is None or not low <= value <= high:
        limits = f" from {low:g} to {high:g}" if high == 1 else _SAID.get(low, "")
        if value is not None and abs(value) > FLOAT32.max and abs(given) != math.inf:
            limits = f" from {low:g} to {high:g}" if low < 0 else f"{limits}, at most {high:g}"
        elif value is not None and 0 < value < low:
            limits += f", at least {low:g}"
        raise _wrong(value)(f"{what}: {name} must be a finite number{limits}; got {shown(given)}")
    return value


def _biases(given: object, what: str, vocab: int | None) -> dict[int, float]:
    if not isinstance(given, Mapping):
        raise TypeError(f"{what}: logit_bias must be a mapping of token ids to numbers; got {shown(given)}")
    biases = {}
    for key, bias in given.items():
        token, value = integer(key), number(bias)
        if token is None or token < 0 or (vocab is not None and token >= vocab):
            raise _wrong(token)(f"{what}: logit_bias must be for token ids in [0, {vocab or 'V'}); got {shown(key)}")
        # An infinity bans a token or all others. A finite number that float32 rounds to infinity is an error.
        if value is None or value != value or abs(value) > FLOAT32.max and abs(bias) != math.inf:
            raise _wrong(value)(f"{what}: logit_bias must be numbers that float32 can hold; got {shown(bias)} for "
                                f"token {token}")
        biases[token] = value
    if vocab is not None and len(biases) == vocab and all(bias == -math.inf for bias in biases.values()):
        raise ValueError(f"{what}: logit_bias must leave a token that it does not ban; got -inf for all {vocab}")
    return biases
