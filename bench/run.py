"""Runs the benchmarks by name and writes bench/results/<device>/<name>.json.

    python bench/run.py [linear] [attention] [step] [--runs N] [--no-write]
"""

import argparse
import importlib

from cases import header, measure, results_folder

from dflash_decode.bench import write_json

NAMES = ("linear", "attention", "step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *NAMES], help=f"of {', '.join(NAMES)}; default all")
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    folder = results_folder()
    print(" | ".join(f"{k} {v}" for k, v in header().items()))
    for name in options.names or NAMES:
        rows = measure(importlib.import_module(f"bench_{name}").cases(), options.runs)
        if not options.no_write:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / f"{name}.json", {"header": header(), "rows": rows,
                                                 "command": f"python bench/run.py {name} --runs {options.runs}"})


if __name__ == "__main__":
    main()
