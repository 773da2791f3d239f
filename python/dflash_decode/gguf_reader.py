"""Opening a GGUF file and reading one metadata field, with errors that say what was expected."""

import functools
from pathlib import Path

import numpy as np

from .weights import CheckpointError, brief


@functools.lru_cache(maxsize=1)
def _open(path: str, size: int, changed: int):
    import gguf

    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # the reader meets damage with whatever numpy raised
        raise CheckpointError(f"{path}: expected a GGUF file; got {brief(error)}") from None


def open_file(path: Path):
    """A gguf.GGUFReader; parsing takes seconds, so the last one is kept."""
    stat = path.stat()
    return _open(str(path), stat.st_size, stat.st_mtime_ns)


def field(path: Path, reader, key: str, kind, default=...):
    """The metadata value `key`, of type `kind`; CheckpointError when it is absent (without default) or another type."""
    found = reader.fields.get(key)
    if found is None:
        if default is ...:
            raise CheckpointError(f"{path}: expected the metadata field {key}; got none")
        return default
    try:
        value = found.contents()
    except Exception as error:
        raise CheckpointError(f"{path}: {key} cannot be read: {brief(error)}") from None
    if kind is float and isinstance(value, int):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CheckpointError(f"{path}: {key} must be {kind.__name__}; got {type(value).__name__}")
    # The shortest decimal that is the stored float32: 1e-05, not 9.999999747378752e-06.
    return float(str(np.float32(value))) if kind is float else value
