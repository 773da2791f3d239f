"""How many drafts of each request are worth verifying in a step: a matter of time alone, as the output is the same.

A draft that was made is worth a row of the verify pass if the tokens that it adds come faster than the loop's others:

    p[b, j]  = probability that drafts 1 ... j of request b are all accepted = product of q(i, confidence[b, i])
    widths   = the rows that maximize   sum of p over verified drafts - rate * seconds(rows)

with the loop's own rate in tokens a second: a row must win more tokens than its time would bring elsewhere (the reward
of a renewal process is maximal where no part of a cycle earns less than the average). q is calibrated by what became of
drafts (Calibration); it begins as the drafter's own record says, or as the confidence itself.

Whether to draft at all, and how many tokens, is decided before confidences are known, from what drafts of each length
were worth in the request's last steps, tokens less their time at that rate; drafts are made for as many requests as pay
for them, with the drafter's context of all tokens since their last draft. A request that does not pay is tried again
now and then, for about 1 % of the time, and where all drafting pays a step drafts nothing now and then, or a whole
block: what is never done has a cost, and a worth, that nobody knows. Where it was not as expected, the next trial comes
soon.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from .chances import Calibration
from .costs import StepCosts
from .forecast import Forecast

_NEW, _SHARED = 0.25, 0.02  # how far a step moves what drafting is worth, of its request and of all
_RATE = 0.05  # and the rate
_TRIALS, _FIRST_WAIT, _LONGEST_WAIT = 0.01, 4, 64  # share of the time; steps
_MARGIN = 1.2  # times its cost that a draft must be worth: of several estimates the best one is too good
_MIDDLING = 0.6  # confidence, before there is any
_WHOLE_AGAIN = 32  # drafts of fewer tokens, after which a whole block is drafted
_SURPRISE = 1.2  # times that a step took more or less than was expected
_GRANTED = 40  # baseline steps that trials may take beyond their share of the time


class Policy(Protocol):
    """Chooses widths. `WidthPolicy` follows measured costs; an engine, or a test, can have another."""

    def to_draft(self, requests: Sequence["Outlook"]) -> tuple[list[int], int]:
        """Indices of the requests to draft for in this step, and the tokens of their blocks, each anchor included."""

    def widths(self, requests: Sequence["Outlook"], confidences: Sequence[Sequence[float]], limits: Sequence[int],
               together: bool = False) -> list[int]:
        """Rows of each request to verify, from 1 to its limit and 1 + the number of its confidences.

        confidences: the drafter's probability of each draft of a request; none where nothing was drafted. together: all
        requests must have one width.
        """

    def took(self, part: str, size: int, seconds: float) -> None:
        """Tells what a verify pass (part "verify") or a draft (part "draft") of so many rows took, or for how many
        requests the drafter's context was brought up to date before that in which time (part "context")."""

    def verified(self, requests: Sequence["Outlook"], confidences: Sequence[Sequence[float]], widths: Sequence[int],
                 accepted: Sequence[int]) -> None:
        """Tells what became of the drafts: how many of each request's verified ones were accepted."""


@dataclass
class Outlook:
    """What a policy remembers of one request. worth: of drafts of each length for it, in tokens a step; None: as of
    all. idle: steps since it drafted. paid: whether its last drafts did."""

    worth: list[float] | None = None
    idle: int = 0
    paid: bool = True


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
        self.draft_widths = draft_widths(block)
        self.worth: list[float] | None = None  # of a request's drafts of each length, as it was on the average
        self.spent = self.on_trials = 0.0
        self.idle, self.wait = 0, _FIRST_WAIT  # steps since anybody drafted, and after which one is tried again
        self.since_plain, self.plain_wait, self.surprised = 0, _LONGEST_WAIT, False
        self.drafting = block  # tokens of the last draft's blocks
        self.narrow = 0  # drafts since one of a whole block
        self._trial = self._astonished = False  # whether the last draft was one, and the last trial a surprise
        self.context = 0.0  # seconds in which a request's tokens of a step become the drafter's context
        self._sums = Forecast()
        self._expected = 0.0  # tokens of the step

    @property
    def forecast(self) -> Forecast:
        """Of all steps so far."""
        return replace(self._sums)

    def rate(self, requests: int) -> float:
        """Tokens a second that a step of so many requests should bring."""
        return max(self.tokens / self.seconds, 1.0) * requests / self.costs.verify(self.rows(requests))

    def draft_seconds(self, requests: int, width: int) -> float:
        """What a draft of so many blocks takes, its context included."""
        return self.costs.draft(requests * width) + requests * self.context

    def to_draft(self, requests: Sequence[Outlook]) -> tuple[list[int], int]:
        n = len(requests)
        if not n:
            return [], self.block
        rate, worth_of_all = self.rate(n), self._worth(n)
        best, drafted, self.drafting = 0.0, [], self.block
        narrowest = 0 if self.narrow < _WHOLE_AGAIN else len(self.draft_widths) - 1
        for at in reversed(range(narrowest, len(self.draft_widths))):
            width = self.draft_widths[at]
            worth = [(worth_of_all if r.worth is None else r.worth)[at] for r in requests]
            order, total = sorted(range(n), key=lambda i: -worth[i]), 0.0
            for k, i in enumerate(order, 1):
                total += worth[i]
                net = total - _MARGIN * rate * self.draft_seconds(k, width)
                if net > best:
                    best, drafted, self.drafting = net, order[:k], width
        self._trial = False
        if self.since_plain >= self.plain_wait:
            return [], self.block
        granted = _GRANTED * self.costs.verify(self.rows(n))
        if not drafted and self.idle >= self.wait and self.on_trials <= _TRIALS * self.spent + granted:
            drafted = [max(range(n), key=lambda i: requests[i].idle)]
            self._trial = True
        if drafted:
            self.narrow = 0 if self.drafting == self.block else self.narrow + 1
        return sorted(drafted), self.drafting

    def _worth(self, requests: int) -> list[float]:
        """What a request's drafts of each length are worth; at first, with drafts of a middling confidence."""
        if self.worth is None:
            rate = self.rate(requests)
            row = self.costs.verify(self.rows(requests * self.block)) - self.costs.verify(self.rows(requests))
            row *= rate / (requests * max(self.block - 1, 1))
            self.worth = self._by_width([], self._chances([_MIDDLING] * (self.block - 1), self.block), row)
        return self.worth

    def _by_width(self, verified: Sequence[float], others: Sequence[float], row: float) -> list[float]:
        """What drafts of each length are worth. others: chances of later drafts, of which those count that pay."""
        gains = [chance - row for chance in verified] + [max(chance - row, 0.0) for chance in others]
        return [sum(gains[:w - 1]) for w in self.draft_widths]

    def _chances(self, confidences: Sequence[float], limit: int) -> list[float]:
        """The probability that draft 1 ... j are all accepted, for each j within the limit."""
        left, chances = 1.0, []
        for j, confidence in enumerate(confidences[:limit - 1]):
            left *= self.calibration(j, confidence)
            chances.append(left)
        return chances

    def widths(self, requests: Sequence[Outlook], confidences: Sequence[Sequence[float]], limits: Sequence[int],
               together: bool = False) -> list[int]:
        if not any(confidences):
            for request in requests:
                request.idle += 1
            self._expected = len(requests)
            return [1] * len(requests)
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
            worth = self._by_width(chance[:width - 1], self._beyond(chance, confidence, width), row)
            before = of_all if request.worth is None else request.worth
            request.worth = _moved(before, worth, _NEW)
            self.worth = of_all = _moved(of_all, worth, _SHARED)
            request.idle = 0
            request.paid = any(w > _MARGIN * rate * self.draft_seconds(1, q)
                               for w, q in zip(worth, self.draft_widths, strict=True))
            if request.paid and self._trial:  # it was too long ago to be averaged
                request.worth = list(map(max, request.worth, worth))

    def _beyond(self, chances: Sequence[float], confidence: Sequence[float], width: int) -> list[float]:
        """Chances of the drafts after a short draft, had there been any: each as sure as its last one. None where that
        one was not worth verifying."""
        left, found = chances[-1] if chances else 0.0, []
        for j in range(len(chances), self.block - 1) if chances and width == len(confidence) + 1 else ():
            left *= self.calibration(j, confidence[-1])
            found.append(left)
        return found

    def took(self, part: str, size: int, seconds: float) -> None:
        if part == "context":
            self.context += _RATE * (seconds / size - self.context) if self.context else seconds / size
            return
        curve = self.costs.verify if part == "verify" else self.costs.draft
        expected = curve(size)
        off = seconds / expected
        self._sums.expected_seconds += expected
        self._sums.seconds += seconds
        if part == "verify":
            self.surprised = not 1 / _SURPRISE < off < _SURPRISE
        curve.observe(size, seconds)

    def verified(self, requests: Sequence[Outlook], confidences: Sequence[Sequence[float]], widths: Sequence[int],
                 accepted: Sequence[int]) -> None:
        n, drafted = len(requests), sum(map(bool, confidences))
        self._sums.steps += 1
        self._sums.expected_tokens += self._expected
        self._sums.tokens += n + sum(accepted)
        for confidence, width, count in zip(confidences, widths, accepted, strict=True) if drafted else ():
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
            seconds += self.draft_seconds(drafted, self.drafting)
        self.spent += seconds
        if self._trial:
            self.on_trials, self._astonished = self.on_trials + seconds - plain, self.surprised
        self.tokens += _RATE * ((n + sum(accepted)) / n - self.tokens)
        self.seconds += _RATE * (seconds / plain - self.seconds)


def draft_widths(block: int) -> list[int]:
    """The tokens of blocks that are drafted: those of 2 drafts, of 4 and so on, and of a whole block."""
    return sorted({*(w for i in range(1, block) if (w := (1 << i) + 1) < block), block})


def _moved(before: Sequence[float], now: Sequence[float], share: float) -> list[float]:
    return [a + share * (b - a) for a, b in zip(before, now, strict=True)]


class FixedWidths:
    """The same width for every block: what a named block_size means.

    block: the tokens of a block.
    """

    def __init__(self, block: int):
        self.block = block

    def to_draft(self, requests: Sequence[Outlook]) -> tuple[list[int], int]:
        return list(range(len(requests))), self.block

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
