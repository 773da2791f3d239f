"""Runs the benchmarks by name and writes bench/results/<device>/<name>.json.

    python bench/run.py [linear] [attention] [memory] [sample] [draft] [step] [--runs N] [--device cuda] [--no-write]
"""

import argparse
import importlib

import torch
from cases import header, measure, results_folder

from dflash_decode.bench import write_json

NAMES = ("linear", "attention", "memory", "sample", "draft", "step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *NAMES], help=f"of {', '.join(NAMES)}; default all")
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    device, folder, head = options.device, results_folder(options.device), header(options.device)
    print(" | ".join(f"{k} {v}" for k, v in head.items()))
    for name in options.names or NAMES:
        with torch.device(device):
            rows = measure(importlib.import_module(f"bench_{name}").cases(device), options.runs, device)
        if not options.no_write:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / f"{name}.json", {
                "header": head, "rows": rows,
                "command": f"python bench/run.py {name} --runs {options.runs} --device {device}"})


if __name__ == "__main__":
    main()
