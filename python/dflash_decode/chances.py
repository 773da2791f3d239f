"""How likely a draft is to be accepted: the drafter's confidence, corrected by what became of its drafts."""

import math
from collections.abc import Sequence

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

    def observe(self, position: int, confidence: float, accepted: bool) -> None:
        x, p = _logit(confidence), self(position, confidence)
        off, curvature = accepted - p, p * (1.0 - p)
        self.slope += self._step("slope", x, off, curvature)
        self.shared += self._step("shared", 1.0, off, curvature)
        self.bias[position] += self._step(position, 1.0, off, curvature)

    def _step(self, name, x, off, curvature):
        certain = self.certain[name] = min(self.certain[name] + curvature * x * x, _MEMORY)
        return off * x / certain


def _sigmoid(z: float) -> float:
    return 1.0 / (1.0 + math.exp(-max(-30.0, min(30.0, z))))


def _logit(p: float) -> float:
    p = min(p, 1 - 1e-4) if p > 1e-4 else 1e-4  # NaN too
    return math.log(p / (1.0 - p))
