"""Benchmark cases, which are checked before they are timed, and the rows of their results."""

import functools
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path

import torch

from bench import RESULTS
from bench.timing import CopyBandwidth, ReadBandwidth, interleaved, interleaved_cuda
from dflash_bench.results import commit
from dflash_kernels import PackedWeight, StepGraph, build_info
from dflash_kernels.testing import assert_within_budget

SECONDS = 2.0  # that the timed calls of a case may take together, as far as MIN_RUNS of them allow
MIN_RUNS, SLOW = 7, 0.02  # SLOW: seconds in which a peer does all the copies that it can, in one timed call
FOOTPRINT = 192 << 20  # bytes that the copies of a case's inputs take together, so that no cache keeps them


@dataclass(frozen=True)
class Sizes:
    """Selects a benchmark's shapes: by device, and tiny ones to check that everything runs. peers: whether peers are
    timed.

    Tiny cases are float16, because they also run in the interpreter, which computes bfloat16 wrongly.
    """

    device: str = "cpu"
    tiny: bool = False
    peers: bool = True

    @property
    def name(self) -> str:
        return "tiny" if self.tiny else self.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.tiny else torch.bfloat16

    @property
    def matrix(self) -> int:
        """The number of rows of the matrices that measure the matrix rate."""
        return 64 if self.tiny else 2048 if self.device == "cpu" else 8192

    @property
    def buffer(self) -> int:
        """Megabytes of the buffer that measures the bandwidth limit."""
        return 1 if self.tiny else 256 if self.device == "cpu" else 512

    def random(self, *shape) -> torch.Tensor:
        return torch.randn(shape).to(self.dtype)

    def cached(self, *outputs: torch.Tensor) -> int:
        """Bytes that do not come to memory: on a CPU outputs that every copy writes stay in its caches."""
        return sum(out.nbytes for out in outputs if self.device == "cpu")

    def copies_of(self, nbytes: int) -> int:
        """The number of copies to rotate over, for inputs of nbytes."""
        return 2 if self.tiny else max(3, min(FOOTPRINT // nbytes, 1024))

    def peers_of(self, op: str, problem) -> dict[str, Callable[[int], object] | str]:
        """The problem's own expression in torch, eager and compiled, and on a GPU the op's peers of bench/peers.

        problem.expression(*problem.args(i)) is the expression; or problem.whole, which writes its result to where
        problem.written() finds it.
        """
        if not self.peers:
            return {}
        whole, written = getattr(problem, "whole", problem.expression), getattr(problem, "written", None)

        def calling(function):
            def call(i):
                result = function(*problem.args(i))
                return written or result
            return call

        found = {"torch": calling(whole)}
        if self.device == "cpu":
            from bench.peers import cpu_peers

            function = "left out: it takes longer than all the rest" if self.tiny else cpu_peers.compiled(whole)
            return found | {"torch.compile": function if isinstance(function, str) else calling(function)}
        from bench.peers import gpu_cases

        return found | gpu_cases.peers_of(op, problem)


def device_name(device: str = "cpu") -> str:
    return build_info()["cpu"] if device == "cpu" else torch.cuda.get_device_name(device)


def results_folder(device: str = "cpu") -> Path:
    """The folder of this machine's results."""
    return RESULTS / re.sub(r"[^A-Za-z0-9]+", "-", device_name(device)).strip("-").lower()


def settled(result) -> tuple:
    """The tensors of a result: one, several, or those of a function that returns them."""
    result = result() if callable(result) else result
    return result if isinstance(result, tuple) else (result,)


def agreeing(truth: Callable[[], tuple], like: Callable[[], tuple] | None = None) -> Callable[[tuple], None]:
    """A check. Integers must equal the truth; floats must stay within the error budget of `like`, the same work written
    in torch in the same dtype."""
    wanted = functools.cache(lambda: (settled(truth()), settled(like()) if like else None))

    def check(got: tuple) -> None:
        want, peer = wanted()
        assert len(got) == len(want), f"{len(got)} results for {len(want)}"
        for at, (ours, exact) in enumerate(zip(got, want, strict=True)):
            if exact.is_floating_point():
                assert_within_budget(ours, exact, peer[at], name=f"result {at}")
            else:
                assert torch.equal(ours.to(exact.dtype), exact), f"result {at}: other integers"

    return check


@dataclass(frozen=True)
class Case:
    """One case. run(i) and each peer(i) do the same work on copy i of the inputs, i < copies.

    check is given the settled results of run(0) and of each peer(0), and raises AssertionError for a wrong one. A peer
    that is a text is absent, and the text says why.

    With several copies our calls are recorded, one per copy, and timed as one replay. The time is that of the kernel
    and its launch, as in a decoding step, without Python. On a GPU the same holds for peers; on a CPU peers are called
    in a Python loop.
    """

    op: str
    case: str
    run: Callable[[int], object]
    bytes: int
    copies: int = 1
    flops: int = 0
    peers: dict[str, Callable[[int], object] | str] = field(default_factory=dict)
    check: Callable[[tuple], None] = lambda got: None
    headline: bool = False  # in the first table of docs/performance.md
    replays: bool = False  # run is the replay of a graph
    cached: int = 0  # of the bytes, those that stay in caches as run is called here


def packed_bytes(*records) -> int:
    """The bytes of every packed weight in some layers or a drafter, and in the records that they hold."""
    held = [part for r in records for value in vars(r).values() for part in getattr(value, "parts", [value])]
    return sum(part.data.nbytes if isinstance(part, PackedWeight) else packed_bytes(part) if is_dataclass(part) else 0
               for part in held)


def header(sizes: Sizes) -> dict:
    """The machine and settings of the rows, and the machine's limits: copy bandwidth, on a CPU also read bandwidth, in
    GB/s, and the rate of torch's matrix product in TFLOP/s."""
    device = sizes.device
    info = build_info()
    where = {"device": device_name(device), "cores": os.cpu_count(), "commit": commit(), **limits(sizes)}
    if device != "cpu":
        import triton

        from bench.peers import gpu_peers

        where |= {"cpu": info["cpu"], "cuda": torch.version.cuda, "triton": triton.__version__,
                  "multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count,
                  **gpu_peers.versions()}
    return where | {k: info[k] for k in ("version", "torch", "python", "platform", "isa", "threads", "compiler")}


def limits(sizes: Sizes) -> dict[str, float]:
    with torch.device(sizes.device):
        a, b = (sizes.random(sizes.matrix, sizes.matrix) for _ in range(2))
    meters = {"copy_gbps": CopyBandwidth(sizes.device, sizes.buffer)}
    if sizes.device == "cpu":
        meters["read_gbps"] = ReadBandwidth(sizes.buffer)
    clock = interleaved if sizes.device == "cpu" else interleaved_cuda
    timed = clock({"product": lambda i: a @ b, **meters}, runs=10)
    return {"matrix_tflops": round(2 * sizes.matrix**3 / timed["product"].median / 1e12, 2),
            **{name: round(meter.gbps(timed[name]), 1) for name, meter in meters.items()}}


def measure(cases: Iterable[Case], runs: int, sizes: Sizes, keep: Callable[[dict], None] = lambda row: None
            ) -> list[dict]:
    """One row per case, without times if our own result is wrong.

    The limit, a CPU's read bandwidth or a GPU's copy bandwidth, is measured between the calls of the case. keep is
    given each row as soon as it exists, so that an interruption loses only the case in progress.
    """
    on_cpu = sizes.device == "cpu"
    rows, limit = [], ReadBandwidth(sizes.buffer) if on_cpu else CopyBandwidth(sizes.device, sizes.buffer)
    for case in cases:
        row = measured(case, runs, sizes.device, limit)
        keep(row)
        rows.append(row)
        print(line(row), flush=True)
    return rows


def measured(case: Case, runs: int, device: str, limit: ReadBandwidth | CopyBandwidth) -> dict:
    try:
        case.check(settled(case.run(0)))
        return timed(case, runs, device, limit)
    except AssertionError as error:  # reported at the end, after the other cases
        return {"op": case.op, "case": case.case, "wrong": first_line(error)}
    except Exception as error:
        if device == "cpu":
            raise
        return {"op": case.op, "case": case.case, "wrong": f"fails: {type(error).__name__}: {first_line(error)}"}


def timed(case: Case, runs: int, device: str, limit: ReadBandwidth | CopyBandwidth) -> dict:
    peers, counts, without = {}, {}, {}
    for name, peer in case.peers.items():
        try:
            peers[name], counts[name] = ready(case, name, peer, device)
        except Unusable as why:
            without[name] = str(why)
    clock = interleaved if device == "cpu" else interleaved_cuda
    # The limit's pass takes what the last peer left in the caches out of them, so that ours finds nothing there.
    functions = {"limit": limit, "us": recorded(case, device), **peers}
    times = clock(functions, runs=affordable(functions, runs) if device == "cpu" else runs)
    gbps, moved = limit.gbps(times["limit"]), case.bytes - case.cached
    median, p20, p80 = (t / case.copies for t in (times["us"].median, times["us"].p20, times["us"].p80))
    return {"op": case.op, "case": case.case, "us": median * 1e6, "p20": p20 * 1e6, "p80": p80 * 1e6,
            "gbps": moved / median / 1e9, "limit_gbps": gbps, "pct_of_limit": moved / median / 1e7 / gbps,
            "floor_us": moved / gbps / 1e3, "tflops": case.flops / median / 1e12, "headline": case.headline,
            "peers": {name: times[name].median / counts[name] * 1e6 for name in peers}, "without": without}


def affordable(functions: dict[str, Callable[[int], object]], runs: int) -> int:
    """The number of runs that fit in SECONDS: some peers take a thousand times as long as we do."""
    began = time.perf_counter()
    for function in functions.values():
        function(0)
    return min(runs, max(MIN_RUNS, int(SECONDS / (time.perf_counter() - began))))


class Unusable(Exception):
    """The reason that a peer has no time in a row."""


def ready(case: Case, name: str, peer: Callable[[int], object] | str,
          device: str) -> tuple[Callable[[int], object], int]:
    """The peer ready to be timed, after its result is compared, and its number of copies: all, or as many as are not
    too slow. Any failure becomes a line in the table, because a peer must not end a benchmark."""
    if isinstance(peer, str):
        raise Unusable(f"{name}: {peer}")
    where = f"in {case.op}, {case.case}"
    try:
        case.check(settled(peer(0)))
        if device != "cpu":
            return captured(over_copies(peer, case.copies), device), case.copies
        began = time.perf_counter()
        peer(1 % case.copies)
        count = max(1, min(case.copies, int(SLOW / (time.perf_counter() - began))))
        return over_copies(peer, case.copies, count), count
    except AssertionError as error:
        raise Unusable(f"{name} differs {where}: {first_line(error)}") from error
    except Exception as error:
        if name == "torch" and not isinstance(error, torch.OutOfMemoryError):
            raise
        raise Unusable(f"{name} fails {where}: {type(error).__name__}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]


def over_copies(function, copies, count=None):
    """call(run): the function on `count` copies, by default all, continuing where the previous run ended."""
    count = count or copies

    def call(run):
        for i in range(run * count, (run + 1) * count):
            function(i % copies)
    return call


def captured(function, device: str):
    """A call whose launches are captured once and replayed, on a GPU, so that the device is timed."""
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
    if "wrong" in row:
        return f"{row['op']:<16} {row['case']:<34} WRONG: {row['wrong']}"
    peers = ", ".join(f"{us / row['us']:.2f} x {name}" for name, us in row["peers"].items())
    return (f"{row['op']:<16} {row['case']:<34} {row['us']:9.1f} us [{row['p20']:.1f}-{row['p80']:.1f}] "
            f"{row['gbps']:7.1f} GB/s {row['pct_of_limit']:5.0f} % of the limit {row['tflops']:7.3f} TFLOP/s  {peers}")


def footnotes(rows: list[dict]) -> list[str]:
    """The reasons for missing peer times, each once."""
    return list(dict.fromkeys(why for row in rows for why in row.get("without", {}).values()))
