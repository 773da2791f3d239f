"""Where Triton keeps what it compiles. It creates that directory in the midst of a launch, and fails there."""

import atexit
import functools
import os
import shutil
import tempfile
import warnings
from pathlib import Path


@functools.cache
def prepare() -> None:
    """Before the first kernel is loaded. A cache that somebody filled and that can only be read is left as it is.

    Where the home folder cannot be written, kernels are kept in a folder that goes with the process, and a warning says
    so. Raises RuntimeError where TRITON_CACHE_DIR, which somebody chose, cannot be written."""
    from triton import knobs

    where = Path(knobs.cache.dir)
    why = None if knobs.runtime.interpret else _unwritable(where)
    if why is None or _filled(where):
        return
    if os.environ.get("TRITON_CACHE_DIR"):
        raise RuntimeError("dflash_kernels: TRITON_CACHE_DIR must be a directory that can be written, for Triton to "
                           f"keep compiled kernels in; got {str(where)[:200]!r}: {why}")
    folder = tempfile.mkdtemp(prefix="triton-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    knobs.cache.dir = folder
    warnings.warn(f"dflash_kernels: Triton cannot keep compiled kernels in {where}: {why}. Each process compiles them "
                  "anew; set TRITON_CACHE_DIR to a directory that can be written.", stacklevel=2)


def _unwritable(where: Path) -> str | None:
    try:
        where.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=where).close()
    except OSError as error:
        return error.strerror
    return None


def _filled(where: Path) -> bool:
    try:
        return any(where.iterdir())
    except OSError:
        return False
