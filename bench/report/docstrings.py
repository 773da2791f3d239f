"""Reads NumPy-style docstrings, as docs/ops.md and the tests of the docstrings need them."""

import inspect
import re
from dataclasses import dataclass

FIELDS = ("Parameters", "Returns", "Attributes", "Raises")
TEXTS = ("Notes", "Examples")


@dataclass(frozen=True)
class Field:
    """An entry of a section: the names before the colon, the type after it, and the indented text below."""

    names: tuple[str, ...]
    kind: str
    text: str


@dataclass(frozen=True)
class Docstring:
    """summary: the first paragraph. more: the text between it and the first section."""

    summary: str
    more: str
    fields: dict[str, list[Field]]
    texts: dict[str, str]


def parse(text: str) -> Docstring:
    """The docstring's parts. Raises ValueError for a section that is unknown, out of order or not underlined."""
    head, *rest = re.split(r"^(\w+)\n---+$", inspect.cleandoc(text), flags=re.M)
    titles, bodies = rest[::2], [body.strip("\n") for body in rest[1::2]]
    if titles != [title for title in (*FIELDS, *TEXTS) if title in titles]:
        raise ValueError(f"sections must be some of {(*FIELDS, *TEXTS)}, in this order; got {titles}")
    for body in (head, *bodies):
        if lost := {*FIELDS, *TEXTS} & {*body.splitlines()}:
            raise ValueError(f"section titles must be underlined; got {lost} without")
    summary, _, more = head.strip().partition("\n\n")
    sections = dict(zip(titles, bodies, strict=True))
    return Docstring(" ".join(summary.split()), more.strip("\n"),
                     {title: _fields(body, title) for title, body in sections.items() if title in FIELDS},
                     {title: body for title, body in sections.items() if title in TEXTS})


def _fields(body: str, title: str) -> list[Field]:
    found: list[tuple[str, list[str]]] = []
    for line in body.splitlines():
        if line and not line.startswith(" "):
            found.append((line, []))
        elif found:
            found[-1][1].append(line)
        elif line:
            raise ValueError(f"an entry must begin at the margin; got {line!r}")
    fields = []
    for head, text in found:
        names, colon, kind = head.partition(" : ")
        if title == "Returns" and not colon:  # a type alone
            names, kind = "", head
        fields.append(Field(tuple(name.strip() for name in names.split(",") if name), kind,
                            " ".join(" ".join(text).split())))
    return fields


def members(item: type) -> dict[str, object]:
    """A class's public methods and properties that have a docstring, as they stand in it."""
    return {name: member for name, member in vars(item).items() if not name.startswith("_") and member.__doc__
            and (isinstance(member, (property, staticmethod, classmethod)) or inspect.isfunction(member))}
