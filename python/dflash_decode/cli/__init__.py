"""The command `dflash-kernels`."""

import importlib.util
import sys


def main() -> None:
    """All commands where the packages that read command lines are installed, `info` alone where they are not."""
    from . import streams

    streams.prepare()
    if all(importlib.util.find_spec(name) for name in ("rich", "typer")):
        from .app import run
    else:
        from .base import run
    sys.exit(run(sys.argv[1:]))
