"""A recorded step: a CUDA graph on a GPU, its counterpart on a CPU.

A decoding step is some hundred short kernels over the same memory. Calling them one by one from Python costs as much as
the smaller ones take. `StepGraph` runs a step once, records every launch, and then replays the launches without Python.
The rules are those of CUDA graphs: shapes and addresses are fixed. Lengths, tables and tokens are read from tensors
when the step runs, so they are changed in place between replays.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import _gpu
from ._library import native
from ._namespace import OPS
from .ops import _checks

_VIEWS = {"view", "_unsafe_view", "slice", "select", "unsqueeze", "squeeze", "transpose", "t", "permute", "expand",
          "narrow", "split", "split_with_sizes", "unbind", "as_strided", "alias", "detach", "empty", "empty_like",
          "new_empty", "empty_strided", "new_empty_strided"}


class _OnlyOurOps(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls):
        return False  # otherwise the first capture imports torch._dynamo, which takes longer than loading a small model

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != OPS and func._schema.name.split("::")[1] not in _VIEWS:
            raise RuntimeError(f"StepGraph: only dflash ops and views can be captured; got {func}")
        return func(*args, **(kwargs or {}))


@cache
def _stream_of(index: int) -> torch.cuda.Stream:
    """For all captures on a device, as graphs that share memory have to be captured on one stream."""
    return torch.cuda.Stream(torch.device("cuda", index))


class StepGraph:
    """Captures one step's launches and replays them.

    Parameters
    ----------
    device : torch.device or str
        Where the step's tensors are: "cpu" or a CUDA device.
    pool : tuple, optional
        A torch.cuda.graph_pool_handle(), for graphs that share memory. Such graphs are replayed one after the other, on
        one stream, and the outputs of one are read before another is replayed. None: memory of its own.

    Notes
    -----
    On a CPU a capture runs the step. The graph keeps the tensors alive that its launches touch. Only dflash ops, views
    and allocations can be captured: any other op, and the replay of another graph, raises RuntimeError.

    On CUDA a capture runs nothing; only a replay does. The step must have run once before, uncaptured, so that its
    kernels are loaded. The graph keeps the memory that the step allocates. The caller keeps the step's inputs alive.

    An exception during a capture, an interrupt included, ends it and leaves the graph as it was. Where available() is
    False, call the step directly. len(graph) is the number of launches in a CPU recording, and 0 on CUDA.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels import StepGraph, silu_and_mul
    >>> x, out = torch.zeros(1, 2), torch.empty(1, 1)
    >>> graph = StepGraph("cpu")
    >>> with graph.capture():
    ...     _ = silu_and_mul(x, out=out)
    >>> _ = x.copy_(torch.tensor([[100.0, 3.0]]))
    >>> graph.replay()
    >>> out.tolist(), len(graph)
    ([[300.0]], 1)
    """

    def __init__(self, device: torch.device | str = "cpu", pool: tuple[int, int] | None = None):
        self.device, self.pool = torch.device(device), pool
        self._recording: Any = None

    @staticmethod
    def available(device: torch.device | str = "cpu") -> bool:
        """Whether steps on a device can be captured. It imports triton if that decides the answer.

        Parameters
        ----------
        device : torch.device or str
            "cpu" or a CUDA device.

        Returns
        -------
        available : bool
            On a CPU, True if the C++ library is loaded. On CUDA, True if the GPU is present and the ops have kernels
            for it. False with DFLASH_CHECK=1, because a replay checks no values and every step is to be checked.

        Examples
        --------
        >>> from dflash_kernels import StepGraph
        >>> StepGraph.available("cpu")
        True
        """
        kind = torch.device(device).type
        if _checks.checking():
            return False
        if kind == "cpu":
            return native is not None
        return kind == "cuda" and torch.cuda.is_available() and _gpu.problem() is None

    @property
    def captured(self) -> bool:
        """Whether there is anything to replay.

        Examples
        --------
        >>> from dflash_kernels import StepGraph
        >>> StepGraph("cpu").captured
        False
        """
        return self._recording is not None

    def capture(self) -> AbstractContextManager[None]:
        """Records the launches of a `with` block.

        Returns
        -------
        context : context manager

        Raises
        ------
        RuntimeError
            Nested captures, or a device where no step can be captured.

        Examples
        --------
        >>> import torch
        >>> from dflash_kernels import StepGraph, rms_norm, silu_and_mul
        >>> x, weight = torch.ones(1, 4), torch.ones(4)
        >>> graph = StepGraph("cpu")
        >>> with graph.capture():
        ...     out = silu_and_mul(rms_norm(x, weight))
        >>> graph.captured, len(graph)
        (True, 2)
        """
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
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        try:
            # torch's own stream for captures is of the device where it captured first.
            with torch.cuda.device(self.device), torch.cuda.graph(
                    recording, pool=self.pool,  # type: ignore[arg-type]  # torch has a NewType of such a pair
                    stream=_stream_of(index)):
                yield
        finally:  # torch's own exit does both, unless an interrupt came between its lines
            try:
                with torch.cuda.device(self.device):
                    if torch.cuda.is_current_stream_capturing():
                        recording.capture_end()
            finally:
                if torch.cuda.current_stream(self.device) != before:
                    torch.cuda.set_stream(before)
        self._recording = recording

    def replay(self) -> None:
        """Runs the captured launches again on the same memory.

        Raises
        ------
        RuntimeError
            Nothing is captured yet, or a CPU capture is in progress.

        Examples
        --------
        >>> import torch
        >>> from dflash_kernels import StepGraph, embed_tokens
        >>> ids, table = torch.tensor([0]), torch.tensor([[1.0], [2.0]])
        >>> graph = StepGraph("cpu")
        >>> with graph.capture():
        ...     row = embed_tokens(ids, table)
        >>> _ = ids.fill_(1)
        >>> graph.replay()
        >>> row.tolist()
        [[2.0]]
        """
        if self._recording is None:
            raise RuntimeError("StepGraph: nothing is captured yet")
        if self.device.type == "cuda":
            self._recording.replay()
        else:
            native.replay(self._recording)

    def __bool__(self) -> bool:
        """True: it is a graph, whatever its length."""
        return True

    def __len__(self) -> int:
        """Number of launches in a CPU recording; 0 on CUDA."""
        return 0 if self._recording is None or self.device.type == "cuda" else native.record_size(self._recording)
