"""Writes results files, and records their origin. Needs only the standard library."""

import argparse
import json
import os
import stat
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from dflash_decode.cache import write_whole


def commit() -> str | None:
    """The short commit of the checkout that this file is in; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"],
                              capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def check_output(file: Path, inputs: Iterable[Path] = ()) -> None:
    """Raises OSError or ValueError, with the reason, if write_json could not write the file or would overwrite an input
    or a device. It undoes its own trials."""
    if str(file) == "-":
        raise ValueError("it does not mean standard output here; name a file")
    try:
        there = file.lstat()
    except FileNotFoundError:
        there = None
    if there is not None and not stat.S_ISREG(there.st_mode) and not file.is_file():
        raise ValueError("it is a directory" if file.is_dir() else "it is not a regular file")
    if any(file.resolve() == other.resolve() for other in inputs):
        raise ValueError("it is also an input")
    handle, temporary = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.absolute().parent)
    os.close(handle)
    os.unlink(temporary)


def output(text: str) -> Path:
    """A file that write_json can write; for argparse, the type of an option."""
    file = Path(text)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        check_output(file)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"must be a file that can be written; got {text[:80]!r}: {error}") from None
    return file


def write_json(file: Path, value: dict) -> None:
    """Writes the file atomically, in a new folder if needed: a machine's first results have none."""
    write_whole(file, json.dumps(value, indent=1) + "\n")
