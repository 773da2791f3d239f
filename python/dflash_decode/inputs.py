"""Converts callers' values to Python values, and formats them for error messages."""

import numbers
import operator
import reprlib
from collections.abc import Collection, Mapping, Sequence, Set
from typing import Any

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def shown(value: object) -> str:
    """The value as an error shows it: short, and never an error of its own."""
    try:
        return _short.repr(value)
    except Exception:  # repr fails for an integer of 5,000 digits, or raises
        return f"a value of type {type(value).__name__}"


def said(error: BaseException) -> str:
    """The kind and text of an error, shortened."""
    kind = type(error).__name__
    try:
        text = " ".join(str(error).split())
    except Exception:  # an error of the caller's own may have none
        return kind
    return f"{kind}: {text if len(text) <= 200 else text[:197] + '...'}"


def integer(value: object) -> int | None:
    """An integer of Python or numpy; None for anything else, including bools and whole floats."""
    if type(value) is int:
        return value
    return operator.index(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None


def within(tokens: Collection[int], vocab: int) -> list[int]:
    """Those that are in [0, vocab): configurations can name more."""
    return [token for token in tokens if 0 <= token < vocab]


def number(value: Any) -> float | None:
    """A number of Python or numpy, infinite where float overflows; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")  # type: ignore[operator]  # a Real has an order


def is_token_list(value: Any, ordered: bool = True) -> bool:
    """Whether the value can hold token ids: a sequence, or a tensor or array of one dimension; also a set where order
    does not matter. Text and bytes cannot."""
    if hasattr(value, "__array__"):  # torch's tensors have it too
        return value.ndim == 1
    if isinstance(value, (str, bytes, bytearray, Mapping)):
        return False
    return isinstance(value, Sequence if ordered else (Sequence, Set))


def items(value: Collection) -> list:
    """The elements of a token list, not yet checked."""
    return value.tolist() if hasattr(value, "tolist") else list(value)
