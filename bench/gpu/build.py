"""Checks whether the libraries in the tree were built from its sources."""

import sys
from pathlib import Path

from bench import ROOT


def prebuilt(folder: Path = ROOT / "dflash_kernels", nvcc: bool | None = None) -> bool:
    """Whether both libraries, or the one that can be built here, exist and carry the mark of this tree's sources
    (setup.py). nvcc: whether it is there; looked for if None."""
    import setup

    wanted = ["_C"] + ["_cuda"] * bool(setup.find_nvcc() if nvcc is None else nvcc)
    files = [folder / f"{name}.abi3.so" for name in wanted]
    return all(file.is_file() and setup.sources_mark().encode() in file.read_bytes() for file in files)


def command() -> list[str]:
    return [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
