"""Checks of the files that the commands read and write, made before anything runs."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from dflash_decode.cli.options import short
from dflash_decode.cli.streams import UsageError, reason

from .results import check_output


def check_files(prompts: list[Path], written: dict[str, Path | None]) -> None:
    for file in prompts:
        if why := _unreadable(file):
            raise UsageError(f"--prompts must be a file; got {short(file)}, which {why}")
    check_written(written, prompts)


def _unreadable(file: Path) -> str | None:
    try:
        mode = os.stat(file).st_mode
        if not stat.S_ISREG(mode):
            return "is a directory" if stat.S_ISDIR(mode) else "is not a regular file"
        file.open("rb").close()
    except FileNotFoundError:
        return "does not exist"
    except (OSError, ValueError) as error:
        return f"cannot be read: {reason(error)}"
    return None


def check_written(written: dict[str, Path | None], read: Sequence[Path] = ()) -> None:
    """Raises UsageError for an output that cannot be written. An existing file is not changed."""
    taken = list(read)
    for option, file in written.items():
        if file is None:
            continue
        try:
            check_output(file, taken)
        except (OSError, ValueError) as error:
            raise UsageError(f"{option} must be a file in a directory that can be written; got {short(file)}: "
                             f"{reason(error)}") from None
        taken.append(file)
