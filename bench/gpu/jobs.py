"""Runs the commands of `make gpu`, each with a deadline, and logs their output to one file."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import ROOT

MOST = 15 << 20  # bytes of the log
TOLD = 25  # lines of a command that failed which are also shown


class Jobs:
    """Runs commands in sequence. log: the file that their output is added to."""

    def __init__(self, log: Path):
        self.log, self.processes = log, []

    def run(self, words: list[str], end: float, workers: int = 1, environment: dict | None = None) -> str:
        """The outcome of a command ("passed", "failed (code)" or "out of time") and its seconds. end: the deadline, by
        time.monotonic. workers: the number of processes, each with its share (tests/gpu/conftest.py)."""
        start = time.monotonic()
        if start >= end:
            return "out of time before it began"
        print("+", *words, flush=True)
        self.note(f"+ {' '.join(words)}\n".encode())
        began = self.log.stat().st_size
        with contextlib.ExitStack() as stack:
            outs = [stack.enter_context(self.output(workers)) for _ in range(workers)]
            try:
                self.processes = [self.started(words, out, f"{i}/{workers}", environment or {})
                                  for i, out in enumerate(outs)]
                codes = [waited(process, end) for process in self.processes]
            finally:
                self.stop()
                for out in outs if workers > 1 else ():
                    out.seek(0)
                    self.note(out.read())
        wrong = [code for code in codes if code]
        if wrong or None in codes:
            self.tell(began)
        self.shorten()
        took = f", {time.monotonic() - start:.0f} s"
        return "out of time" + took if None in codes else f"failed ({wrong[0]}){took}" if wrong else "passed" + took

    def output(self, workers: int):
        """The file of a command's output. Concurrent commands do not write between each other's lines."""
        return tempfile.TemporaryFile() if workers > 1 else self.log.open("ab")

    def started(self, words, out, share, environment):
        return subprocess.Popen(
            words, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, preexec_fn=with_us,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}", "PYTHONUNBUFFERED": "1",
                 "DFLASH_SHARE": share, **environment})

    def stop(self) -> None:
        """Ends the running commands and their child processes."""
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self.processes = []

    def note(self, text: bytes) -> None:
        with self.log.open("ab") as log:
            log.write(text)

    def tell(self, began: int) -> None:
        with self.log.open("rb") as log:
            log.seek(began)
            lines = log.read().decode(errors="replace").splitlines()
        print("\n".join(f"  {line[:200]}" for line in lines[-TOLD:]), file=sys.stdout, flush=True)

    def shorten(self) -> None:
        if self.log.stat().st_size > MOST:
            self.log.write_bytes(self.log.read_bytes()[-MOST // 2:])


def with_us() -> None:
    """Called in the process of a command. It starts a process group, so that its children end with it, and on Linux it
    ends with ours, however ours ends."""
    os.setpgrp()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def waited(process: subprocess.Popen, end: float) -> int | None:
    """The exit status, or None after the deadline."""
    try:
        return process.wait(max(end - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        return None
