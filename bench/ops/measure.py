"""Runs the benchmarks by name and writes bench/results/<device>/<name>.json, or all rows into one file.

    python -m bench.ops [linear] [attention] [memory] [sample] [small] [experts] [draft] [step] [whole] [blocks]
                        [--runs N] [--json OUT]

A file is written atomically after each case. `dflash-kernels bench ops` runs the same.
"""

import argparse
import importlib
import json
from pathlib import Path

import torch

from bench.case import Sizes, footnotes, header, measure, results_folder
from dflash_bench.results import output, write_json

NAMES = ("linear", "attention", "memory", "sample", "small", "experts", "draft", "step")
GPU_NAMES = ("whole", "blocks")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *NAMES, *GPU_NAMES],
                        help=f"of {', '.join(NAMES)}, {', '.join(GPU_NAMES)}; default those of a CPU")
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--json", type=output, help="one file for all rows, instead of one per name")
    parser.add_argument("--add", action="store_true",
                        help="keep other cases in the file of --json, and replace those measured again")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; by default one per core")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to check that it runs")
    parser.add_argument("--no-peers", action="store_true", help="do not time peers")
    parser.add_argument("--folder", type=Path, help="where results go; default bench/results/<device>")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    sizes, found, why = Sizes(options.device, options.tiny, not options.no_peers), [], {}
    folder, head = options.folder or results_folder(sizes.device), header(sizes)
    print(" | ".join(f"{k} {v}" for k, v in head.items()))
    kept = Kept(options.json, head, options.names, options) if options.json else None
    for name in options.names or NAMES:
        file = kept or (None if options.no_write else Kept(folder / f"{name}.json", head, [name], options))
        with torch.device(sizes.device):
            rows = measure(importlib.import_module(f"bench.ops.{name}").cases(sizes), options.runs, sizes,
                           file.keep if file else lambda row: None)
        found += rows
        new = [line for line in footnotes(rows) if line not in why]  # each reason is reported once
        why |= dict.fromkeys(new)
        print("".join(f"  {line}\n" for line in new), end="", flush=True)
    return int(any("wrong" in row for row in found))


class Kept:
    """A file of rows, written whenever a row is added."""

    def __init__(self, file: Path, head: dict, names: list[str], options: argparse.Namespace):
        words = ["python -m bench.ops", *names, f"--runs {options.runs} --device {options.device}"]
        self.file, command = file, " ".join(words) + " --tiny" * options.tiny
        self.result = {"header": head, "rows": [], "command": command}
        if options.add and file.exists():
            before = json.loads(file.read_text(encoding="utf-8"))
            commands = dict.fromkeys([*before["command"].split("; "), command])
            self.result |= {"rows": before["rows"], "command": "; ".join(commands)}

    def keep(self, row: dict) -> None:
        """Adds a row, or replaces the row of the same case. Each row has its commit, because rows can be of different
        ones."""
        row = {**row, "commit": self.result["header"].get("commit")}
        others = [r for r in self.result["rows"] if (r["op"], r["case"]) != (row["op"], row["case"])]
        self.result["rows"] = [*others, row]
        write_json(self.file, self.result)
