"""Where the loop keeps what it need not find out again, and how a file is written."""

import os
import tempfile
from pathlib import Path


def cache_dir() -> Path | None:
    """$DFLASH_CACHE, else $XDG_CACHE_HOME/dflash_kernels, else ~/.cache/dflash_kernels. None for a user without a home,
    as in some containers."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        if chosen := os.environ.get("DFLASH_CACHE"):
            return Path(chosen).expanduser()
        return (Path(base) if base else Path.home() / ".cache") / "dflash_kernels"
    except RuntimeError:
        return None


def write_whole(file: Path, content: str | bytes) -> None:
    """Writes the file atomically, in a new folder if needed. Raises OSError, and leaves nothing half-written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content.encode("utf-8") if isinstance(content, str) else content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
