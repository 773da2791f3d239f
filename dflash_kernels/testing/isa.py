"""Runs a piece of code under each instruction set that the CPU has."""

from collections.abc import Iterator
from contextlib import contextmanager

from .._library import native


def every_isa() -> list[str]:
    """The instruction sets of this CPU, lowest first; ["reference"] where the C++ library is not built."""
    return native.isas() if native else ["reference"]


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """CPU kernels run with instruction set `name` inside the block."""
    if native is None:
        yield
        return
    before = native.isa()
    native.set_isa(name)
    try:
        yield
    finally:
        native.set_isa(before)
