"""What a step costs: seconds of its parts by rows, measured on the loop's own passes and refined while they run."""

import contextlib
import hashlib
import json
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from statistics import median

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
        sizes = sorted(measured)
        self._set(sizes, [math.log(measured[n]) for n in sizes])

    def _set(self, sizes: list[int], logs: list[float]) -> None:
        # At once: an interrupt leaves the one before.
        self._now = sizes, logs, list(accumulate(map(math.exp, logs), max))

    def __call__(self, size: int) -> float:
        sizes, _, seconds = self._now
        at = bisect_left(sizes, size)
        if at == len(sizes):
            return seconds[-1] * size / sizes[-1]
        if at == 0 or sizes[at] == size:
            return seconds[at]
        share = (size - sizes[at - 1]) / (sizes[at] - sizes[at - 1])
        return seconds[at - 1] + share * (seconds[at] - seconds[at - 1])

    def observe(self, size: int, seconds: float) -> None:
        """Takes one more time into the estimate."""
        expected = math.log(self(size))
        off = max(-_MOST, min(_MOST, math.log(max(seconds, 1e-9)) - expected))
        sizes, logs, _ = self._now
        at = bisect_left(sizes, size)
        if at < len(sizes) and sizes[at] == size:
            logs = [*logs[:at], expected, *logs[at + 1:]]
        else:
            sizes, logs = [*sizes[:at], size, *sizes[at:]], [*logs[:at], expected, *logs[at:]]
        self._set(sizes, [log + off * _pull(n, size) for n, log in zip(sizes, logs, strict=True)])

    def table(self) -> dict[int, float]:
        """The estimate at every size that was measured or observed."""
        sizes, _, seconds = self._now
        return dict(zip(sizes, seconds, strict=True))


@lru_cache(4096)
def _pull(size: int, observed: int) -> float:
    """How far a time of one size moves another's estimate: sizes an octave apart are 1/16 as close as equal ones."""
    return _OTHERS + (_OWN - _OTHERS) * (min(size, observed) / max(size, observed)) ** 4


class StepCosts:
    """Seconds of a verify pass and of a draft, by rows: those of a draft are its blocks' tokens.

    verify, draft: what was measured, by size.
    """

    def __init__(self, verify: Mapping[int, float], draft: Mapping[int, float]):
        self.verify, self.draft = Curve(verify), Curve(draft)


Times = dict[str, dict[int, float]]  # seconds of verify passes ("verify") and of drafts ("draft"), by size


def least(times: Mapping[int, float]) -> dict[int, float]:
    """Times without what other work on the machine added: no size takes longer than a larger one did."""
    found, lowest = {}, math.inf
    for size in sorted(times, reverse=True):
        found[size] = lowest = min(lowest, times[size])
    return found


def remembered(key: object, measure: Callable[[bool], Times]) -> StepCosts:
    """The least that was ever measured for this key, kept in the user's cache directory, as fast as the machine is now.

    key: all that costs depend on, in what JSON can write. measure(few): times by size, of few sizes if all are known.
    A cache that cannot be read or written is no error.
    """
    words, folder = json.dumps(key, sort_keys=True), cache_dir()
    file = folder and folder / "costs" / f"{hashlib.sha256(words.encode()).hexdigest()[:24]}.json"
    known = _read(file, json.loads(words)) if file else None
    now = measure(known is not None)
    before = known or {part: {} for part in now}
    best = {part: least(before[part] | {n: min(t, before[part].get(n, t)) for n, t in now[part].items()})
            for part in now}
    if file and best != known:
        tables = {part: sorted(times.items()) for part, times in best.items()}
        with contextlib.suppress(OSError):
            write_whole(file, json.dumps({"key": json.loads(words), **tables}))
    pace = median(t / best[part][n] for part in now for n, t in now[part].items())
    return StepCosts(*({n: pace * t for n, t in best[part].items()} for part in ("verify", "draft")))


def _read(file: Path, key: object) -> Times | None:
    try:
        found = json.loads(file.read_text())
        if found["key"] == key:
            known = {part: {int(n): float(t) for n, t in found[part]} for part in ("verify", "draft")}
            StepCosts(**known)
            return known
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        pass
    return None


def pass_sizes(most: int) -> list[int]:
    """Rows that a pass can have, up to `most`: all up to 8, then four an octave, so that few are padding."""
    return sorted({pass_size(rows, most) for rows in range(1, most + 1)})


def pass_size(rows: int, most: int) -> int:
    """The smallest such size that holds `rows`."""
    if rows <= 8:
        return rows
    step = 1 << ((rows - 1).bit_length() - 3)
    return min(-(-rows // step) * step, most)
