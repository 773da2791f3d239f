"""How many drafts of each request are worth verifying in a step: a matter of time alone, as the output is the same.

A draft that was made is worth a row of the verify pass if the tokens that it adds come faster than the loop's others:

    p[b, j]  = probability that drafts 1 ... j of request b are all accepted = product of q(i, confidence[b, i])
    widths   = the rows that maximize   sum of p over verified drafts - rate * seconds(rows)

with the loop's own rate in tokens a second: a row must win more tokens than its time would bring elsewhere (the reward
of a renewal process is maximal where no part of a cycle earns less than the average). q is calibrated by what became of
drafts (Calibration); it begins as the drafter's own record says, or as the confidence itself.

A request whose last tokens stood in its text before has drafts that cost nothing: what followed then (lookup.py). For
them q depends on how many tokens agree. Of these drafts and the drafter's a request gets those that are likelier where
they first differ, and the drafter is asked where it can be expected to do better by more than its time.

Whether to draft at all, and how many tokens, is decided before confidences are known, from what drafts of each length
were worth in the request's last steps, tokens less their time at that rate; drafts are made for as many requests as pay
for them, with the drafter's context of all tokens since their last draft. A request that does not pay is tried again
now and then, for about 1 % of the time, and where all drafting pays a step drafts nothing now and then, or a whole
block: what is never done has a cost, and a worth, that nobody knows. Where it was not as expected, the next trial comes
soon. Where rows cost so much that even likely drafts would not pay, it comes late, as only wrong costs could make one
pay. Where all drafts together win less than choosing them takes, which is measured too, the loop decodes plainly for a
while. What drafts win is known for each number of requests, up to a power of two.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile

from .chances import Calibration, Matches
from .costs import StepCosts
from .forecast import Forecast
from .load import RATE, Load, Loads
from .lookup import Draft
from .policy import FIRST_WAIT, Outlook

_NEW, _SHARED = 0.1, 0.02  # how far a step moves what drafting is worth, of its request and of all
_TRIALS, _LONGEST_WAIT = 0.01, 64  # share of the time; steps
_MARGIN = 1.2  # times its cost that a draft must be worth: of several estimates the best one is too good
_MANY, _UNTHOUGHT = 4, 8  # requests; steps that the drafter is not thought of for them after it would not have paid
_LEAST, _FEW = 0.02, 0.25  # the share of a step that drafts must win, and of a mean row's price that each must
_MIDDLING = 0.6  # confidence, before there is any
_WHOLE_AGAIN = 32  # drafts of fewer tokens, after which a whole block is drafted
_SURPRISE = 1.2  # times that a step took more or less than was expected
_LIKELY, _SELDOM = 0.9, 16  # a draft's chance after the one before; times that a trial of what cannot pay waits longer
_GRANTED = 40  # baseline steps that trials may take beyond their share of the time


class WidthPolicy:
    """Widths by measured cost and the drafter's confidence.

    block: most tokens of a block, the anchor included. costs: of this loop's passes. rows: the rows of the pass that
    holds so many, as passes come in sizes. start: as for Calibration.
    """

    def __init__(self, block: int, costs: StepCosts, rows: Callable[[int], int] = lambda rows: rows,
                 start: tuple[float, Sequence[float]] | None = None):
        self.block, self.costs, self.rows = block, costs, rows
        self.calibration = Calibration(block - 1, start)
        self.matches = Matches()
        self.load = Loads()
        self.draft_widths = draft_widths(block)
        self.worth: list[float] | None = None  # of a request's drafts of each length, as it was on the average
        self.spent = self.on_trials = 0.0
        self.idle, self.wait = 0, FIRST_WAIT  # steps since anybody drafted, and after which one is tried again
        self.refused = -_UNTHOUGHT  # of them, when a trial was last thought of and not made
        self.since_plain, self.plain_wait, self.surprised = 0, _LONGEST_WAIT, False
        self.drafting = block  # tokens of the last draft's blocks
        self.narrow = 0  # drafts since one of a whole block
        self._tried: Outlook | None = None  # whom the step drafts for to see what that is worth
        self._astonished = False  # whether the last such step was a surprise
        self.choice = 0.0  # seconds in which the step's drafts were looked up and chosen
        self.nobody = 0  # steps to come in which the drafter is not thought of, as it would pay for nobody
        self.context = 0.0  # seconds in which a request's tokens of a step become the drafter's context
        self._sums = Forecast()
        self._expected = 0.0  # tokens of the step
        self._drafted, self._plain = 0, False  # requests that the step drafts for; whether it is to be a baseline one

    @property
    def forecast(self) -> Forecast:
        """Of all steps so far."""
        return replace(self._sums)

    def looks_up(self, requests: int) -> bool:
        return not self.load(requests).resting

    def rests(self, requests: int) -> bool:
        if not self.load(requests).resting or self._trial_is_due:
            return False
        self._tried, self._plain, self._drafted, self._expected = None, False, 0, requests
        return True

    @property
    def _trial_is_due(self) -> bool:
        return self.idle >= max(self.wait, self.refused + _UNTHOUGHT)

    def rate(self, requests: int) -> float:
        """Tokens a second that a step of so many requests should bring."""
        load = self.load(requests)
        return max(load.tokens / load.seconds, 1.0) * requests / self.costs.verify(self.rows(requests))

    def draft_seconds(self, requests: int, width: int) -> float:
        """What a draft of so many blocks takes, its context included."""
        return self.costs.draft(requests * width) + requests * self.context

    def to_draft(self, requests: Sequence[Outlook], found: Sequence[Draft]) -> tuple[list[int], int]:
        n = len(requests)
        self._tried, self._plain = None, self.since_plain >= self.plain_wait
        if not n or self._plain:
            return [], self.block
        drafted: list[int] = []
        if self.nobody and n >= _MANY:
            self.nobody -= 1
        elif not self.load(n).resting:
            row = self._row(n)
            drafted = self._paying(requests, [_gain(self._chances(draft), row) for draft in found])
            # Whatever their own texts have: to find that out takes a share of a step of many requests.
            if not drafted and n >= _MANY and not self._paying(requests, [0.0] * n):
                self.nobody = _UNTHOUGHT
        if not drafted and not self._trial_is_due:
            return [], self.drafting
        granted = _GRANTED * self.costs.verify(self.rows(n))
        others = [i for i in range(n) if i not in drafted]
        if others and self.on_trials <= _TRIALS * self.spent + granted:
            longest = max(others, key=lambda i: requests[i].idle)
            request = requests[longest]
            idle, wait = (request.idle, request.wait) if drafted else (self.idle, self.wait)
            if idle >= wait and (idle >= _SELDOM * wait or self._astonished or self._could_pay(n)):
                self.drafting = self.drafting if drafted else self.block
                drafted, self._tried = [*drafted, longest], request
        self.refused = -_UNTHOUGHT if drafted or n < _MANY else self.idle
        if drafted:
            self.narrow = 0 if self.drafting == self.block else self.narrow + 1
        return sorted(drafted), self.drafting

    def _paying(self, requests: Sequence[Outlook], there: Sequence[float]) -> list[int]:
        """The requests that drafts of `drafting` tokens should pay for, which is set. there: what the drafts from their
        own texts are worth."""
        n = len(requests)
        rate, worth_of_all = self.rate(n), self._worth(n)
        best, drafted, self.drafting = 0.0, [], self.block
        narrowest = 0 if self.narrow < _WHOLE_AGAIN else len(self.draft_widths) - 1
        for at in reversed(range(narrowest, len(self.draft_widths))):
            width = self.draft_widths[at]
            worth = [_more((worth_of_all if r.worth is None else r.worth)[at], than)
                     for r, than in zip(requests, there, strict=True)]
            order, total = sorted(range(n), key=lambda i: -worth[i]), 0.0
            for k, i in enumerate(order, 1):
                total += worth[i]
                net = total - _MARGIN * rate * self.draft_seconds(k, width)
                if net > best:
                    best, drafted, self.drafting = net, order[:k], width
        return drafted

    def _row(self, requests: int) -> float:
        """The tokens that must come of another row of the verify pass."""
        verify, most = self.costs.verify, requests * self.block
        more = verify(self.rows(most)) - verify(self.rows(requests))
        return self.rate(requests) * more / max(most - requests, 1)

    def _worth(self, requests: int) -> list[float]:
        """What a request's drafts of each length are worth; at first, with drafts of a middling confidence."""
        if self.worth is None:
            middling = self.calibration.together([_MIDDLING] * (self.block - 1))
            self.worth = self._by_width([], middling, self._row(requests))
        return self.worth

    def _by_width(self, verified: Sequence[float], others: Sequence[float], row: float) -> list[float]:
        """What drafts of each length are worth. others: chances of later drafts, of which those count that pay."""
        gains = [chance - row for chance in verified] + [max(chance - row, 0.0) for chance in others]
        return [sum(gains[:w - 1]) for w in self.draft_widths]

    def _could_pay(self, requests: int) -> bool:
        """Whether likely drafts of one request would."""
        likely = [_LIKELY**j for j in range(1, self.block)]
        return self._pays(self._by_width([], likely, self._row(requests)), self.rate(requests))

    def _pays(self, worth: Sequence[float], rate: float) -> bool:
        """Whether a request's drafts of any length are worth their time."""
        return any(w > _MARGIN * rate * self.draft_seconds(1, q)
                   for w, q in zip(worth, self.draft_widths, strict=True))

    def _better(self, ours: Draft, other: Draft) -> Draft:
        """The one that is more likely where they first differ."""
        for j, (a, b) in enumerate(zip(ours.tokens, other.tokens, strict=False)):
            if a != b:
                return other if self._chance(other, j) > self._chance(ours, j) else ours
        return other if len(other.tokens) > len(ours.tokens) else ours

    def _chance(self, draft: Draft, j: int) -> float:
        """That draft j is accepted if those before it are."""
        return self.matches(draft.matched + j) if draft.matched else self.calibration(j, draft.confidences[j])

    def _chances(self, draft: Draft, most: int | None = None) -> Sequence[float]:
        """The probability that draft 1 ... j are all accepted, for each j up to `most`."""
        if draft.matched:
            return self.matches.together(draft.matched, len(draft.tokens[:most]))
        return self.calibration.together(draft.confidences[:most])

    def choose(self, requests: Sequence[Outlook], drafted: Sequence[Draft], found: Sequence[Draft],
               limits: Sequence[int], together: bool = False) -> list[Draft]:
        self._drafted, n = sum(bool(draft.tokens) for draft in drafted), len(requests)
        best: Sequence[Draft] = found
        of_drafter: list[Sequence[float]] = [()] * n
        if self._drafted:
            best = [ours if request is self._tried and ours.tokens else self._better(ours, other)
                    for request, ours, other in zip(requests, drafted, found, strict=True)]
            of_drafter = [self._chances(draft, limit - 1) for draft, limit in zip(drafted, limits, strict=True)]
        chances = [made if draft is ours else self._chances(draft, limit - 1) for draft, ours, made, limit in zip(
            best, drafted, of_drafter, limits, strict=True)]
        if self._plain:
            chances = [()] * n
        widths = self._widths(chances, together)
        for i, made in enumerate(of_drafter):
            if requests[i] is self._tried and made:  # what nobody verifies teaches nothing
                widths[i] = len(made) + 1 if self._astonished and self._drafted == 1 else max(widths[i], 2)
        if self._drafted:
            self._learn(requests, drafted, of_drafter, [width if draft is ours else None for width, draft, ours in zip(
                widths, best, drafted, strict=True)], sum(widths))
        else:  # most steps of many requests
            for request in requests:
                request.idle += 1
        self._expected = n + sum(sum(chance[:width - 1]) for chance, width in zip(chances, widths, strict=True))
        return [draft.cut(width - 1) for draft, width in zip(best, widths, strict=True)]

    def _widths(self, chances: Sequence[Sequence[float]], together: bool) -> list[int]:
        """The rows of each request that are worth their time, by the chances of its drafts."""
        n = len(chances)
        if not any(chances):
            return [1] * n
        rate, verify = self.rate(n), self.costs.verify
        if together:
            most = max(map(len, chances))
            width = max(range(1, most + 2), key=lambda w: (
                sum(sum(c[:w - 1]) for c in chances) - rate * verify(self.rows(n * w)), -w))
            return [min(width, len(c) + 1) for c in chances]
        # A request's chances fall, so the best rows are the largest chances of all. Where rows are padded anyway the
        # next ones are free. Of several estimates the best one is too good: one that is hardly better is not.
        few = _FEW * self._row(n)
        ranked = sorted(((p, -j, i) for i, c in enumerate(chances) for j, p in enumerate(takewhile(few.__lt__, c))),
                        reverse=True)
        plain = rate * verify(self.rows(n))
        best, chosen, total, size, cost = _LEAST * plain - plain, 0, 0.0, 0, 0.0
        for extra, (p, _, _) in enumerate(ranked, 1):
            total += p
            if (rows := self.rows(n + extra)) != size:
                size, cost = rows, rate * verify(rows)
            if total - cost > best:
                best, chosen = total - cost, extra
        widths = [1] * n
        for _, _, i in ranked[:chosen]:
            widths[i] += 1
        return widths

    def _learn(self, requests: Sequence[Outlook], drafted: Sequence[Draft], chances: Sequence[Sequence[float]],
               widths: Sequence[int | None], rows: int) -> None:
        """Takes what this step's drafts are worth into what drafting is. widths: None where the drafts are not the
        drafter's. rows: of all blocks."""
        n, of_all = len(requests), self._worth(len(requests))
        rate = self.rate(n)
        extra = self.costs.verify(self.rows(rows)) - self.costs.verify(self.rows(n))
        row = rate * extra / max(rows - n, 1)
        for request, draft, chance, width in zip(requests, drafted, chances, widths, strict=True):
            if not draft.confidences:
                request.idle += 1
                continue
            worth = self._by_width([], chance, row) if width is None else self._by_width(
                chance[:width - 1], self._beyond(chance, draft.confidences, width), row)
            before = of_all if request.worth is None else request.worth
            request.worth = _moved(before, worth, _NEW)
            self.worth = of_all = _moved(of_all, worth, _SHARED)
            request.idle = self.nobody = 0
            request.paid = self._pays(worth, rate)
            if request.paid and request is self._tried:  # it was too long ago to be averaged
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
        if part == "choice":
            self.choice = seconds
            return
        if part == "context":
            self.context += RATE * (seconds / size - self.context) if self.context else seconds / size
            return
        curve = self.costs.verify if part == "verify" else self.costs.draft
        expected = curve(size)
        off = seconds / expected
        self._sums.expected_seconds += expected
        self._sums.seconds += seconds
        if part == "verify":
            self.surprised = not 1 / _SURPRISE < off < _SURPRISE
        curve.observe(size, seconds)

    def _tell_trial(self, tried: Outlook, load: Load, rows: int, seconds: float) -> None:
        """Says when to try again. rows, of the pass without the request's drafts; seconds, of the step."""
        wait = FIRST_WAIT if (paid := tried.paid and not tried.idle) or self.surprised else None
        without = self.costs.verify(self.rows(rows))
        if self._drafted > 1:
            without += self.draft_seconds(self._drafted - 1, self.drafting)
            tried.wait = wait or min(2 * tried.wait, _LONGEST_WAIT)
        else:
            self.wait = wait or min(2 * self.wait, _LONGEST_WAIT)
            load.resting, self._astonished = 0 if paid else load.resting, self.surprised
        self.on_trials += seconds - without

    def verified(self, requests: Sequence[Outlook], drafts: Sequence[Draft], accepted: Sequence[int]) -> None:
        n, drafted, rows = len(requests), self._drafted, len(requests) + sum(len(draft.tokens) for draft in drafts)
        load = self.load(n)
        self._sums.steps += 1
        self._sums.expected_tokens += self._expected
        self._sums.tokens += n + sum(accepted)
        for draft, count in zip(drafts, accepted, strict=True):
            for j in range(min(count + 1, len(draft.tokens))):
                if draft.matched:
                    self.matches.observe(draft.matched + j, j < count)
                else:
                    self.calibration.observe(j, draft.confidences[j], j < count)
        if rows > n:
            self.since_plain += 1
        else:
            self.plain_wait = FIRST_WAIT if self.surprised else min(2 * self.plain_wait, _LONGEST_WAIT)
            self.since_plain = 0
        self.idle = 0 if drafted else self.idle + 1
        plain, seconds = self.costs.verify(self.rows(n)), self.costs.verify(self.rows(rows))
        if drafted:
            seconds += self.draft_seconds(drafted, self.drafting)
        self.spent += seconds
        if self._tried is not None:
            self._tell_trial(self._tried, load, rows - sum(len(draft.tokens) for request, draft in zip(
                requests, drafts, strict=True) if request is self._tried), seconds)
        load.observe(sum(accepted) / n, seconds / plain, self.choice / plain)


def draft_widths(block: int) -> list[int]:
    """The tokens of blocks that are drafted: those of 2 drafts, of 4 and so on, and of a whole block."""
    return sorted({*(w for i in range(1, block) if (w := (1 << i) + 1) < block), block})


def _gain(chances: Sequence[float], row: float) -> float:
    return sum(chance - row for chance in chances if chance > row)


def _more(worth: float, than: float) -> float:
    """What the better of two drafts should be worth more than one that is worth `than`, if the other's worth is spread
    exponentially."""
    return worth * math.exp(-than / worth) if worth > 0 else worth


def _moved(before: Sequence[float], now: Sequence[float], share: float) -> list[float]:
    return [a + share * (b - a) for a, b in zip(before, now, strict=True)]
