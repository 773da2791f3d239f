"""Makes the text of an answer as its tokens arrive: whole characters alone, and nothing of a stop string."""

from collections.abc import Collection, Sequence

from ..checkpoint.tokenizer import Tokenizer


class _Stop:
    """How many characters of a stop string a text ends with, by Knuth, Morris and Pratt: each character takes a few
    operations, whatever the string."""

    def __init__(self, text: str):
        self.text, self.matched = text, 0
        self._shorter = [0, 0]  # by the characters that match: how many may match still, if the next one does not
        for at in range(1, len(text)):
            self._shorter.append(self._after(self._shorter[at], text[at]))

    def _after(self, matched: int, character: str) -> int:
        while self.text[matched] != character:
            if not matched:
                return 0
            matched = self._shorter[matched]
        return matched + 1

    def push(self, character: str) -> bool:
        """Whether the text ends with all of it now."""
        self.matched = self._after(self.matched, character)
        if whole := self.matched == len(self.text):
            self.matched = self._shorter[-1]
        return whole


class StopStrings:
    """Looks for stop strings in a text that arrives in pieces, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]):
        self.stops, self._held = [_Stop(stop) for stop in stops], ""

    def push(self, piece: str, may_end: bool = True) -> tuple[str, str | None]:
        """The text that is no part of a stop string, and the stop string that was found, if any: that which ends first,
        and of those the longest. Nothing follows it. may_end: whether one that ends in this piece counts."""
        text = self._held + piece
        for end, character in enumerate(piece, len(self._held) + 1):
            if (found := [stop.text for stop in self.stops if stop.push(character)]) and may_end:
                longest = max(found, key=len)
                self._held = ""
                return text[:end - len(longest)], longest
        kept = max((stop.matched for stop in self.stops), default=0)
        self._held = text[len(text) - kept:]
        return text[:len(text) - kept], None

    def flush(self) -> str:
        """What was held back, at the end of a text that has no stop string."""
        held, self._held = self._held, ""
        return held


class AnswerText:
    """The text of one answer.

    stops: texts before which it ends. stop_tokens: their text is no part of it. min_tokens: no stop string counts that
    ends in these. reason: the stop string or token that ended it, once it has ended.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), stop_tokens: Collection[int] = (),
                 min_tokens: int = 0):
        self._stream, self._search = tokenizer.stream(), StopStrings(stops)
        self._stop_tokens, self._min_tokens, self._count = stop_tokens, min_tokens, 0
        self.reason: str | int | None = None

    def push(self, tokens: Sequence[int]) -> tuple[str, int]:
        """The text that is complete with these tokens, and how many of them the answer has: those up to the one that
        completes a stop string."""
        ends = bool(tokens) and tokens[-1] in self._stop_tokens
        spoken = tokens[:-1] if ends else tokens
        pieces = [] if self._search.stops else [self._stream.push(spoken)]
        for i, token in enumerate(spoken if self._search.stops else (), 1):
            self._count += 1
            piece, self.reason = self._search.push(self._stream.push([token]), self._count > self._min_tokens)
            pieces.append(piece)
            if self.reason is not None:
                return "".join(pieces), i
        if ends:
            self.reason = tokens[-1]
        return "".join(pieces), len(tokens)

    def flush(self) -> str:
        """The rest, at the end: what was held back, and an unfinished character."""
        if isinstance(self.reason, str):
            return ""
        piece, found = self._search.push(self._stream.flush(), self._count > self._min_tokens)
        if found is not None:
            self.reason = found
            return piece
        return piece + self._search.flush()
