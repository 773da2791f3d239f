"""CPU kernels under each instruction set that the CPU has."""

from collections.abc import Iterator
from contextlib import contextmanager

from .._library import native


def every_isa() -> list[str]:
    """The instruction sets of this CPU.

    Returns
    -------
    names : list of str
        Lowest first; ["reference"] if the C++ library is not built.

    Examples
    --------
    >>> from dflash_kernels import build_info
    >>> from dflash_kernels.testing import every_isa
    >>> build_info()["isa"] in every_isa()
    True
    """
    return native.isas() if native else ["reference"]


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Runs CPU kernels with one instruction set inside a `with` block.

    Parameters
    ----------
    name : str
        One of `every_isa()`.

    Returns
    -------
    context : context manager

    Examples
    --------
    >>> from dflash_kernels import build_info
    >>> from dflash_kernels.testing import every_isa, use_isa
    >>> with use_isa(every_isa()[0]):
    ...     build_info()["isa"] == every_isa()[0]
    True
    """
    if native is None:
        yield
        return
    before = native.isa()
    native.set_isa(name)
    try:
        yield
    finally:
        native.set_isa(before)
