"""How many drafts of each request are worth verifying in a step: a matter of time alone, as the output is the same.

A draft that was made is worth a row of the verify pass if the tokens that it adds come faster than the loop's others:

    p[b, j]  = probability that drafts 1 ... j of request b are all accepted = product of q(i, confidence[b, i])
    widths   = the rows that maximize   sum of p over verified drafts - rate * seconds(rows)

with the loop's own rate in tokens a second: a row must win more tokens than its time would bring elsewhere (the reward
of a renewal process is maximal where no part of a cycle earns less than the average). q is calibrated by what became of
drafts (Calibration); it begins as the drafter's own record says, or as the confidence itself.

Whether to draft at all is decided before confidences are known, from what drafting was worth in the request's last
steps, tokens less their time at that rate; drafts are made for as many requests as pay for them. A request that does
not pay is tried again now and then, for about 1 % of the time, and where all drafting pays a step drafts nothing now
and then: what is never done has a cost that nobody knows. Where it was not as expected, the next trial comes soon.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from .costs import StepCosts
from .forecast import Forecast

_PRIOR, _MEMORY = 2.0, 60.0  # the certainty of the start values of a calibration, and the most that it gets to
_NEW, _SHARED = 0.25, 0.02  # how far a step moves what drafting is worth, of its request and of all
_RATE = 0.05  # and the rate
_TRIALS, _FIRST_WAIT, _LONGEST_WAIT = 0.01, 4, 64  # share of the time; steps
_MIDDLING = 0.6  # confidence, before there is any
_SURPRISE = 1.2  # times that a step took more or less than was expected
_GRANTED = 40  # baseline steps that trials may take beyond their share of the time


class Policy(Protocol):
    """Chooses widths. `WidthPolicy` follows measured costs; an engine, or a test, can have another."""

    def to_draft(self, requests: Sequence["Outlook"]) -> list[int]:
        """Indices of the requests to draft for in this step."""

    def widths(self, requests: Sequence["Outlook"], confidences: Sequence[Sequence[float]], limits: Sequence[int],
               together: bool = False) -> list[int]:
        """Rows of each request to verify, from 1 to its limit and 1 + the number of its confidences.

        confidences: the drafter's probability of each draft of a request; none where nothing was drafted. together: all
        requests must have one width.
        """

    def took(self, part: str, size: int, seconds: float) -> None:
        """Tells what a verify pass of so many rows, or a draft for so many requests, took (part "verify", "draft")."""

    def verified(self, requests: Sequence["Outlook"], confidences: Sequence[Sequence[float]], widths: Sequence[int],
                 accepted: Sequence[int]) -> None:
        """Tells what became of the drafts: how many of each request's verified ones were accepted."""


@dataclass
class Outlook:
    """What a policy remembers of one request. worth: of drafting for it, in tokens a step; None: as of all. idle: steps
    since it drafted. paid: whether its last drafts did."""

    worth: float | None = None
    idle: int = 0
    paid: bool = True


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


class WidthPolicy:
    """Widths by measured cost and the drafter's confidence.

    block: most tokens of a block, the anchor included. costs: of this loop's passes. rows: the rows of the pass that
    holds so many, as passes come in sizes. start: as for Calibration.
    """

    def __init__(self, block: int, costs: StepCosts, rows: Callable[[int], int] = lambda rows: rows,
                 start: tuple[float, Sequence[float]] | None = None):
        self.block, self.costs, self.rows = block, costs, rows
        self.calibration = Calibration(block - 1, start)
        self.tokens = self.seconds = 1.0  # a step's, lately, over those of a baseline step
        self.worth: float | None = None  # of drafting for a request, as it was on the average
        self.spent = self.on_trials = 0.0
        self.idle, self.wait = 0, _FIRST_WAIT  # steps since anybody drafted, and after which one is tried again
        self.since_plain, self.plain_wait, self.surprised = 0, _LONGEST_WAIT, False
        self._trial = self._astonished = False  # whether the last draft was one, and the last trial a surprise
        self.forecast = Forecast()
        self._expected = 0.0  # tokens of the step

    def rate(self, requests: int) -> float:
        """Tokens a second that a step of so many requests should bring."""
        return max(self.tokens / self.seconds, 1.0) * requests / self.costs.verify(self.rows(requests))

    def to_draft(self, requests: Sequence[Outlook]) -> list[int]:
        n = len(requests)
        if not n:
            return []
        rate, worth_of_all = self.rate(n), self._worth(n)
        worth = [worth_of_all if r.worth is None else r.worth for r in requests]
        order = sorted(range(n), key=lambda i: -worth[i])
        best, chosen, total = 0.0, 0, 0.0
        for k, i in enumerate(order, 1):
            total += worth[i]
            net = total - rate * self.costs.draft(k)
            if net > best:
                best, chosen = net, k
        drafted = order[:chosen]
        self._trial = False
        if self.since_plain >= self.plain_wait:
            return []
        granted = _GRANTED * self.costs.verify(self.rows(n))
        if not drafted and self.idle >= self.wait and self.on_trials <= _TRIALS * self.spent + granted:
            drafted = [max(order, key=lambda i: requests[i].idle)]
            self._trial = True
        return sorted(drafted)

    def _worth(self, requests: int) -> float:
        """What drafting for a request is worth; at first, with drafts of a middling confidence."""
        if self.worth is not None:
            return self.worth
        rate, left, total = self.rate(requests), 1.0, 0.0
        row = rate * (self.costs.verify(self.rows(requests * self.block)) - self.costs.verify(self.rows(requests)))
        row /= requests * max(self.block - 1, 1)
        for position in range(self.block - 1):
            left *= self.calibration(position, _MIDDLING)
            total += max(left - row, 0.0)
        self.worth = total
        return total

    def _chances(self, confidences: Sequence[float], limit: int) -> list[float]:
        """The probability that draft 1 ... j are all accepted, for each j within the limit."""
        left, chances = 1.0, []
        for j, confidence in enumerate(confidences[:limit - 1]):
            left *= self.calibration(j, confidence)
            chances.append(left)
        return chances

    def widths(self, requests: Sequence[Outlook], confidences: Sequence[Sequence[float]], limits: Sequence[int],
               together: bool = False) -> list[int]:
        n, chances = len(requests), [self._chances(*pair) for pair in zip(confidences, limits, strict=True)]
        rate, verify = self.rate(n), self.costs.verify
        if together:
            most = max(map(len, chances), default=0)
            width = max(range(1, most + 2), key=lambda w: (
                sum(sum(c[:w - 1]) for c in chances) - rate * verify(self.rows(n * w)), -w))
            widths = [width] * n
        else:
            # A request's chances fall, so the best rows are the largest chances of all.
            ranked = sorted(((p, -j, i) for i, c in enumerate(chances) for j, p in enumerate(c)), reverse=True)
            best, chosen, total = -rate * verify(self.rows(n)), 0, 0.0
            for extra, (p, _, _) in enumerate(ranked, 1):
                total += p
                # Where rows are padded anyway the next ones are free.
                if (net := total - rate * verify(self.rows(n + extra))) > best:
                    best, chosen = net, extra
            widths = [1] * n
            if self._trial:  # what nobody verifies teaches nothing
                chosen = len(ranked) if self._astonished else max(chosen, min(len(ranked), 1))
            for _, _, i in ranked[:chosen]:
                widths[i] += 1
        self._learn(requests, confidences, chances, widths, rate)
        self._expected = n + sum(sum(chance[:width - 1]) for chance, width in zip(chances, widths, strict=True))
        return widths

    def _learn(self, requests, confidences, chances, widths, rate):
        """Takes what this step's drafts are worth into what drafting is."""
        n, rows, of_all = len(requests), sum(widths), self._worth(len(requests))
        extra = self.costs.verify(self.rows(rows)) - self.costs.verify(self.rows(n))
        row = rate * extra / max(rows - n, 1)
        for request, confidence, chance, width in zip(requests, confidences, chances, widths, strict=True):
            if not confidence:
                request.idle += 1
                continue
            worth = sum(chance[:width - 1]) - row * (width - 1)
            before = of_all if request.worth is None else request.worth
            request.worth = before + _NEW * (worth - before)
            self.worth = of_all = of_all + _SHARED * (worth - of_all)
            request.idle, request.paid = 0, worth > rate * self.costs.draft(1)
            if request.paid and self._trial:
                request.worth = max(request.worth, worth)  # it was too long ago to be averaged

    def took(self, part: str, size: int, seconds: float) -> None:
        curve = self.costs.verify if part == "verify" else self.costs.draft
        expected = curve(size)
        off = seconds / expected
        self.forecast += Forecast(expected_seconds=expected, seconds=seconds)
        if part == "verify":
            self.surprised = not 1 / _SURPRISE < off < _SURPRISE
        curve.observe(size, seconds)

    def verified(self, requests: Sequence[Outlook], confidences: Sequence[Sequence[float]], widths: Sequence[int],
                 accepted: Sequence[int]) -> None:
        n, drafted = len(requests), sum(map(bool, confidences))
        self.forecast += Forecast(1, self._expected, n + sum(accepted))
        for confidence, width, count in zip(confidences, widths, accepted, strict=True):
            for j in range(min(count + 1, width - 1, len(confidence))):
                self.calibration.observe(j, confidence[j], j < count)
        if sum(widths) > n:
            self.since_plain += 1
        else:
            self.plain_wait = _FIRST_WAIT if self.surprised else min(2 * self.plain_wait, _LONGEST_WAIT)
            self.since_plain = 0
        self.idle = 0 if drafted else self.idle + 1
        if self._trial:
            paid = any(r.paid for r, confidence in zip(requests, confidences, strict=True) if confidence)
            self.wait = _FIRST_WAIT if paid or self.surprised else min(2 * self.wait, _LONGEST_WAIT)
        plain, seconds = self.costs.verify(self.rows(n)), self.costs.verify(self.rows(sum(widths)))
        if drafted:
            seconds += self.costs.draft(drafted)
        self.spent += seconds
        if self._trial:
            self.on_trials, self._astonished = self.on_trials + seconds - plain, self.surprised
        self.tokens += _RATE * ((n + sum(accepted)) / n - self.tokens)
        self.seconds += _RATE * (seconds / plain - self.seconds)


class FixedWidths:
    """The same width for every block: what a named block_size means."""

    def to_draft(self, requests: Sequence[Outlook]) -> list[int]:
        return list(range(len(requests)))

    def widths(self, requests: Sequence[Outlook], confidences: Sequence[Sequence[float]], limits: Sequence[int],
               together: bool = False) -> list[int]:
        widths = [min(len(c) + 1, limit) for c, limit in zip(confidences, limits, strict=True)]
        return [max(widths, default=1)] * len(widths) if together else widths

    def took(self, part: str, size: int, seconds: float) -> None:
        pass

    def verified(self, requests: Sequence[Outlook], confidences: Sequence[Sequence[float]], widths: Sequence[int],
                 accepted: Sequence[int]) -> None:
        pass


class PastWidths:
    """One width for all requests of a step, chosen before anything is drafted: by the tokens that steps of each width
    brought, and their time. For steps that are one graph, where the choice must wait for nothing."""

    def __init__(self, block: int):
        self.block = block
        self.accepted = [0.7] * (block - 1)  # share of drafts at a position, given that those before were
        self.seconds: dict[tuple[int, int], float] = {}
        self.count = 0

    def steps(self) -> tuple[int, ...]:
        """The widths that a step can have."""
        return tuple(sorted({1, max(self.block // 2, 1), self.block}))

    def step(self, requests: int) -> int:
        """The width of the next step."""
        self.count += 1
        unknown = [w for w in reversed(self.steps()) if (requests, w) not in self.seconds]
        if unknown:
            return unknown[0]
        if self.count % 64 == 0:
            return self.steps()[self.count // 64 % len(self.steps())]
        return max(self.steps(), key=lambda w: self._tokens(w) / self.seconds[requests, w])

    def _tokens(self, width: int) -> float:
        left, total = 1.0, 1.0
        for share in self.accepted[:width - 1]:
            left *= share
            total += left
        return total

    def observe(self, requests: int, width: int, seconds: float, accepted: Sequence[int]) -> None:
        before = self.seconds.get((requests, width), seconds)
        self.seconds[requests, width] = before + 0.2 * (seconds - before)
        for count in accepted:
            for j in range(min(count + 1, width - 1)):
                self.accepted[j] += 0.05 * ((j < count) - self.accepted[j])
