"""What a benchmark is made of: cases, checked before they are timed, and rows that tell how far the limit is."""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import dflash_kernels
from dflash_decode.bench import commit, cpu_model
from dflash_kernels import StepGraph
from dflash_kernels.testing.timing import CopyBandwidth, ReadBandwidth, interleaved, interleaved_cuda

FOOTPRINT = 192 << 20  # bytes that the copies of a case's inputs take together, so that no cache keeps them


def device_name(device: str = "cpu") -> str:
    return cpu_model() if device == "cpu" else torch.cuda.get_device_name(device)


def results_folder(device: str = "cpu") -> Path:
    """Where this machine's results are kept."""
    return Path(__file__).parent / "results" / re.sub(r"[^A-Za-z0-9]+", "-", device_name(device)).strip("-").lower()


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
    replays: bool = False  # run is the replay of a graph


def packed_bytes(*records) -> int:
    """Bytes of every packed weight in some layers or a drafter."""
    return sum(w.data.nbytes for r in records for w in vars(r).values() if isinstance(w, dflash_kernels.PackedWeight))


def header(device: str = "cpu") -> dict:
    info = dflash_kernels.build_info()
    where = {"device": device_name(device), "cores": os.cpu_count(), "commit": commit()}
    if device != "cpu":
        import triton

        limits = torch.cuda.get_device_properties(device)
        where |= {"cpu": cpu_model(), "cuda": torch.version.cuda, "triton": triton.__version__,
                  "multiprocessors": limits.multi_processor_count, "matrix_tflops": round(matrix_rate(device), 1)}
    return where | {k: info[k] for k in ("version", "torch", "python", "platform", "isa", "threads", "compiler")}


def matrix_rate(device: str) -> float:
    """TFLOP/s of torch's bfloat16 product of two random 8192 x 8192 matrices."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / interleaved_cuda({"product": lambda i: a @ b}, runs=10)["product"].median / 1e12


def measure(cases: Iterable[Case], runs: int = 40, device: str = "cpu") -> list[dict]:
    """One row a case. The limit, a CPU's read bandwidth or a GPU's copy bandwidth, is measured between the calls of the
    case itself."""
    on_cpu = device == "cpu"
    rows, limit = [], ReadBandwidth() if on_cpu else CopyBandwidth(device)
    for case in cases:
        case.check()
        names = {name: over_copies(peer, case.copies) for name, peer in case.peers.items()}
        peers = names if on_cpu else {name: captured(peer, device) for name, peer in names.items()}
        clock = interleaved if on_cpu else interleaved_cuda
        timed = clock({"us": recorded(case, device), "limit": limit, **peers}, runs=runs)
        gbps = limit.gbps(timed["limit"])
        median, p20, p80 = (t / case.copies for t in (timed["us"].median, timed["us"].p20, timed["us"].p80))
        row = {"op": case.op, "case": case.case, "us": median * 1e6, "p20": p20 * 1e6, "p80": p80 * 1e6,
               "gbps": case.bytes / median / 1e9, "limit_gbps": gbps, "pct_of_limit": case.bytes / median / 1e7 / gbps,
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


def captured(function, device: str):
    """A call whose launches are captured once and replayed, on a GPU: what is timed is the device."""
    graph = StepGraph(device)
    function(0)
    with graph.capture():
        function(0)
    return lambda _run: graph.replay()


def recorded(case: Case, device: str):
    run = over_copies(case.run, case.copies)
    if case.replays or device == "cpu" and (case.copies == 1 or not StepGraph.available()):
        return run
    return captured(run, device)


def line(row: dict) -> str:
    peers = " ".join(f"{us / row['us']:.2f}x {name}" for name, us in row["peers"].items())
    return (f"{row['op']:<16} {row['case']:<34} {row['us']:9.1f} us [{row['p20']:.1f}-{row['p80']:.1f}] "
            f"{row['gbps']:7.1f} GB/s {row['pct_of_limit']:5.0f} % of the limit {row['tflops']:7.3f} TFLOP/s  {peers}")
