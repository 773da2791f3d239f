"""What of a public name has no type hint."""

import inspect
from collections.abc import Iterator


def functions_of(name: str, value: object) -> Iterator[tuple[str, object]]:
    """A function, or the public methods and properties that a class of ours defines, and its __init__."""
    if not inspect.isclass(value):
        yield name, value
        return
    for made in value.__mro__:
        if not made.__module__.startswith("dflash_"):
            continue
        for attribute, found in vars(made).items():
            found = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
            if inspect.isfunction(found) and (attribute == "__init__" or not attribute.startswith("_")):
                yield f"{name}.{attribute}", found


def missing(name: str, value: object) -> list[str]:
    found = []
    for where, function in functions_of(name, value):
        hints = function.__annotations__
        names = [n for n in inspect.signature(function).parameters if n not in ("self", "cls")]
        if not where.endswith(".__init__"):
            names.append("return")
        found += [f"{where}: {n}" for n in names if n not in hints]
    return found
