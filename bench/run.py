"""Runs the benchmarks by name and writes bench/results/<device>/<name>.json, or all rows into one file.

    python bench/run.py [linear] [attention] [memory] [sample] [small] [draft] [step] [--runs N] [--json OUT]

Also `dflash-kernels bench ops`.
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch
from cases import Sizes, footnotes, header, measure, results_folder

from dflash_decode.results import output, write_json

NAMES = ("linear", "attention", "memory", "sample", "small", "draft", "step")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *NAMES], help=f"of {', '.join(NAMES)}; default all")
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--json", type=output, help="one file for all rows, instead of one a name")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; all cores if not given")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: whether it runs, not how fast")
    parser.add_argument("--folder", type=Path, help="where results go; default bench/results/<device>")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    sizes, found, why = Sizes(options.device, options.tiny), [], {}
    folder, head = options.folder or results_folder(sizes.device), header(sizes)
    print(" | ".join(f"{k} {v}" for k, v in head.items()))
    for name in options.names or NAMES:
        with torch.device(sizes.device):
            rows = measure(importlib.import_module(f"bench_{name}").cases(sizes), options.runs, sizes)
        found += rows
        new = [line for line in footnotes(rows) if line not in why]  # a reason is told once
        why |= dict.fromkeys(new)
        print("".join(f"  {line}\n" for line in new), end="", flush=True)
        if not options.no_write and not options.json:
            write_json(folder / f"{name}.json", result(head, rows, [name], options))
    if options.json:
        write_json(options.json, result(head, found, options.names, options))
    return int(any("wrong" in row for row in found))


def result(head: dict, rows: list[dict], names: list[str], options: argparse.Namespace) -> dict:
    words = ["python bench/run.py", *names, f"--runs {options.runs} --device {options.device}"]
    return {"header": head, "rows": rows, "command": " ".join(words) + " --tiny" * options.tiny}


if __name__ == "__main__":
    sys.exit(main())
