"""What this installation is made of."""

import platform
import sys

import torch

from . import _gpu, _library


def build_info() -> dict[str, object]:
    """Facts for a bug report or a benchmark's header.

    Returns version, python, torch, platform, ops (names), cpu_kernels (True when the C++ library is built), isa (the
    instruction set in use), isas (those this CPU has, lowest first), compiler, nvcc ("found" or "not found" when it was
    built), cuda_kernels (what the CUDA C++ library is compiled for, or why it is not there), cuda (True when torch sees
    a GPU), threads.
    """
    from . import __version__

    native = _library.native
    built = native.build_info() if native else {}
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{sys.platform} {platform.machine()}",
        "ops": sorted(_library.NAMES),
        "cpu_kernels": native is not None,
        "isa": native.isa() if native else "reference",
        "isas": native.isas() if native else [],
        "compiler": built.get("compiler", ""),
        "nvcc": built.get("nvcc", ""),
        "cuda_kernels": _gpu.describe(_library.cuda, _library.cuda_error),
        "cuda": torch.cuda.is_available(),
        "threads": torch.get_num_threads(),
    }
