"""What a benchmark is made of: cases, checked before they are timed, and rows that tell how far the limit is."""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import dflash_kernels
from dflash_decode.bench import commit, cpu_model
from dflash_kernels import StepGraph
from dflash_kernels.testing.timing import ReadBandwidth, interleaved

FOOTPRINT = 192 << 20  # bytes that the copies of a case's inputs take together, so that no cache keeps them


def results_folder() -> Path:
    """Where this machine's results are kept."""
    return Path(__file__).parent / "results" / re.sub(r"[^A-Za-z0-9]+", "-", cpu_model()).strip("-").lower()


def copies_of(nbytes: int) -> int:
    """How many copies of nbytes-large inputs to rotate over."""
    return max(3, min(FOOTPRINT // nbytes, 256))


@dataclass(frozen=True)
class Case:
    """run(i) and each peer(i) do the same work on copy i of the inputs, i < copies; check() raises where they disagree.

    With more than one copy, our calls are recorded, one a copy, and timed as one replay: what is measured is the kernel
    and its launch, as in a decoding step, not Python. Peers are called in a plain loop.
    """

    op: str
    case: str
    run: Callable[[int], object]
    bytes: int
    copies: int = 1
    flops: int = 0
    peers: dict[str, Callable[[int], object]] = field(default_factory=dict)
    check: Callable[[], None] = lambda: None
    headline: bool = False  # shown in the README


def header() -> dict:
    info = dflash_kernels.build_info()
    return {"device": cpu_model(), "cores": os.cpu_count(), "commit": commit(),
            **{k: info[k] for k in ("version", "torch", "python", "platform", "isa", "threads", "compiler")}}


def measure(cases: Iterable[Case], runs: int = 40) -> list[dict]:
    """One row a case; the read bandwidth is measured between the calls of the case itself."""
    rows, limit = [], ReadBandwidth()
    for case in cases:
        case.check()
        peers = {name: over_copies(peer, case.copies) for name, peer in case.peers.items()}
        timed = interleaved({"us": recorded(case), "limit": limit, **peers}, runs=runs)
        gbps = limit.gbps(timed["limit"])
        median, p20, p80 = (t / case.copies for t in (timed["us"].median, timed["us"].p20, timed["us"].p80))
        row = {"op": case.op, "case": case.case, "us": median * 1e6, "p20": p20 * 1e6, "p80": p80 * 1e6,
               "gbps": case.bytes / median / 1e9, "read_gbps": gbps, "pct_of_limit": case.bytes / median / 1e7 / gbps,
               "tflops": case.flops / median / 1e12, "headline": case.headline,
               "peers": {name: timed[name].median / case.copies * 1e6 for name in peers}}
        rows.append(row)
        print(line(row), flush=True)
    return rows


def over_copies(function, copies):
    def call(_run):
        for i in range(copies):
            function(i)
    return call


def recorded(case: Case):
    if case.copies == 1 or not StepGraph.available():
        return over_copies(case.run, case.copies)
    graph = StepGraph()
    with graph.capture():
        for i in range(case.copies):
            case.run(i)
    return lambda _run: graph.replay()


def line(row: dict) -> str:
    peers = " ".join(f"{us / row['us']:.2f}x {name}" for name, us in row["peers"].items())
    return (f"{row['op']:<16} {row['case']:<34} {row['us']:9.1f} us [{row['p20']:.1f}-{row['p80']:.1f}] "
            f"{row['gbps']:7.1f} GB/s {row['pct_of_limit']:5.0f} % of read {row['tflops']:7.3f} TFLOP/s  {peers}")
