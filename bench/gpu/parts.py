"""`make gpu`: builds, tests, measures and tunes on a machine with a GPU, within nine minutes.

    python -m bench.gpu [dry] [a] [b] [c] [d] [e] [f] [--out FOLDER] [--no-peers]

    a  every op in bfloat16 against its reference, rows among others; linear, attention, heads, draft step
    b  whole steps at Qwen3-8B's geometry, a layer of MiniMax-M2.7's; one step's kernels and gaps
    c  the launch tables' entries against their neighbours: tools/launch_tables.py FOLDER/sweep.json sets the tables
    d  Nsight Compute's counters of five kernels
    e  the other tests, compute-sanitizer
    f  small ops, and every op against its peers

It needs python with torch for CUDA, triton, pytest and, unless dflash_kernels/*.so match the sources, ninja and a
compiler. Nothing is downloaded. Results are written after each case, so an interrupted run keeps them: cases.json,
profile.json, sweep.json, counters.csv, plan.json, summary.txt, log.txt, in the folder of --out or in
bench/results/<device>.

dry: the same without a GPU, on tiny shapes, in tools.dry_gpu.gpu, with results in the folder of --out or in a temporary
one. It needs no CUDA, and finds errors in the Python code.
"""

import argparse
import contextlib
import signal
import sys
import tempfile
import time
from pathlib import Path

from bench.gpu import build as gpu_build
from bench.gpu import plan as gpu_plan
from bench.gpu import summary as gpu_summary
from bench.gpu.jobs import Jobs
from dflash_bench.results import commit, write_json


class Refused(Exception):
    """Bad input: one line, and nothing is written."""


def parsed(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--no-peers", action="store_true")
    options = parser.parse_args(words)
    options.dry = "dry" in options.parts
    options.parts = [word for word in options.parts if word != "dry"] or list(gpu_plan.SHARES)
    if unknown := sorted(set(options.parts) - set(gpu_plan.SHARES)):
        raise Refused(f"a part must be dry or one of {', '.join(gpu_plan.SHARES)}; got {', '.join(unknown)}")
    return options


def output_folder(options: argparse.Namespace, stack: contextlib.ExitStack) -> Path:
    """Creates the folder if needed, and checks that it can be written."""
    if options.out is None:
        if options.dry:
            return Path(stack.enter_context(tempfile.TemporaryDirectory()))
        from bench.case import results_folder

        options.out = results_folder("cuda")
    out = options.out.absolute()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out):
            pass
    except OSError as error:
        raise Refused(f"OUT must be a folder that can be written to; got {out}: {error.strerror}") from error
    return out


class Plan:
    """Runs the parts and records the outcome of each command."""

    def __init__(self, options: argparse.Namespace, out: Path, began: float):
        self.options, self.out, self.began, self.done = options, out, began, {}
        for name in ("plan.json", "log.txt", "summary.txt", "counters.csv"):
            (out / name).unlink(missing_ok=True)
        (out / "log.txt").touch()
        self.jobs = Jobs(out / "log.txt")

    def note(self, name: str, what: str) -> None:
        self.done[name] = what
        print(f"{name}: {what}", flush=True)
        write_json(self.out / "plan.json", {"commit": commit(), "dry": self.options.dry, "commands": self.done,
                                            "seconds": round(time.monotonic() - self.began)})

    def run(self) -> None:
        end = self.began + (gpu_plan.DRY_BUDGET if self.options.dry else gpu_plan.BUDGET)
        self.note("build", "not needed: the libraries are those of the sources" if gpu_build.prebuilt()
                  else self.jobs.run(gpu_build.command(), end if self.options.dry else self.began + gpu_plan.BUILDING))
        until = start = time.monotonic()
        whole = sum(gpu_plan.SHARES[part] for part in self.options.parts)
        for part in self.options.parts:
            until = min(until + gpu_plan.SHARES[part] * (end - start) / whole, end)
            for step in gpu_plan.steps(part, self.out, self.options.dry, not self.options.no_peers):
                stop = end if self.options.dry else min(until, time.monotonic() + step.seconds)
                self.note(f"{part} {step.name}", step.absent or self.jobs.run(step.words, stop, step.workers,
                                                                             step.environment))

    def close(self) -> int:
        """Writes the last page in any case."""
        self.jobs.stop()
        for left in self.out.glob(".*.json.*"):  # of a process that was ended while it wrote
            left.unlink()
        page = gpu_summary.page(self.out)
        (self.out / "summary.txt").write_text(page, encoding="utf-8")
        print("\n" + page, end="", flush=True)
        return int(any(what.startswith(("failed", "out of time")) for what in self.done.values()))


def main() -> int:
    began = time.monotonic()
    try:
        options = parsed(sys.argv[1:])
        import torch

        if not options.dry and not torch.cuda.is_available():
            raise Refused(f"make gpu needs a GPU that torch can use; torch {torch.__version__} finds none")
        with contextlib.ExitStack() as stack:
            plan = Plan(options, output_folder(options, stack), began)
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
            try:
                plan.run()
            finally:
                code = plan.close()
        return code
    except Refused as why:
        print(why, file=sys.stderr)
        return 2
