"""Opens a GGUF file and reads its metadata. Errors name the expected value."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError, brief, regular
from ..fields import Fields
from .header import check_header
from .shards import Parts, files_of


@functools.lru_cache(maxsize=1)
def _open(files: tuple[str, ...], states: tuple[tuple[int, int], ...]):
    readers = [_reader(file) for file in files]
    if len(readers) > 1:
        return Parts([Path(file) for file in files], readers)
    count = readers[0].fields.get("split.count")
    if count is not None and count.contents() not in (0, 1):
        raise CheckpointError(f"{files[0]}: the file of a model in {count.contents()} parts must be named "
                              f"NAME-00001-of-{count.contents():05d}.gguf and so on, for the others to be found")
    return readers[0]


def _reader(path: str):
    import gguf

    check_header(Path(path))
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # the reader meets damage with whatever numpy raised
        raise CheckpointError(f"{path}: expected a GGUF file; got {brief(error)}") from None
    if reader.byte_order == "S":
        raise CheckpointError(f"{path}: expected a GGUF file in this machine's byte order; got the other")
    return reader


def open_file(path: Path):
    """A gguf.GGUFReader, or the Parts of a model in several files. Parsing takes seconds, so the last one is kept.
    Raises CheckpointError."""
    files = files_of(path)
    stats = [regular(file) for file in files]
    return _open(tuple(map(str, files)), tuple((stat.st_size, stat.st_mtime_ns) for stat in stats))


class _Metadata(Mapping):
    """A reader's fields as Python values."""

    def __init__(self, path: Path, reader):
        self._path, self._fields = path, reader.fields

    def __getitem__(self, key: str) -> object:
        try:
            value = self._fields[key].contents()
        except KeyError:
            raise
        except Exception as error:
            raise CheckpointError(f"{self._path}: {key} cannot be read: {brief(error)}") from None
        # The shortest decimal that is the stored float32: 1e-05, not 9.999999747378752e-06.
        with np.errstate(over="ignore"):
            return float(str(np.float32(value))) if isinstance(value, float) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


def metadata(path: Path, reader) -> Fields:
    """The file's metadata. Errors are CheckpointErrors that name the file."""
    return Fields(str(path), _Metadata(path, reader), error=CheckpointError)


def field(path: Path, reader, key: str, kind, default=...):
    """The metadata value `key` of type `kind` (an int is not negative). Raises CheckpointError if it is absent, without
    a default, or has another type."""
    fields = metadata(path, reader)
    reads: dict[Any, Any] = {int: functools.partial(fields.whole, least=0), float: fields.number, str: fields.text,
                             bool: fields.flag, list: fields.items}
    return reads[kind](key, default)
