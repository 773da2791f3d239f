"""Checks a GGUF file's header against the file's size, before anything is allocated for it.

The gguf package reads arrays item by item and trusts every length: a file of 49 bytes can request 2^60 items. The
layout: magic, version, counts of tensors and fields; for each field a key, a type and a value; for each tensor a name,
its dimensions, a type and an offset. Strings and arrays begin with their length in 64 bits.
"""

import mmap
import struct
from pathlib import Path

from ..errors import CheckpointError, regular

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of the scalar types
_MOST_FIELDS = _MOST_TENSORS = 1 << 16
_MOST_ITEMS = 1 << 22  # of all arrays; a vocabulary of 256 thousand with its types and merges has some 1.3 million
_MOST_DIMS = 4
_MOST_ELEMENTS = 8  # for each byte of the file: no type packs a weight into less than 1.5 bits


def check_header(file: Path) -> None:
    """Raises CheckpointError for a file that is not GGUF, or whose header claims more than the file can hold."""
    if (size := regular(file).st_size) < 24:
        raise _refusal(file, f"{size} bytes, which is less than a header")
    try:
        with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Walk(file, data).header()
    except (OSError, ValueError) as error:
        raise error if isinstance(error, CheckpointError) else _refusal(file, str(error)) from None


def _refusal(file: Path, got: str) -> CheckpointError:
    return CheckpointError(f"{file}: expected a GGUF file; got {got}")


class _Walk:
    """A position in the header. Every step stays inside the file or raises."""

    def __init__(self, file: Path, data: mmap.mmap):
        self.file, self.data, self.size = file, data, len(data)
        self.at, self.order, self.items = 0, "<", 0

    def skip(self, count: int, what: str) -> None:
        if count > self.size - self.at:
            raise _refusal(self.file, f"{what} of {count} bytes at byte {self.at}, beyond the file's {self.size}")
        self.at += count

    def number(self, code: str, what: str) -> int:
        start = self.at
        self.skip(struct.calcsize(code), what)
        return struct.unpack_from(self.order + code, self.data, start)[0]

    def text(self, what: str) -> str:
        start = self.at + 8
        self.skip(self.number("Q", what), what)
        return self.data[start:min(self.at, start + 60)].decode("utf-8", "replace")

    def header(self) -> None:
        if self.data[:4] != _MAGIC:
            raise _refusal(self.file, f"a file that begins with {self.data[:4]!r}")
        self.skip(4, "its magic")
        if self.number("I", "its version") & 0xFFFF == 0:  # written on a machine of the other byte order
            self.order = ">"
        tensors, fields = (self.number("Q", "a count") for _ in range(2))
        for what, count, most in (("tensors", tensors, _MOST_TENSORS), ("fields", fields, _MOST_FIELDS)):
            if count > most:
                raise _refusal(self.file, f"{count} {what}, where at most {most} are read")
        for _ in range(fields):
            self.field()
        elements = sum(self.tensor() for _ in range(tensors))
        if elements > _MOST_ELEMENTS * self.size:
            raise _refusal(self.file, f"tensors of {elements} elements, which do not fit into {self.size} bytes")

    def field(self) -> None:
        key = self.text("a field's key")
        kind = self.number("I", f"the type of {key!r}")
        if kind == _STRING:
            self.text(f"the value of {key!r}")
        elif kind == _ARRAY:
            self.array(key)
        else:
            self.skip(self.item_size(key, kind), f"the value of {key!r}")

    def array(self, key: str) -> None:
        kind, count = self.number("I", f"the type of {key!r}"), self.number("Q", f"the length of {key!r}")
        self.items += count
        if self.items > _MOST_ITEMS:
            raise _refusal(self.file, f"an array {key!r} of {count} items, where at most {_MOST_ITEMS} are read")
        if kind != _STRING:
            self.skip(count * self.item_size(key, kind), f"the array {key!r}")
        for _ in range(count if kind == _STRING else 0):
            self.text(f"an item of {key!r}")

    def item_size(self, key: str, kind: int) -> int:
        if kind not in _SIZES:
            raise _refusal(self.file, f"the type {kind} for {key!r}")
        return _SIZES[kind]

    def tensor(self) -> int:
        """The number of elements of a tensor."""
        name, elements = self.text("a tensor's name"), 1
        if (dims := self.number("I", f"the dimensions of {name!r}")) > _MOST_DIMS:
            raise _refusal(self.file, f"{dims} dimensions of {name!r}, where at most {_MOST_DIMS} are read")
        for _ in range(dims):
            elements *= self.number("Q", f"the dimensions of {name!r}")
        self.skip(4 + 8, f"the type and offset of {name!r}")
        return elements
