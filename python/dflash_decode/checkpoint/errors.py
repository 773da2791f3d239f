"""Checks the files of a checkpoint (regular, bounded in size) and defines the errors for them."""

import json
import os
import stat
import sys
import warnings
from pathlib import Path
from types import FrameType

MOST_JSON = 64 << 20  # bytes; the index of the largest models has some 20 MB, the largest tokenizers 40
_KINDS = ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"),
          (stat.S_ISCHR, "a character device"), (stat.S_ISBLK, "a block device"))


def warn(message: str) -> None:
    """A UserWarning located at the caller's own code rather than in this package."""
    level, here = 1, str(Path(__file__).parents[1]) + os.sep
    frame: FrameType | None = sys._getframe()
    while frame and frame.f_code.co_filename.startswith(here):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or unsupported."""

    def __init__(self, message: str):
        # A file's names are as long as it likes, and half a character, which JSON can hold, prints nowhere.
        message = message if len(message) <= 1000 else f"{message[:700]} ... {message[-295:]}"
        super().__init__(message.encode("utf-8", "backslashreplace").decode("utf-8"))


class CheckpointNotFound(CheckpointError):
    """No checkpoint exists at the given path or under the given name."""

    exit_code = 2  # of the command line: the path was written wrongly


def brief(error: object) -> str:
    """An error's text on one line, cut to 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def kind_of(mode: int) -> str | None:
    """The kind of file of this st_mode, in words; None for a regular file."""
    return None if stat.S_ISREG(mode) else next((word for is_kind, word in _KINDS if is_kind(mode)), "something else")


def regular(file: Path) -> os.stat_result:
    """The state of a regular file, which is not opened. Raises CheckpointError for a missing file and for any other
    kind, because reading a pipe or a device might never end."""
    try:
        found = os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{file}: expected this file; got none") from None
    except (OSError, ValueError) as error:  # a name too long, a loop of links, a NUL
        raise CheckpointError(f"{str(file)[:200]!r}: expected a file; got {brief(error)}") from None
    if kind := kind_of(found.st_mode):
        raise CheckpointError(f"{file}: expected a regular file; got {kind}")
    return found


def check_size(file: Path, most: int = MOST_JSON) -> None:
    """Raises CheckpointError for a file that is not regular or has more than `most` bytes."""
    if (size := regular(file).st_size) > most:
        raise CheckpointError(f"{file}: expected at most {most:,} bytes; got {size:,}")


def read_text(file: Path, most: int = MOST_JSON) -> str:
    """The text of a regular UTF-8 file of at most `most` bytes, or CheckpointError."""
    check_size(file, most)
    try:
        with open(file, "rb") as opened:
            content = opened.read(most + 1)  # some files have no size
        if len(content) <= most:
            return content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: expected text in UTF-8; got {brief(error)}") from None
    raise CheckpointError(f"{file}: expected at most {most:,} bytes; got more")


def read_json(file: Path) -> dict:
    """The JSON object in a regular file of at most MOST_JSON bytes, or CheckpointError."""
    try:
        value = json.loads(read_text(file))
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of more digits than Python reads
        raise CheckpointError(f"{file}: expected JSON; got {brief(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object; got {type(value).__name__}")
    return value
