"""The commands of `make gpu`: each has a time by which it ends, and what it says goes to one log."""

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
    """Runs commands one after the other. log: where their output is added."""

    def __init__(self, log: Path):
        self.log, self.processes = log, []

    def run(self, words: list[str], end: float, workers: int = 1, environment: dict | None = None) -> str:
        """What became of a command, "passed", "failed (code)" or "out of time", and its seconds. end: by
        time.monotonic. workers: in so many processes, each with its share (tests/gpu/conftest.py)."""
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
        """Where a command writes: many concurrently do not write between each other's lines."""
        return tempfile.TemporaryFile() if workers > 1 else self.log.open("ab")

    def started(self, words, out, share, environment):
        return subprocess.Popen(
            words, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, preexec_fn=with_us,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}", "PYTHONUNBUFFERED": "1",
                 "DFLASH_SHARE": share, **environment})

    def stop(self) -> None:
        """Ends what runs, with the processes that it started."""
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
    """In the process of a command: a group of its own, so that its children end with it, and where Linux can, an end
    with ours, however that comes."""
    os.setpgrp()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def waited(process: subprocess.Popen, end: float) -> int | None:
    """Its exit status, or None where the time is up."""
    try:
        return process.wait(max(end - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        return None
