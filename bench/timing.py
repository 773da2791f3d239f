"""Interleaved timing, with the machine's limit measured in the same run."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from dflash_kernels._library import native
from dflash_kernels._memory import place
from dflash_kernels.testing import use_isa


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median, 20th and 80th percentile of `runs` calls."""

    median: float
    p20: float
    p80: float
    runs: int


def interleaved(functions: Mapping[str, Callable[[int], object]], *, runs: int = 30,
                warmup: int = 3) -> dict[str, Timing]:
    """Times each function(i) for i in range(runs), one call of each in turn, so that noise on the machine affects all
    alike.

    i is the number of the run, to rotate the inputs by.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for name, function, i in _in_turn(functions, runs, warmup):
        start = time.perf_counter()
        function(i)
        seconds[name].append(time.perf_counter() - start)
    return {name: _summary(values) for name, values in seconds.items()}


def interleaved_cuda(functions: Mapping[str, Callable[[int], object]], *, runs: int = 30,
                     warmup: int = 3) -> dict[str, Timing]:
    """`interleaved` with the GPU's clock: events before and after each call on the current stream. The host runs ahead,
    so its cost does not count while it is below the device's."""
    marks: dict[str, list[tuple]] = {name: [] for name in functions}
    for name, function, i in _in_turn(functions, runs, warmup):
        pair = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
        pair[0].record()
        function(i)
        pair[1].record()
        marks[name].append(pair)
    torch.cuda.synchronize()
    return {name: _summary([a.elapsed_time(b) / 1e3 for a, b in pairs]) for name, pairs in marks.items()}


def _in_turn(functions, runs, warmup):
    """Warms up, then yields (name, function, number of the run) of every call to be timed."""
    for i in range(warmup):
        for function in functions.values():
            function(i)
    for i in range(runs):
        for name, function in functions.items():
            yield name, function, i


def _summary(values: list[float]) -> Timing:
    ordered = sorted(values)
    pick = lambda q: ordered[min(int(q * len(ordered)), len(ordered) - 1)]  # noqa: E731
    return Timing(statistics.median(ordered), pick(0.2), pick(0.8), len(ordered))


class ReadBandwidth:
    """Reads a buffer larger than every cache, in huge pages, with all of torch's threads and several streams each.
    Lines are asked for into the first-level cache or the second, whichever is faster on this machine.

    It is a function for `interleaved`; gbps(timing) gives 1e9 bytes per second. stretch: megabytes that a call reads,
    after those of the call before; None: all.
    """

    def __init__(self, megabytes: int = 256, stretch: int | None = None):
        self._buffer = place(torch.ones(megabytes << 18, dtype=torch.int32))
        self.bytes = (stretch or megabytes) << 20
        self._parts = megabytes // (stretch or megabytes)
        self._far = False
        if native is not None:
            timed = interleaved({"near": lambda i: self._read(i, False), "far": lambda i: self._read(i, True)}, runs=9)
            self._far = timed["far"].median < timed["near"].median

    def _read(self, run: int, far: bool) -> None:
        native.stream_read(self._buffer.data_ptr() + run % self._parts * self.bytes, self.bytes, far)

    def __call__(self, run: int = 0) -> None:
        if native is None:
            self._buffer.view(torch.int64).sum()
        else:
            self._read(run, self._far)

    def gbps(self, timing: Timing) -> float:
        return self.bytes / timing.median / 1e9


class MatrixRate:
    """Multiplies and adds in registers alone, with all of torch's threads, as products of rows in `what` (bf16 or int8)
    do under an instruction set: what they could reach if memory cost nothing.

    It is a function for `interleaved`; tflops(timing) gives 1e12 operations per second.
    """

    ROUNDS = 500_000  # a millisecond and more, beside which the start of threads is little

    def __init__(self, isa: str, what: str = "bf16"):
        self._isa, self._what, self._flops = isa, what, 0

    def __call__(self, _run: int = 0) -> None:
        with use_isa(self._isa):
            self._flops = native.matrix_rate(self._what, self.ROUNDS)

    def tflops(self, timing: Timing) -> float:
        return self._flops / timing.median / 1e12


class CopyBandwidth:
    """Copies a buffer larger than a GPU's L2. gbps(timing) counts reads and writes, in 1e9 bytes/s."""

    def __init__(self, device: torch.device | str = "cuda", megabytes: int = 512):
        self._from = torch.ones(megabytes << 18, dtype=torch.int32, device=device)
        self._to = torch.empty_like(self._from)
        self.bytes = 2 * self._from.numel() * 4

    def __call__(self, _run: int = 0) -> None:
        self._to.copy_(self._from)

    def gbps(self, timing: Timing) -> float:
        return self.bytes / timing.median / 1e9
