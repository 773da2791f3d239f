"""Times every entry of the launch tables against its neighbours, and reports the fastest on this chip.

    python -m bench.gpu.sweep OUT.json [--seconds N] [--tiny]

Kernels are compiled ahead in many processes, because each takes up to 20 s of a core. A setting is compared with the
truth before it is timed, alternating with the table's setting. The file is written after each setting; `python -m
tools.launch_tables OUT.json` sets the tables from it.
"""

import argparse
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.case import Sizes, device_name, first_line, recorded, results_folder, settled
from bench.gpu.entries import Entry, entries, literal, neighbours
from bench.gpu.plan import WORKERS
from bench.timing import interleaved_cuda
from dflash_bench.results import commit, write_json

MARGIN = 1.02  # how much faster another setting must be than the table's
RUNS = 15


class Once(Sizes):
    """One copy of the inputs: compilation does not depend on their number, and many processes share the GPU's memory.
    """

    def copies_of(self, nbytes: int) -> int:
        return 1


def compile_share(jobs: list[tuple[Entry, object]], share: int, of: int, sizes: Sizes) -> None:
    """Runs this process's share of the settings once each, to put their kernels into Triton's cache."""
    made: dict[int, list] = {}
    for entry, value in jobs[share::of]:
        try:
            cases = made.get(id(entry)) or entry.cases(sizes)
            made = {id(entry): cases}
            with entry.set_to(value):
                for case in cases:
                    case.run(0)
        except Exception as error:
            print(f"{entry.name} {entry.path} {literal(value)}: {first_line(error)}", flush=True)


def compile_ahead(end: float) -> None:
    """Compiles in one process per core, until nearly everything is compiled or half of the time is over."""
    processes = [subprocess.Popen([sys.executable, "-m", "bench.gpu.sweep", "-", "--share", f"{i}/{WORKERS}"],
                                  env=os.environ) for i in range(WORKERS)]
    for process in processes:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Sweep:
    def __init__(self, out: Path, sizes: Sizes, end: float):
        import triton

        self.out, self.sizes, self.end = out, sizes, end
        self.found = {"device": device_name("cuda"), "folder": results_folder("cuda").name, "commit": commit(),
                      "triton": triton.__version__, "major": torch.cuda.get_device_capability()[0], "entries": []}

    def run(self, every: list[Entry]) -> None:
        for entry in every:
            if time.monotonic() > self.end:
                break
            self.try_all(entry)

    def try_all(self, entry: Entry) -> None:
        result = {"table": entry.name, "key": list(entry.path), "now": literal(entry.value), "tried": []}
        self.found["entries"].append(result)
        try:
            cases = entry.cases(self.sizes)
            now = self.graphs(entry, entry.value, cases)
        except Exception as error:
            result["absent"] = f"{type(error).__name__}: {first_line(error)}"
            self.keep(entry, result)
            return
        result["cases"] = [f"{case.op} {case.case}" for case in cases]
        for value in neighbours(entry.value, entry.fixed)[:2 if self.sizes.tiny else None]:
            if time.monotonic() > self.end:
                break
            result["tried"].append(self.tried(entry, value, cases, now))
            self.keep(entry, result)

    def tried(self, entry: Entry, value, cases: list, now: list) -> dict:
        """gain: the speedup over the table's setting, as a geometric mean over the cases."""
        try:
            other = self.graphs(entry, value, cases)
            runs = {"runs": 1, "warmup": 1} if self.sizes.tiny else {"runs": RUNS}
            times = [interleaved_cuda({"now": a, "other": b}, **runs) for a, b in zip(now, other, strict=True)]
        except Exception as error:
            return {"value": literal(value), "why": f"{type(error).__name__}: {first_line(error)}"}
        pairs = [(t["now"].median / c.copies, t["other"].median / c.copies) for t, c in zip(times, cases, strict=True)]
        gain = math.exp(sum(math.log(a / b) for a, b in pairs) / len(pairs))
        return {"value": literal(value), "gain": gain, "us": [b * 1e6 for _, b in pairs],
                "us_now": [a * 1e6 for a, _ in pairs]}

    def graphs(self, entry: Entry, value, cases: list) -> list:
        """The cases' calls recorded with this setting, each compared with the truth first."""
        with entry.set_to(value):
            for case in cases:
                case.check(settled(case.run(0)))
            return [recorded(case, self.sizes.device) for case in cases]

    def keep(self, entry: Entry, result: dict) -> None:
        timed = [t for t in result["tried"] if "gain" in t]
        best = max(timed, key=lambda t: t["gain"], default=None)
        better = best is not None and best["gain"] >= MARGIN
        result |= {"best": best["value"] if better else None, "gain": best["gain"] if better else 1.0}
        write_json(self.out, self.found)
        last = result["tried"][-1] if result["tried"] else {"value": result["now"], "why": result.get("absent")}
        said = f"{last['gain']:.3f} x" if "gain" in last else last["why"]
        print(f"{entry.name} {entry.path} {last['value']}: {said}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--share", help=argparse.SUPPRESS)
    options = parser.parse_args()
    began, sizes = time.monotonic(), Sizes("cuda", options.tiny, peers=False)
    every = entries(options.tiny, torch.cuda.get_device_capability()[0])
    jobs = [(entry, value) for entry in every for value in neighbours(entry.value, entry.fixed)]
    with torch.device("cuda"):
        if options.share:
            compile_share(jobs, *map(int, options.share.split("/")), Once("cuda", options.tiny, peers=False))
            return
        if not options.tiny:  # interpreted kernels are not compiled
            compile_ahead(began + options.seconds / 2)
        Sweep(options.out, sizes, began + options.seconds).run(every)


if __name__ == "__main__":
    main()
