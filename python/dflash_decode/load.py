"""What steps of about so many requests brought lately, and whether drafts win anything for them."""

from dataclasses import dataclass

RATE = 0.05  # how far a step moves its tokens and seconds
# The share of a step that drafts win on the average, less the time to choose them: how far a step moves it, the steps
# without any where it is below nothing, and what it is after them.
_WON, _REST, _AGAIN = 0.02, 64, 0.06
_AT_FIRST = 0.5  # that share for one request, before there is an average; less for more


@dataclass
class Load:
    """tokens, seconds: of a step, over those of a baseline step. won: the share of one that drafts won. resting: steps
    to come that have none."""

    tokens: float = 1.0
    seconds: float = 1.0
    won: float = 0.0
    resting: int = 0

    def observe(self, accepted: float, seconds: float, choice: float) -> None:
        """Takes one more step: the drafts that were accepted of a request, and the seconds of its passes and of the
        choice of its drafts, over those of a baseline step."""
        if self.resting:
            self.resting -= 1
        else:
            self.won += _WON * (accepted - (seconds + choice - 1.0) - self.won)
            if self.won < 0.0:
                self.won, self.resting = _AGAIN, _REST
        self.tokens += RATE * (1.0 + accepted - self.tokens)
        self.seconds += RATE * (seconds - self.seconds)


class Loads:
    """The load of each number of requests. Up to a power of two they are the same: what pays for one request does not
    for eight."""

    def __init__(self) -> None:
        self._of: dict[int, Load] = {}

    def __call__(self, requests: int) -> Load:
        size = (requests - 1).bit_length()
        if size not in self._of:
            self._of[size] = Load(won=max(_AT_FIRST / (1 << size), _AGAIN))
        return self._of[size]
