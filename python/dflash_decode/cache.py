"""Where the loop keeps what it need not find out again."""

import os
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
