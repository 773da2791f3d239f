"""Measures speculative and baseline decoding at several concurrencies, into bench/results/<device>/.

    python -m bench.evaluate PROMPTS.jsonl ... [--drafter DIR] [--weights int8] [--limit N] [--max-tokens N]
                             [--concurrency N ...] [--temperature T ...] [--rounds N] [--isa SET ...]

--isa, or all: every instruction set and concurrency, into one table.
"""

import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from bench.case import results_folder


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="+", type=Path)
    parser.add_argument("--drafter", default="auto")
    parser.add_argument("--weights", choices=["model", "int8"], default="model")
    parser.add_argument("--limit", type=int, help="the first N prompts of each file")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0])
    parser.add_argument("--rounds", type=int, default=1, help="how often each task runs, without and with the drafter")
    parser.add_argument("--isa", nargs="+", default=[])
    options = parser.parse_args()
    folder = results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    name = "decode" if options.temperature == [0.0] else "decode-sampled"
    name += "-int8" * (options.weights == "int8")
    for concurrency in [options.concurrency] if options.isa else [[n] for n in options.concurrency]:
        file = f"{name}-isa-c{concurrency[-1]}.json" if options.isa else f"{name}-c{concurrency[0]}.json"
        command = [sys.executable, "-m", "dflash_decode.cli", "bench", "decode", "--drafter", options.drafter,
                   "--weights", options.weights,
                   "--max-tokens", str(options.max_tokens), "--rounds", str(options.rounds),
                   "--json", str(folder / file)]
        command += [word for n in concurrency for word in ("--concurrency", str(n))]
        command += [word for each in options.isa for word in ("--isa", each)]
        command += [word for value in options.temperature for word in ("--temperature", str(value))]
        command += [word for file in options.prompts for word in ("--prompts", str(file))]
        subprocess.run(command + (["--limit", str(options.limit)] if options.limit else []), check=True)


if __name__ == "__main__":
    main()
