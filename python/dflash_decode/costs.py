"""What a step costs: seconds of its parts by rows, measured on the loop's own passes and refined while they run."""

import contextlib
import hashlib
import json
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping

from .cache import cache_dir, write_whole

# How far one time moves the estimate of its size, and of sizes far from it: a machine under load slows every size, a
# wrong estimate is wrong at some. A single time counts as at most twice or half of what was expected.
_OWN, _OTHERS, _MOST = 0.35, 0.1, math.log(2.0)


class Curve:
    """Seconds by size. Between measured sizes it is linear, beyond them proportional, and it never falls.

    measured: sizes and their seconds, at least one.
    """

    def __init__(self, measured: Mapping[int, float]):
        if not measured or not all(n > 0 and 0 < s < math.inf for n, s in measured.items()):
            raise ValueError(f"Curve: measured must have positive sizes and seconds; got {dict(measured)}")
        self._log = {n: math.log(measured[n]) for n in sorted(measured)}
        self._settle()

    def _settle(self) -> None:
        seconds, highest = [], 0.0
        for log in self._log.values():
            highest = max(highest, math.exp(log))
            seconds.append(highest)
        self._now = list(self._log), seconds  # at once: an interrupt leaves the one before

    def __call__(self, size: int) -> float:
        sizes, seconds = self._now
        at = bisect_left(sizes, size)
        if at == len(sizes):
            return seconds[-1] * size / sizes[-1]
        if at == 0 or sizes[at] == size:
            return seconds[at]
        share = (size - sizes[at - 1]) / (sizes[at] - sizes[at - 1])
        return seconds[at - 1] + share * (seconds[at] - seconds[at - 1])

    def observe(self, size: int, seconds: float) -> None:
        """Takes one more time into the estimate."""
        off = max(-_MOST, min(_MOST, math.log(max(seconds, 1e-9) / self(size))))
        log = self._log | {size: math.log(self(size))}
        self._log = {n: log[n] + off * (_OTHERS + (_OWN - _OTHERS) * _closeness(n, size)) for n in sorted(log)}
        self._settle()

    def table(self) -> dict[int, float]:
        """The estimate at every size that was measured or observed."""
        return dict(zip(*self._now, strict=True))


def _closeness(a: int, b: int) -> float:
    """1 of equal sizes, 1/16 an octave away."""
    return (min(a, b) / max(a, b)) ** 4


class StepCosts:
    """Seconds of a verify pass and of a draft, by rows: those of a draft are its blocks' tokens.

    verify, draft: what was measured, by size.
    """

    def __init__(self, verify: Mapping[int, float], draft: Mapping[int, float]):
        self.verify, self.draft = Curve(verify), Curve(draft)


def remembered(key: object, measure: Callable[[], StepCosts]) -> StepCosts:
    """What `measure` returned for this key before, from the user's cache directory, or what it returns now.

    key: all that costs depend on, in what JSON can write. A cache that cannot be read or written is no error.
    """
    words = json.dumps(key, sort_keys=True)
    folder = cache_dir()
    if folder is None:
        return measure()
    file = folder / "costs" / f"{hashlib.sha256(words.encode()).hexdigest()[:24]}.json"
    try:
        found = json.loads(file.read_text())
        if found["key"] == json.loads(words):
            verify, draft = ({int(n): float(s) for n, s in found[name]} for name in ("verify", "draft rows"))
            return StepCosts(verify, draft)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    costs = measure()
    curves = {"verify": costs.verify, "draft rows": costs.draft}
    tables = {name: sorted(curve.table().items()) for name, curve in curves.items()}
    with contextlib.suppress(OSError):
        write_whole(file, json.dumps({"key": json.loads(words), **tables}))
    return costs


def pass_sizes(most: int) -> list[int]:
    """Rows that a pass can have, up to `most`: all up to 8, then four an octave, so that few are padding."""
    return sorted({pass_size(rows, most) for rows in range(1, most + 1)})


def pass_size(rows: int, most: int) -> int:
    """The smallest such size that holds `rows`."""
    if rows <= 8:
        return rows
    step = 1 << ((rows - 1).bit_length() - 3)
    return min(-(-rows // step) * step, most)
