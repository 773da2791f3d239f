"""torch.compile as a peer on a CPU, where inductor writes C++ and needs a compiler for it."""

from collections.abc import Callable
from functools import cache

import torch


@cache
def unusable() -> str:
    """The reason that nothing can be compiled here, determined once; empty where it can."""
    try:
        with torch.device("cpu"):
            torch.compile(lambda x: x.sin() + 1, fullgraph=True)(torch.ones(8))
    except Exception as error:  # what a broken installation raises is its own
        said = (str(error).strip().splitlines() or [""])[0][:120]
        return f"inductor does not work here: {type(error).__name__}: {said}"
    return ""


def compiled(function: Callable) -> Callable | str:
    """The function, compiled for each shape when first called, or the reason that it cannot be."""
    if why := unusable():
        return why
    torch._dynamo.reset()  # cases share their code, and only so many versions of one are kept
    return torch.compile(function, fullgraph=True, dynamic=False)
