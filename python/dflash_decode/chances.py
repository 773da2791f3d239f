"""How likely a draft is to be accepted, by what became of earlier ones."""

import math
import operator
from collections.abc import Sequence
from itertools import accumulate

from .lookup import LONGEST

_PRIOR, _MEMORY = 2.0, 60.0  # the certainty of the start values of a calibration, and the most that it gets to


class Calibration:
    """The probability that a draft is accepted, given that those before it were, by confidence and position:

        sigmoid(bias[position] + slope * logit(confidence))

    start: a slope, and a bias for each position; None: 1 and 0, the confidences themselves. Every verified draft moves
    them, by a Newton step of its own likelihood with as much curvature as the last drafts had.
    """

    def __init__(self, positions: int, start: tuple[float, Sequence[float]] | None = None):
        self.slope, given = start or (1.0, (0.0,))
        self.shared, self.bias = 0.0, [given[min(i, len(given) - 1)] for i in range(positions)]
        self.certain = {"slope": _PRIOR, "shared": _PRIOR} | {i: 2 * _PRIOR for i in range(positions)}

    def __call__(self, position: int, confidence: float) -> float:
        return _sigmoid(self.shared + self.bias[position] + self.slope * _logit(confidence))

    def together(self, confidences: Sequence[float]) -> list[float]:
        """The probability that draft 1 ... j are all accepted, for each j."""
        return list(accumulate(map(self, range(len(confidences)), confidences), operator.mul))

    def observe(self, position: int, confidence: float, accepted: bool) -> None:
        x, p = _logit(confidence), self(position, confidence)
        off, curvature = accepted - p, p * (1.0 - p)
        self.slope += self._step("slope", x, off, curvature)
        self.shared += self._step("shared", 1.0, off, curvature)
        self.bias[position] += self._step(position, 1.0, off, curvature)

    def _step(self, name, x, off, curvature):
        certain = self.certain[name] = min(self.certain[name] + curvature * x * x, _MEMORY)
        return off * x / certain


class Matches:
    """The probability that a draft from the text is accepted, given that those before it were, by the number of tokens
    before it that agree. At first its odds are n**1.25 / 2 for n of them."""

    def __init__(self) -> None:
        self.known = Calibration(LONGEST, (1.0, [math.log(n**1.25 / 2) for n in range(1, LONGEST + 1)]))
        self._together: dict[int, tuple[float, ...]] = {}  # by the first draft's match: what is known now

    def __call__(self, matched: int) -> float:
        return self.known(min(matched, LONGEST) - 1, 0.5)

    def together(self, matched: int, count: int) -> Sequence[float]:
        """The probability that draft 1 ... j are all accepted, for each j up to `count`, after a match of so many."""
        known = self._together.get(matched, ())
        if len(known) < count:
            each = map(self, range(matched, matched + max(count, LONGEST)))
            known = self._together[matched] = tuple(accumulate(each, operator.mul))
        return known[:count]

    def observe(self, matched: int, accepted: bool) -> None:
        self.known.observe(min(matched, LONGEST) - 1, 0.5, accepted)
        self._together.clear()


def _sigmoid(z: float) -> float:
    return 1.0 / (1.0 + math.exp(-max(-30.0, min(30.0, z))))


def _logit(p: float) -> float:
    p = min(p, 1 - 1e-4) if p > 1e-4 else 1e-4  # NaN too
    return math.log(p / (1.0 - p))
