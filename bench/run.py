"""Runs the benchmarks by name and writes bench/results/<device>/<name>.json.

    python bench/run.py [linear] [attention] [memory] [sample] [draft] [step] [--runs N] [--device cuda] [--tiny]
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch
from cases import Sizes, footnotes, header, measure, results_folder

from dflash_decode.results import write_json

NAMES = ("linear", "attention", "memory", "sample", "draft", "step")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *NAMES], help=f"of {', '.join(NAMES)}; default all")
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: whether it runs, not how fast")
    parser.add_argument("--folder", type=Path, help="where results go; default bench/results/<device>")
    options = parser.parse_args()
    sizes = Sizes(options.device, options.tiny)
    folder, head = options.folder or results_folder(sizes.device), header(sizes)
    print(" | ".join(f"{k} {v}" for k, v in head.items()))
    wrong = 0
    for name in options.names or NAMES:
        with torch.device(sizes.device):
            rows = measure(importlib.import_module(f"bench_{name}").cases(sizes), options.runs, sizes)
        wrong += sum("wrong" in row for row in rows)
        print("".join(f"  {why}\n" for why in footnotes(rows)), end="", flush=True)
        if not options.no_write:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / f"{name}.json", {
                "header": head, "rows": rows,
                "command": f"python bench/run.py {name} --runs {options.runs} --device {sizes.device}"
                           + " --tiny" * sizes.tiny})
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
