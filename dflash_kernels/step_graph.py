"""A recorded step: a CUDA graph on a GPU, its twin on a CPU.

A decoding step is some hundred short kernels over the same memory, and calling them one by one from Python costs as
much as the smaller ones take. `StepGraph` runs a step once while it notes every launch, and then replays the launches
with no Python in between. The rules are those of CUDA graphs everywhere: fixed shapes and addresses, and lengths,
tables and tokens are read from tensors when the step runs, so they are changed in place between replays.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import _gpu
from ._library import native
from .ops import _checks

_VIEWS = {"view", "_unsafe_view", "slice", "select", "unsqueeze", "squeeze", "transpose", "t", "permute", "expand",
          "narrow", "split", "split_with_sizes", "unbind", "as_strided", "alias", "detach", "empty", "empty_like",
          "new_empty", "empty_strided", "new_empty_strided"}


class _OnlyOurOps(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "dflash" and func._schema.name.split("::")[1] not in _VIEWS:
            raise RuntimeError(f"StepGraph: only dflash ops and views can be captured; got {func}")
        return func(*args, **(kwargs or {}))


class StepGraph:
    """Captures one step's launches and replays them.

    graph = StepGraph(device)
    with graph.capture():
        step()
    graph.replay()

    device: where the step's tensors are, "cpu" or a CUDA device. On a CPU `capture` runs the step for real, the graph
    keeps the tensors that its launches touch alive, and any op other than dflash ops, views and allocations raises
    RuntimeError, because it would not be replayed; so does the replay of another graph. On CUDA `capture` runs nothing,
    only `replay` does, and a step must have run once before, uncaptured, so that its kernels are loaded; the graph
    keeps the memory that the step allocates, and its inputs are the caller's to keep.
    pool: torch.cuda.graph_pool_handle(), for graphs that share that memory: they must be replayed one after the other,
    on one stream, and what one has allocated is read before another is replayed. None: memory of its own.

    An exception in a capture, an interrupt among them, ends it, and the graph is as it was. Without the C++ library, or
    without the GPU and its kernels, `available(device)` is False and the step is to be called directly. So it is with
    DFLASH_CHECK=1: a replay checks no values, and every step is to be checked.
    """

    def __init__(self, device: torch.device | str = "cpu", pool: tuple[int, int] | None = None):
        self.device, self.pool = torch.device(device), pool
        self._recording: Any = None

    @staticmethod
    def available(device: torch.device | str = "cpu") -> bool:
        """True where the C++ library is loaded, and for CUDA devices that are there where the ops have kernels; False
        with DFLASH_CHECK=1. Imports triton where that is to be found out."""
        kind = torch.device(device).type
        if _checks.checking():
            return False
        if kind == "cpu":
            return native is not None
        return kind == "cuda" and torch.cuda.is_available() and _gpu.problem() is None

    @property
    def captured(self) -> bool:
        """Whether there is something to replay."""
        return self._recording is not None

    def capture(self) -> AbstractContextManager[None]:
        """Notes the launches of the `with` block. Raises RuntimeError when nested or unavailable."""
        if not self.available(self.device):
            raise RuntimeError(f"StepGraph: {self._problem()}; call the step directly")
        return self._capture_cuda() if self.device.type == "cuda" else native.Capture(self, _OnlyOurOps())

    def _problem(self) -> str:
        if _checks.checking():
            return "DFLASH_CHECK=1 checks the values of every step, and a replay checks none"
        return "the C++ library is not built" if self.device.type == "cpu" else f"{self.device} is not there"

    @contextmanager
    def _capture_cuda(self) -> Iterator[None]:
        recording, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            with torch.cuda.device(self.device), torch.cuda.graph(
                    recording, pool=self.pool):  # type: ignore[arg-type]  # torch has a NewType of such a pair
                yield
        finally:  # torch's own exit does both, unless an interrupt came between its lines
            try:
                if torch.cuda.is_current_stream_capturing():
                    recording.capture_end()
            finally:
                if torch.cuda.current_stream(self.device) != before:
                    torch.cuda.set_stream(before)
        self._recording = recording

    def replay(self) -> None:
        """Runs the captured launches again on the same memory. Raises RuntimeError before a capture, and in one."""
        if self._recording is None:
            raise RuntimeError("StepGraph: nothing is captured yet")
        if self.device.type == "cuda":
            self._recording.replay()
        else:
            native.replay(self._recording)

    def __len__(self) -> int:
        """Launches of a CPU recording."""
        return 0 if self._recording is None or self.device.type == "cuda" else native.record_size(self._recording)
