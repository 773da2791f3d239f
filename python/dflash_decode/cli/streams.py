"""Standard output and standard error of `dflash-kernels`: error messages, and streams that are closed, full or not
Unicode."""

import io
import os
import sys
import warnings
from collections.abc import Callable

from ..extras import how_to_get

INTERRUPTED = 130


class UsageError(Exception):
    """A command with wrong arguments, or one that needs a package."""

    exit_code = 2


def reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def prepare() -> None:
    """Prepares the streams before anything is printed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif stream.encoding.lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="backslashreplace")
    out = sys.stdout
    if isinstance(getattr(out, "buffer", None), io.RawIOBase):  # PYTHONUNBUFFERED: what fails is forgotten there
        sys.stdout = open(out.fileno(), "w", encoding=out.encoding, errors=out.errors, closefd=False)  # noqa: SIM115
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch's, in a base install, which does without
    warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)


def attempt(command: Callable[[], int], debug: bool) -> int:
    """Runs a command that returns its exit code, and gives the process's: errors are a line on standard error."""
    try:
        code = command()
        return end("interrupted" if code == INTERRUPTED else "", code)  # some versions of typer catch Ctrl-C
    except KeyboardInterrupt:
        return end("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of the output left
        drop_output()
        return 1
    except Exception as error:
        if debug:
            raise
        # Our usage errors and those of the command line library carry the exit code that they mean.
        wrongly = getattr(error, "exit_code", 1) == 2 or isinstance(error, ModuleNotFoundError)
        return end(describe(error), 2 if wrongly else 1)


def describe(error: Exception) -> str:
    written = getattr(error, "format_message", None)
    text = written() if written else str(error)
    if not text and written:
        return ""  # a command group without a command has printed its help
    if isinstance(error, ModuleNotFoundError):
        text += f"; to get it: {how_to_get('decode')}"
    elif not isinstance(error, (ValueError, TypeError, NotImplementedError, ImportError, UsageError)) and not written:
        text = f"{type(error).__name__}: {text} (--debug shows where)"
    return " ".join(text.split()) or type(error).__name__


def end(message: str, code: int) -> int:
    """Flushes the output, prints the message, if any, on standard error, and returns the exit code.

    After an error on a full disk the buffered output is still unwritten, so the flush raises the same error again."""
    try:
        sys.stdout.flush()
    except OSError as error:
        drop_output()
        left = isinstance(error, BrokenPipeError)
        message, code = "" if left else f"standard output cannot be written: {reason(error)}", 1
    if message:
        print(f"dflash-kernels: {message}", file=sys.stderr)
    return code


def drop_output() -> None:
    """Discards the output that is not written yet."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
