"""The budget of a chat template. A template is code from the checkpoint's author, and code can loop or grow.

Steps (a call, a filter, one iteration of a loop) bound the time; characters read or written bound the memory. No clock
is read, so the same template on the same messages stops at the same place on every machine and in every thread.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

STEP = 8  # what a step, or an item of a list, is worth in characters
# Limits: so many, and so many for each character of what the template is given. Of 180 real templates with 1,000
# messages the dearest take 1.7 million steps (they search all messages for each) and 800 characters a character (it
# joins the text so far with each message); the largest output is 19 times a prompt of one word. With a long text the
# dearest take 12 steps a character (they loop over it).
LARGEST = 1 << 20, 16  # characters of the output, or of any value on the way
CHARACTERS = 64 << 20, 1024
STEPS = 4 << 20, 16  # some 2 s, and 8 s for a million characters
LONGEST_TEMPLATE = 1 << 17  # characters; the longest of the real ones has 21,000
DEPTH = 100  # of lists in lists: C recurses over them with no limit of its own
BITS = 1 << 14  # of an integer; Python prints none above 4,300 digits
_ESCAPED = 10  # characters that repr makes of one
_VIEWS: tuple[type, ...] = type({}.keys()), type({}.values()), type({}.items())

_current: ContextVar["Budget"] = ContextVar("budget")


class TooMuch(Exception):
    """A template exceeded its budget."""


class Budget:
    """The budget of one rendering. Its limits grow with the inputs.

    A nested value counts as its full written size, and no value can exceed the limit of the output. Otherwise forty
    lists, each holding the previous one twice, would be a terabyte in one `str`.
    """

    def __init__(self, inputs: object = ()):
        self._known: dict[int, tuple[int, int, object]] = {}  # id -> size, depth, and the value, so that the id stays
        size = self.size(inputs)
        self.limits = [base + times * size for base, times in (LARGEST, CHARACTERS, STEPS)]
        self.largest, self.characters, self.steps = self.limits

    def spend(self, characters: int, steps: int = 1) -> bool:
        """Spends from the budget; returns True, so that a condition can call it."""
        self.characters -= characters
        self.steps -= steps
        if self.characters < 0 or self.steps < 0:
            what = f"{self.limits[1]} characters" if self.characters < 0 else f"{self.limits[2]} steps"
            raise TooMuch(f"it must take at most {what} for this conversation; got more")
        return True

    def size(self, value: object) -> int:
        """The size of a value when written out, in characters."""
        return len(value) if type(value) is str else self.measure(value)[0]

    def measure(self, value: object) -> tuple[int, int]:
        """Size and depth. A template cannot change an existing list or dict, so each is measured once."""
        if isinstance(value, (str, bytes)):
            return len(value), 0
        if isinstance(value, int):
            return value.bit_length() // 3, 0
        if isinstance(value, range):
            return STEP * len(value), 1
        if isinstance(value, _VIEWS):
            return self._sum([*value.mapping, *value.mapping.values()])  # type: ignore[attr-defined]
        if not isinstance(value, (list, tuple, dict, set)):
            return 0, 0
        known = self._known.get(id(value))
        if known is None:
            size, depth = self._sum([*value, *value.values()] if isinstance(value, dict) else [*value])
            self._known[id(value)] = known = size, depth, value
        return known[:2]

    def _sum(self, parts: Sequence) -> tuple[int, int]:
        size, depth = STEP * (1 + len(parts)), 0
        for part in parts:
            inner, below = (len(part), 0) if type(part) is str else self.measure(part)
            size += inner
            depth = max(depth, below)
        if depth >= DEPTH:
            raise TooMuch(f"its values must be nested at most {DEPTH} deep; got more")
        return size, depth + 1

    def sizes(self, args: Iterable, kwargs: dict | None = None) -> int:
        """The total size of a call's arguments."""
        return sum(map(self.size, args)) + (sum(map(self.size, kwargs.values())) if kwargs else 0)

    def made(self, value: object) -> object:
        """Pays for a value that the template made, which cannot exceed the limit of the output."""
        size = 0 if isinstance(value, range) else self.allow(self.size(value))  # a range costs when it is walked
        if isinstance(value, int):
            self.allow_bits(value.bit_length())
        elif isinstance(value, dict):  # a key is read to its end when it is hashed
            size = STEP * len(value) + self.sizes(key for key in value if type(key) is not str)
        elif isinstance(value, (list, tuple)):
            size = STEP * len(value)
        self.spend(STEP + size)
        return value

    def allow_bits(self, bits: int) -> None:
        if bits > BITS:
            raise TooMuch(f"its integers must have at most {BITS} bits; got {bits}")

    def allow(self, size: int) -> int:
        """Checks the size of a value before it is made."""
        if size > self.largest:
            raise TooMuch(f"what it makes must be at most {self.largest} characters for this conversation; got {size}")
        return size

    def written(self, value: object) -> object:
        """Pays for a value that becomes text."""
        self.spend(STEP + (len(value) if isinstance(value, str) else _ESCAPED * self.size(value)))
        return value

    def each(self, items: Iterable, more: int = 0) -> Iterator:
        """Iterates over the items and pays for each one. more: additional characters per item."""
        for item in items:
            self.spend(STEP + more + (STEP * (1 + len(item)) if isinstance(item, (list, tuple)) else 0))
            yield item

    def listed(self, value: object) -> object:
        """A lazy sequence as a list, so that it has a size; any other value unchanged."""
        if not isinstance(value, Iterator):
            return value
        items = []
        for item in self.each(value):
            items.append(item)
            self.allow(STEP * len(items))
        return self.made(items)


def budget() -> Budget:
    """The budget of the rendering in progress in this thread."""
    return _current.get()


@contextmanager
def spending(inputs: object = ()) -> Iterator[Budget]:
    """Sets a budget for the duration of the context."""
    made = Budget(inputs)
    token = _current.set(made)
    try:
        yield made
    finally:
        _current.reset(token)
