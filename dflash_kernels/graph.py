"""A recorded step: the CPU's twin of a CUDA graph.

A decoding step is some hundred short kernels over the same memory, and calling them one by one from Python costs as
much as the smaller ones take. `StepGraph` runs a step once while it notes every launch, and then replays the launches
with no Python in between. The rules are those of CUDA graphs: fixed shapes and addresses, and lengths, tables and
tokens are read from tensors when the step runs, so they are changed in place between replays.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils._python_dispatch import TorchDispatchMode

from . import _library
from ._library import native

_VIEWS = {"view", "_unsafe_view", "slice", "select", "unsqueeze", "squeeze", "transpose", "t", "permute", "expand",
          "narrow", "split", "split_with_sizes", "unbind", "as_strided", "alias", "detach", "empty", "empty_like",
          "new_empty", "empty_strided", "new_empty_strided"}


class _OnlyOurOps(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "dflash" and func._schema.name.split("::")[1] not in _VIEWS:
            raise RuntimeError(f"StepGraph: only dflash ops and views can be captured; got {func}")
        return func(*args, **(kwargs or {}))


class StepGraph:
    """Captures one step's launches on the CPU and replays them.

    with graph.capture():
        step()
    graph.replay()

    `capture` runs the step for real. Tensors that its launches touch are kept alive by the graph. Any op other than
    dflash ops, views and allocations raises RuntimeError, because it would not be replayed. Without the C++ library,
    or on another device, `available()` is False and the step is to be called directly.
    """

    def __init__(self):
        self._recording = None

    @staticmethod
    def available() -> bool:
        """True where the C++ library is loaded."""
        return native is not None

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Runs the block once and notes its launches. Raises RuntimeError when nested or unavailable."""
        if native is None:
            raise RuntimeError("StepGraph: the C++ library is not built; call the step directly")
        recording = native.record_begin()
        _library.capturing += 1
        try:
            with _OnlyOurOps():
                yield
        finally:
            _library.capturing -= 1
            native.record_end()
        self._recording = recording

    def replay(self) -> None:
        """Runs the captured launches again on the same memory. Raises RuntimeError before a capture."""
        if self._recording is None:
            raise RuntimeError("StepGraph: nothing is captured yet")
        native.replay(self._recording)

    def __len__(self) -> int:
        return 0 if self._recording is None else native.record_size(self._recording)
