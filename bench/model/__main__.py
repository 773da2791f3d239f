"""Model of the time of a DFlash step on another machine, from its bytes, products, messages and launches.

    python -m bench.model [--geometry minimax-m2.7] [--machine B200] [--tp 4] [--batch 1 32] [--context 2000]
                          [--block 8] [--acceptance 3.561 | --histogram bench/results/DEVICE/decode-c1.json]

Without options it prints the tables of docs/performance.md, with the model's error against measurements.

A step is a draft pass followed by a verify pass. Each part takes the longer of two times: its bytes over the bandwidth,
and its arithmetic over the matrix rate. Tensor parallelism divides both and adds two all-reduces per layer. Every layer
adds the gaps between its kernels. A step commits the acceptance length: tokens/s = batch x acceptance length / step.
"""

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from bench import RESULTS
from bench.model.step import GEOMETRIES, MACHINES, acceptance_of, step
from bench.model.tables import tables


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES)
    parser.add_argument("--machine", choices=MACHINES, default="B200")
    parser.add_argument("--tp", type=int, default=1, choices=range(1, 9), metavar="1-8")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--context", type=int, default=2000)
    parser.add_argument("--block", type=int, help="tokens per block; by default the drafter's")
    parser.add_argument("--acceptance", type=float)
    parser.add_argument("--histogram", type=Path, help="a result of `dflash-kernels bench decode`")
    options = parser.parse_args()
    if options.geometry is None:
        print("\n".join(tables(RESULTS)))
        return
    if (options.acceptance is None) == (options.histogram is None):
        parser.error("exactly one of --acceptance and --histogram is needed")
    g, machine = GEOMETRIES[options.geometry], MACHINES[options.machine]
    acceptance = options.acceptance
    if options.histogram:
        counts = json.loads(options.histogram.read_text(encoding="utf-8"))["acceptance_histogram"]
        acceptance = acceptance_of(counts, options.block)
    for batch in options.batch:
        for kind, priced in (("roofline", machine.ideal()), ("expected", machine)):
            made = step(g, priced, batch, options.context, options.block, options.tp)
            parts = ", ".join(f"{name} {value:.0f}" for name, value in vars(made).items())
            print(f"batch {batch}, {kind}: {made.tokens_per_s(batch, acceptance):.0f} tokens/s, "
                  f"{made.total:.0f} us a step: {parts}")


if __name__ == "__main__":
    main()
