"""Caches converted GGUF files as Hugging Face directories in the user's cache directory.

The cache directory is $DFLASH_CACHE, else $XDG_CACHE_HOME/dflash_kernels, else ~/.cache/dflash_kernels. The key of an
entry is the file's path, size and modification time, and which formats of weights stay in the file's blocks. An entry
has a manifest of its files, and is rebuilt if it does not match it. It is moved into place whole, so that a reader
never sees a half-written one.

Entries are written under a lock, which the system releases when its holder dies. The holder therefore knows that every
unfinished entry belongs to a dead process. A process that finds the lock taken writes no entry.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ...cache import cache_dir
from ..blocks import FORMATS
from ..errors import CheckpointError, brief, read_json, regular, warn
from .shards import files_of

WEIGHTS = "model.safetensors"
_FORMAT = 5  # raise it when the conversion changes: it is part of the cache key
_MANIFEST, _HALF_MADE, _LOCK = "converted-from", ".new-", ".lock"
_HASHED = 8 << 20  # bytes of a file that are hashed, beside its size: all but the weights, and their header


def entry_of(path: Path, blocks: bool = False) -> Path | None:
    """The place of the converted form of a GGUF file in its current state. blocks: in the file's blocks."""
    stats, folder = [regular(file) for file in files_of(path)], cache_dir()
    if folder is None:
        return None
    source = _source(path)
    text = "|".join([str(_FORMAT), "+".join(FORMATS) if blocks else "elements", str(source),
                     *(f"{stat.st_size}|{stat.st_mtime_ns}" for stat in stats)])
    return folder / f"{source.stem[:50]}-{hashlib.sha256(os.fsencode(text)).hexdigest()[:16]}"


def _source(path: Path) -> Path:
    """The file behind links, which may have a name of its own; for a model in parts, whose names matter, the path."""
    return path.absolute() if len(files_of(path)) > 1 else path.resolve()


def cached(path: Path, blocks: bool = False) -> Path | None:
    """The converted directory of a GGUF file, or None if there is no complete one."""
    folder = entry_of(path, blocks)
    return folder if folder and _is_whole(folder) else None


def keep(path: Path, entry: Path | None, tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str]) -> None:
    """Writes `entry`, which entry_of returned before `path` was read. If the cache cannot be written, a warning says
    so; the next start is only slower."""
    try:
        if entry is None:
            raise FileNotFoundError("there is no home directory, and DFLASH_CACHE names no other")
        with _lock(entry.parent) as ours:
            if ours and not _is_whole(entry):
                _remove_leftovers(entry.parent)
                shutil.rmtree(entry, ignore_errors=True)
                _write(path, entry, tensors, texts)
                _remove_stale(entry.parent)
    except (OSError, SafetensorError) as error:
        warn(f"{path}: the next start converts this file again, because its converted form cannot be cached"
             f"{f' in {entry.parent}' if entry else ''}: {brief(error)}")


def _write(path: Path, entry: Path, tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str]) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=_HALF_MADE, dir=entry.parent))
    try:
        save_file(dict(tensors), temporary / WEIGHTS)
        for name, content in texts.items():
            (temporary / name).write_text(content, encoding="utf-8")
        files = {name: _state(temporary / name) for name in (WEIGHTS, *texts)}
        (temporary / _MANIFEST).write_text(json.dumps({"source": str(_source(path)), "files": files}, indent=1),
                                           encoding="utf-8")
        os.rename(temporary, entry)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _state(file: Path) -> dict:
    size = regular(file).st_size
    with open(file, "rb") as opened:
        return {"size": size, "sha256": hashlib.sha256(opened.read(_HASHED)).hexdigest()}


def _is_whole(folder: Path) -> bool:
    try:
        files = read_json(folder / _MANIFEST).get("files")
        return isinstance(files, dict) and WEIGHTS in files \
            and all(_state(folder / name) == state for name, state in files.items())
    except (OSError, CheckpointError):
        return False


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Whether this process may write. It does not wait for another one."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _remove_leftovers(folder: Path) -> None:
    for half_made in folder.glob(f"{_HALF_MADE}*"):
        shutil.rmtree(half_made, ignore_errors=True)


def _remove_stale(folder: Path) -> None:
    """Removes entries whose file is gone or has changed, and entries of other versions."""
    for manifest in folder.glob(f"*/{_MANIFEST}"):
        try:
            source = Path(str(read_json(manifest).get("source")))
            current = {entry_of(source, blocks) for blocks in (False, True)}
        except CheckpointError:
            current = set()
        if manifest.parent not in current:
            shutil.rmtree(manifest.parent, ignore_errors=True)
