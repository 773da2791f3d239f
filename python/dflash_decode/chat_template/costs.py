"""The costs of a chat template's operators, methods, filters and tests, in the units of budget.py.

Each cost is paid before the work is done. It is at least the work's time and output, up to a small factor.
"""

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from string import Formatter

from .budget import STEP, TooMuch, budget

_WIDTH_DIGITS = 4  # of the width of one field of a format
_PERCENT = re.compile(r"%(?:\([^()]*\))?[#0\- +]*(\*|\d*)(?:\.(\*|\d*))?")


def pay_operator(operator: str, left, right) -> None:
    """Pays for a binary operator; its result is paid for once it exists."""
    spent = budget()
    if operator == "%" and isinstance(left, str):
        _pay_percent(left, right)
    elif operator in ("*", "**"):
        for one, other in ((left, right), (right, left)):
            if isinstance(one, (str, bytes, list, tuple)) and isinstance(other, int):
                spent.spend(spent.allow(spent.size(one) * max(other, 0)))
        if isinstance(left, int) and isinstance(right, int):
            power = operator == "**"
            spent.allow_bits(left.bit_length() * right if power else left.bit_length() + right.bit_length())
    elif operator == "-":  # between sets, too
        spent.spend(spent.size(left) + spent.size(right))


def pay_comparison(name: str, left, right) -> None:
    """Pays for a comparison. name: one of Jinja's operators; "in" and "notin" search the right side."""
    spent, size = budget(), budget().size(right)
    if name not in ("in", "notin"):
        size = min(size, spent.size(left))
    elif isinstance(right, (list, tuple)):
        size = min(size, len(right) * (STEP + spent.size(left)))
    elif not isinstance(right, (str, bytes)):
        size = spent.size(left)
    spent.spend(STEP + size)


def pay_format(text: str, args: tuple, kwargs: dict) -> None:
    """Pays for str.format and str.format_map."""
    _pay_formatted(text, [spec or "" for _, name, spec, _ in Formatter().parse(text) if name is not None],
                   [*args, *kwargs.values()])


def _pay_percent(text: str, values: object) -> None:
    if re.search(r"%\([^)]*\(", text):
        raise TooMuch(f"a name in a format must have no parentheses; got {text[:60]!r}")
    _pay_formatted(text, [" ".join(widths) for widths in _PERCENT.findall(text)],
                   values if isinstance(values, (list, tuple)) else [values])


def _pay_formatted(text: str, specs: list[str], values: Sequence) -> None:
    """Pays for formatted text. A width is accepted only as a literal number in the text."""
    widths = [width for spec in specs for width in re.findall(r"\d+|[*{]", spec)]
    if any(width in "*{" or len(width) > _WIDTH_DIGITS for width in widths):
        raise TooMuch(f"a width in a format must be a number of at most {_WIDTH_DIGITS} digits; got {text[:60]!r}")
    spent = budget()
    spent.spend(spent.allow(len(text) + len(specs) * (STEP + spent.sizes(values)) + sum(map(int, widths))))


# ---- methods and functions -------------------------------------------------------------------------------------------


def _most(args: tuple, kwargs: dict) -> int:
    return max((abs(a) for a in (*args, *kwargs.values()) if isinstance(a, int)), default=0)


def _texts(args: tuple, kwargs: dict) -> int:
    return sum(len(a) for a in (*args, *kwargs.values()) if isinstance(a, (str, bytes)))


def _replaced(text, args: tuple, kwargs: dict) -> int:
    old, new = (*args, *(v for k, v in kwargs.items() if k != "count"), "", "")[:2]
    return len(text) + text.count(old) * len(new)


def _joined(text, args: tuple, kwargs: dict) -> int:
    return budget().sizes(args, kwargs) * (STEP + len(text)) // STEP


# Method -> the most that its result can have, from the object and the arguments.
_METHODS: dict[str, Callable[[object, tuple, dict], int]] = {
    "replace": _replaced,
    "join": _joined,
    "translate": lambda text, args, kwargs: len(text) * (1 + budget().sizes(args)),
    "expandtabs": lambda text, args, kwargs: len(text) * (8 + _most(args, kwargs)),
} | dict.fromkeys(("center", "ljust", "rjust", "zfill", "to_bytes"), lambda value, args, kwargs: _most(args, kwargs))
# Of a time: as many as time.strftime tries. Of "lorem ipsum": words of a paragraph times paragraphs.
_FUNCTIONS: dict[str, Callable[[tuple, dict], int]] = {
    "strftime_now": lambda args, kwargs: 256 * _texts(args, kwargs),
    "generate_lorem_ipsum": lambda args, kwargs: 8 * max(100, _most(args, kwargs)) ** 2,
}
# Methods that take as long as the product of both texts' lengths.
_PRODUCTS = frozenset(("strip", "lstrip", "rstrip", "rfind", "rindex", "rsplit", "rpartition"))
_ENCODINGS = frozenset(("utf-8", "utf8", "ascii", "us-ascii", "latin-1", "latin1", "iso-8859-1"))
_LARGEST = 1 << 60  # bounds of a range: Python's hashes of larger numbers can all be the same
_AT_ONCE = frozenset(("get", "keys", "values", "items", "startswith", "endswith"))


def pay_call(function, args: tuple, kwargs: dict) -> None:
    """Pays for a call of anything but a macro."""
    spent, name = budget(), getattr(function, "__name__", "")
    owner = getattr(function, "__self__", None)
    if name in _AT_ONCE and isinstance(owner, (str, dict)) and all(isinstance(a, (str, int)) for a in args[:1]):
        return
    spent.spend(spent.sizes(args, kwargs) + spent.size(owner))
    if name in _PRODUCTS and isinstance(owner, (str, bytes)):
        spent.spend(len(owner) * _texts(args, kwargs) // STEP)
    elif name in ("encode", "decode") and isinstance(owner, (str, bytes)):
        if (named := str((*args, kwargs.get("encoding", "utf-8"))[0]).lower().replace("_", "-")) not in _ENCODINGS:
            raise TooMuch(f"an encoding must be one of {', '.join(sorted(_ENCODINGS))}; got {named[:60]!r}")
    elif name in ("range", "safe_range") and _most(args, kwargs) >= _LARGEST:
        raise TooMuch(f"a range must be of numbers below {_LARGEST}; got {_most(args, kwargs)}"[:200])
    if name in _METHODS and isinstance(owner, (str, bytes, int)):
        spent.spend(spent.allow(_METHODS[name](owner, args, kwargs)))
    elif name in _FUNCTIONS:
        spent.spend(spent.allow(_FUNCTIONS[name](args, kwargs)))


# ---- filters and tests -----------------------------------------------------------------------------------------------


def _indented(value, args: tuple, kwargs: dict) -> int:
    return len(str(value)) + (str(value).count("\n") + 1) * (4 + _most(args, kwargs) + _texts(args, kwargs))


def _rounded(value, args: tuple, kwargs: dict) -> int:
    if _most(args, kwargs) > 400:  # a power of ten is made of it; a float ends at 308
        raise TooMuch(f"a number must be rounded to at most 400 digits; got {_most(args, kwargs)}")
    return STEP


def _as_json(value, args: tuple, kwargs: dict) -> int:
    size, depth = budget().measure(value)
    return size * (STEP + depth * (_most(args, kwargs) + _texts(args, kwargs))) // STEP


# Filter -> the most that its result can have, from its value and the other arguments.
_FILTERS: dict[str, Callable[[object, tuple, dict], int]] = {
    "batch": lambda value, args, kwargs: budget().size(value) + STEP * _most(args, kwargs),
    "center": lambda value, args, kwargs: max(80, _most(args, kwargs)),
    "indent": _indented,
    "join": lambda value, args, kwargs: budget().size(value) * (STEP + _texts(args, kwargs)) // STEP,
    "replace": lambda value, args, kwargs: _replaced(str(value), tuple(map(str, args)), kwargs),
    "round": _rounded,
    "tojson": _as_json,
}
_FREE = frozenset(("default", "d", "first", "last", "length", "count", "random", "attr"))
_LAZY = frozenset(("map", "select", "reject", "selectattr", "rejectattr", "items"))  # each item pays when it is used
_WHOLE = frozenset(("join", "sort", "sum", "min", "max", "unique", "groupby", "batch", "slice", "list",
                    "urlencode"))
_SORTED = frozenset(("sort", "dictsort", "groupby", "unique", "min", "max"))  # compares an item some 16 times
_SQUARE = frozenset(("striptags", "urlize", "xmlattr", "pprint", "wordwrap"))  # of the text's length


def _pay_filter(name: str, value, args: tuple, kwargs: dict) -> None:
    spent = budget()
    spent.spend(STEP)
    if name in _FREE or name in _LAZY:
        return
    if name == "format":
        return _pay_percent(str(value), [*args, *kwargs.values()])
    if name in _FILTERS:
        spent.spend(spent.allow(_FILTERS[name](value, args, kwargs)))
    size, more = spent.size(value), spent.sizes(args, kwargs)
    if name in _SQUARE:
        spent.spend((size + more) ** 2 // STEP)
    elif name == "sum" and (args[1:] or "start" in kwargs):  # lists: each sum copies the one before it
        spent.spend((size + more) * (1 + len(value)))
    elif name not in ("tojson", "replace", "indent"):
        spent.spend((size * (STEP + more) // STEP) * (16 if name in _SORTED else 1))


def paid_filter(name: str, function: Callable) -> Callable:
    """The filter `function` with payments. A lazy result pays item by item."""
    at = 1 if hasattr(function, "jinja_pass_arg") else 0  # after the context

    @functools.wraps(function)
    def paid(*args, **kwargs):
        spent = budget()
        if len(args) > at:
            if name in _WHOLE:
                args = (*args[:at], spent.listed(args[at]), *args[at + 1:])
            _pay_filter(name, args[at], args[at + 1:], kwargs)
        made = function(*args, **kwargs)
        if isinstance(made, Iterator):
            return spent.each(made, _texts(args[at + 1:], kwargs))
        return made if name in _FREE else spent.made(made)

    return paid


def paid_test(name: str, function: Callable) -> Callable:
    """The test `function` ("is defined", "is eq"), which pays for the values it compares."""
    at = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def paid(*args, **kwargs):
        spent, values = budget(), [*args[at:]]
        if len(values) > 1:
            values[1] = spent.listed(values[1])
            pay_comparison(name, *values[:2])
        else:
            spent.spend(STEP + (spent.sizes(values) if name in ("lower", "upper") else 0))
        return function(*args[:at], *values, **kwargs)

    return paid
