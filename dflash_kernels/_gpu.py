"""What answers an op on a GPU: Triton, or CUDA C++ where that is measured to be faster.

The CUDA C++ kernels are a library of their own, _cuda, which is loaded only where torch has CUDA. Each of them can
also be called as torch.ops.dflash_cuda.<op>, whichever is chosen here: that is what measurements compare.
"""

import importlib.util
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TypeGuard

import torch

from . import _triton
from ._namespace import OPS

CHOICE = {  # op with a CUDA C++ kernel: (what answers it, where that was measured)
    "write_context_kv": ("triton", "unmeasured"),
}
_lib = torch.library.Library(f"{OPS}_cuda", "DEF")


def usable(cuda: ModuleType | None) -> TypeGuard[ModuleType]:
    """Whether the library runs beside this torch: the CUDA runtime inside it must be content with torch's driver."""
    return (cuda is not None and torch.version.cuda is not None
            and cuda.build_info()["cuda"].split(".")[0] == torch.version.cuda.split(".")[0])


def install(lib: torch.library.Library, cuda: ModuleType | None, fallbacks: Mapping[str, Callable]) -> None:
    """Registers for CUDA tensors, under dflash, the kernel of every op that has one; fallbacks[op] answers where Triton
    turns out not to load."""
    triton = _triton.found()
    ours = []
    if usable(cuda):
        ours = [op for op in cuda.ops() if CHOICE[op][0] == "cuda" or not triton]
        for op in ours:
            cuda.register(OPS, op)
    if triton:
        _triton.install(lib, fallbacks, without=ours)


def problem() -> str | None:
    """Why ops on a GPU are answered by their reference; None where they have kernels. Imports triton."""
    if torch.version.cuda is None and not _triton.installed:
        return "there are GPU kernels for CUDA alone, which this torch is built without"
    return _triton.problem()


def define(schema: str, cuda: ModuleType | None) -> None:
    """Defines dflash_cuda::<op> where the op has a CUDA C++ kernel."""
    op = schema.split("(", 1)[0]
    if usable(cuda) and op in cuda.ops():
        _lib.define(schema)
        cuda.register(f"{OPS}_cuda", op)


def describe(cuda: ModuleType | None, error: str | None) -> str:
    """What the CUDA C++ kernels are compiled for, or why they are not there."""
    if cuda:
        built = cuda.build_info()
        if not usable(cuda):
            return f"built with CUDA {built['cuda']}, not used: this torch has CUDA {torch.version.cuda}"
        return f"CUDA {built['cuda']}: " + " ".join(f"sm_{a}" for a in built["architectures"].split())
    built = importlib.util.find_spec("._cuda", __package__)
    if error:
        return f"built, not loaded: {error}"
    return "built, not loaded: this torch has no CUDA" if built else "not built"
