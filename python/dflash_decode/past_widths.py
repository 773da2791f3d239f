"""The width of steps that are one graph."""

from collections.abc import Sequence


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
