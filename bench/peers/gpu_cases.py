"""The GPU peers of a case's problem."""

from collections.abc import Callable
from types import SimpleNamespace

from bench.peers import (
    gpu_engines,  # noqa: F401
    gpu_libraries,  # noqa: F401
)
from bench.peers.gpu_peers import MAKERS, Absent


def peers_of(op: str, problem: SimpleNamespace) -> dict[str, Callable | str]:
    """The callable of every peer of an op, or the reason that it has none."""
    found = {}
    for name, make in MAKERS.get(op, {}).items():
        try:
            found[name] = make(problem)
        except Absent as why:
            found[name] = str(why)
        except Exception as error:  # a peer of another version must not end a benchmark of ours
            found[name] = f"does not start: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return found
