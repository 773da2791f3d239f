"""Drafts from a request's own text: what followed the last earlier occurrence of its latest tokens."""

from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple

LONGEST = 16  # tokens of a match: longer ones are not told apart
_TRIES = 32  # earlier occurrences of the last two tokens that are compared


class Draft(NamedTuple):
    """Drafts of one request, in the order of the text.

    confidences: the drafter's, in each of them. matched: 0, or the number of tokens before them that stood before the
    same tokens earlier in the text (at most LONGEST), whose drafts have no confidences.
    """

    tokens: list[int] = []
    confidences: list[float] = []
    matched: int = 0

    def cut(self, count: int) -> "Draft":
        return Draft(self.tokens[:count], self.confidences[:count], self.matched)


class Lookup:
    """A text that grows.

    The last two tokens lead to their earlier occurrences, the newest of which that agrees with the text for longest is
    taken. A draft that runs into the end of the text goes on with itself, as a text that repeats itself does:

        text    the cat sat . the cat sat . the cat
        match               ------------------------- , with the text 4 tokens before
        drafts                                        sat . the cat sat . the
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._ends: dict[tuple[int, int], list[int]] = {}  # where each pair of tokens ends

    def read(self, tokens: Iterable[int]) -> None:
        """Adds tokens. An interrupt leaves some of them to be read again."""
        for token in tokens:
            place = len(self.tokens)
            if place:
                ends = self._ends.setdefault((self.tokens[-1], token), [])
                if not ends or ends[-1] < place:
                    ends.append(place)
            self.tokens.append(token)

    def draft(self, most: int) -> Draft:
        """The next `most` tokens, if the last two were there before."""
        tokens, last = self.tokens, len(self.tokens) - 1
        longest, start = 1, 0
        ends = self._ends.get((tokens[-2], tokens[-1]), ()) if last > 0 else ()
        for end in islice(reversed(ends), 1, 1 + _TRIES):
            n = 2
            while n < LONGEST and n <= end and tokens[end - n] == tokens[last - n]:
                n += 1
            if n > longest:
                longest, start = n, end + 1
                if n == LONGEST:
                    break
        if longest == 1:
            return Draft()
        period, found = last + 1 - start, tokens[start:start + most]
        while len(found) < most:
            found.append(found[-period])
        return Draft(found, matched=longest)
