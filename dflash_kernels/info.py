"""Facts about this installation."""

import platform
import sys
from pathlib import Path

import torch

from . import _gpu, _library
from ._version import __version__


def cpu_model() -> str:
    """The processor's name, as its maker writes it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def build_info() -> dict[str, object]:
    """Facts for a bug report or a benchmark's header.

    Returns
    -------
    facts : dict
        Keys: version, python, torch, platform, cpu (the processor's name), ops (their names), cpu_kernels (True if the
        C++ library is built), isa (the instruction set in use), isas (those that the CPU has, lowest first), compiler,
        sources (a digest of what the C++ library was built from), nvcc ("found" or "not found" then), cuda_kernels
        (targets of the CUDA C++ library, or why it is missing), cuda (True if torch sees a GPU), threads.

    Examples
    --------
    >>> import dflash_kernels
    >>> facts = dflash_kernels.build_info()
    >>> facts["version"] == dflash_kernels.__version__, "rms_norm" in facts["ops"]
    (True, True)
    """
    native = _library.native
    built = native.build_info() if native else {}
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{sys.platform} {platform.machine()}",
        "cpu": cpu_model(),
        "ops": sorted(_library.NAMES),
        "cpu_kernels": native is not None,
        "isa": native.isa() if native else "reference",
        "isas": native.isas() if native else [],
        "compiler": built.get("compiler", ""),
        "sources": "".join(built.get("sources", "").split()[2:3])[:12],
        "nvcc": built.get("nvcc", ""),
        "cuda_kernels": _gpu.describe(_library.cuda, _library.cuda_error),
        "cuda": torch.cuda.is_available(),
        "threads": torch.get_num_threads(),
    }
