"""Reads the fields of every config: types, ranges, and errors with the field's name and value."""

import reprlib
from collections.abc import Mapping
from typing import Any, NoReturn

MOST = 2**31 - 1  # of a length or an id: the kernels' are 32 bits wide
FLOAT_MIN, FLOAT_MAX = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # float32's normal numbers
MOST_LAYERS = 10_000  # bounds what is made for each layer before its tensors are looked for
MOST_HEAD_DIM = 1024  # the kernels'

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80
_repr.maxlong, _repr.maxlevel = 40, 3


def shown(value: object) -> str:
    """The value as an error shows it: one short line."""
    if value is None:
        return "nothing"
    if isinstance(value, int) and value.bit_length() > 1000:  # Python writes no integer of more than 4,300 digits
        return f"an integer of {value.bit_length()} bits"
    try:
        return _repr.repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} that cannot be shown"


class Fields:
    """The fields of one config. Each is looked up in `places` in order; null counts as absent.

    what: names the config in errors. error: their class. A default of ... marks a required field; any other default is
    returned unchecked. `seen` collects the names that were looked up.
    """

    def __init__(self, what: str, *places: Mapping, error: type[ValueError] = ValueError):
        self.what, self.places, self.error = what, places, error
        self.seen: set[str] = set()
        for place in places:
            if not isinstance(place, Mapping):
                raise error(f"{what}: must be a JSON object; got {type(place).__name__}")

    def get(self, name: str, default: Any = None) -> Any:
        """The value, of any type."""
        self.seen.add(name)
        for place in self.places:
            if (value := place.get(name)) is not None:
                return value
        return default

    def refuse(self, name: str, expected: str, got: object) -> NoReturn:
        """Raises the error that `name` must be the expected value."""
        raise self.error(f"{self.what}: {name} must be {expected}; got {shown(got)}")

    def whole(self, name: str, default: Any = ..., *, least: int = 1, most: int = MOST) -> int:
        value = self.get(name)
        if value is None and default is not ...:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self.refuse(name, f"an integer of at least {least}", value)
        if value > most:
            self.refuse(name, f"an integer of at most {most}", value)
        return value

    def number(self, name: str, default: Any = ..., *, above: float | None = None, least: float = -FLOAT_MAX,
               most: float = FLOAT_MAX) -> float:
        """A finite number that float32 holds. above: an exclusive lower bound, also after rounding to float32."""
        value = self.get(name)
        if value is None and default is not ...:
            return default
        lowest = least if above is None else max(above * (1 + 2.0**-23), FLOAT_MIN)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not lowest <= value <= most:
            limits = [f"{word} {limit:g}" for word, limit, free in (
                ("above", above, None), ("at least", least, -FLOAT_MAX), ("at most", most, FLOAT_MAX)) if limit != free]
            self.refuse(name, f"a number {' and '.join(limits)}".rstrip(), value)
        return float(value)

    def flag(self, name: str, default: Any = ...) -> bool:
        value = self.get(name)
        if value is None and default is not ...:
            return default
        if not isinstance(value, bool):
            self.refuse(name, "true or false", value)
        return value

    def text(self, name: str, default: Any = ...) -> str:
        return self._of(name, default, str, "a text")

    def items(self, name: str, default: Any = ..., kind: type | tuple[type, ...] = object,
              each: str = "values") -> list | tuple:
        """A list of `kind`s. each: the kind in words."""
        value = self._of(name, default, (list, tuple), f"a list of {each}")
        for item in value if self.get(name) is not None else ():
            if not isinstance(item, kind) or (kind is int and isinstance(item, bool)):
                self.refuse(name, f"a list of {each}", value)
        return value

    def table(self, name: str, default: Any = ...) -> Mapping:
        return self._of(name, default, Mapping, "a JSON object")

    def _of(self, name, default, kind, expected):
        value = self.get(name)
        if value is None and default is not ...:
            return default
        if not isinstance(value, kind):
            self.refuse(name, expected, value)
        return value


def head_dim_of(f: Fields, hidden: int, heads: int) -> int:
    """head_dim, or the hidden size divided by the number of heads."""
    value = f.whole("head_dim", hidden // heads, most=MOST_HEAD_DIM)
    if not 1 <= value <= MOST_HEAD_DIM:
        raise f.error(f"{f.what}: head_dim (hidden_size // num_attention_heads) must be between 1 and {MOST_HEAD_DIM}; "
                      f"got {hidden} // {heads}")
    return value
