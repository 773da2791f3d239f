"""How a request's tokens are drawn."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch


class Grammar(Protocol):
    """What may follow. It is asked about any beginning of an answer, in any order, so it keeps no state of its own."""

    def fill_bitmask(self, tokens: Sequence[int], words: torch.Tensor) -> None:
        """words (ceil(V / 32),) int32, on the CPU: bit v % 32 of word v // 32 is set if token v may follow the answer
        `tokens`, as in xgrammar. All bits are set before the call."""


@dataclass(frozen=True)
class Sampling:
    """How one request's tokens are drawn; the meaning of the filters together is verify_sample's.

    temperature: 0 is greedy. top_k: 0 or -1 keeps all. top_p: 1 keeps all. min_p: 0 keeps all.
    seed: the text depends on it, the prompt and these settings alone, never on what else runs. None: a fresh one, which
        the request's events tell.
    repetition_penalty: logits of tokens in prompt or answer are divided by it if positive, else multiplied. 1 is none.
    presence_penalty, frequency_penalty: taken once, and once for each time, from the logits of tokens in the answer.
    logit_bias: added to the logits of these tokens. grammar: what may follow.
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
        if type(self.top_k) is int and self.top_k == -1:
            object.__setattr__(self, "top_k", 0)

    @property
    def adjusts(self) -> bool:
        """Whether logits change before anything is chosen."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.logit_bias
                    or self.grammar is not None)


GREEDY = Sampling()
# Field: (lowest, highest).
_RANGES = {
    "temperature": (0.0, math.inf), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0), "presence_penalty": (-math.inf, math.inf),
    "frequency_penalty": (-math.inf, math.inf), "repetition_penalty": (0.0, math.inf),
}


def check_sampling(sampling: Sampling, what: str, vocab: int | None = None) -> None:
    """Raises TypeError or ValueError, which begin with `what`, for settings that mean nothing."""
    if not isinstance(sampling, Sampling):
        raise TypeError(f"{what}: sampling must be a Sampling; got {sampling!r}")
    for name, (low, high) in _RANGES.items():
        value = getattr(sampling, name)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not good or not low <= value <= high or (name == "repetition_penalty" and value == 0):
            limits = "" if low == -math.inf else " of at least 0" if high == math.inf else f" from {low:g} to {high:g}"
            limits = " above 0" if name == "repetition_penalty" else limits
            raise ValueError(f"{what}: {name} must be a finite number{limits}; got {value!r}")
    for name, value, end in (("top_k", sampling.top_k, 2**31), ("seed", sampling.seed, 2**63)):
        if not (name == "seed" and value is None) and (type(value) is not int or not 0 <= value < end):
            raise ValueError(f"{what}: {name} must be an integer from 0 to 2**{end.bit_length() - 1} - 1; "
                             f"got {value!r}")
    for token, bias in sampling.logit_bias.items():
        if type(token) is not int or token < 0 or (vocab is not None and token >= vocab):
            raise ValueError(f"{what}: logit_bias must be for token ids in [0, {vocab or 'V'}); got {token!r}")
        if not isinstance(bias, (int, float)) or bias != bias:
            raise ValueError(f"{what}: logit_bias must be numbers; got {bias!r} for token {token}")
