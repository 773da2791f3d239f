"""A plugin of pytest, by which the tests of dflash_kernels meet a kernel of the hub's in its place.

    DFLASH_HUB_KERNEL=build/hub/dflash-kernels-cpu pytest -p tools.hub.loaded tests/kernels/test_norm.py

The package `kernels` loads it from the folder, as it would from the hub.
"""

import importlib
import importlib.abc
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import torch
from kernels import get_local_kernel

NAME = "dflash_kernels"


def load(folder: Path) -> ModuleType:
    """On a machine without a GPU too: the kernel for GPUs is chosen by the CUDA that torch is built with."""
    built = torch.version.cuda
    try:
        if not built and (folder / "build" / "torch-cuda").is_dir():
            torch.version.cuda = "13.0"
        return get_local_kernel(folder)
    finally:
        torch.version.cuda = built


class _InItsPlace(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, kernel: ModuleType):
        self.kernel = kernel

    def find_spec(self, fullname, path=None, target=None):
        if fullname != NAME and not fullname.startswith(f"{NAME}."):
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=True)

    def create_module(self, spec):
        module = importlib.import_module(self.kernel.__name__ + spec.name.removeprefix(NAME))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module):
        module.__spec__ = module.__spec__.loader_state  # its own again


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "kernels_ci: of the hub's own tests")


def pytest_report_header(config) -> str:
    found = sys.modules[NAME]
    return f"{NAME} is {found.__name__}, from {Path(found.__file__).parent}"


if "DFLASH_HUB_KERNEL" not in os.environ or NAME in sys.modules:
    raise RuntimeError(f"tools.hub.loaded: DFLASH_HUB_KERNEL must be a kernel's folder, and {NAME} not imported yet")
sys.meta_path.insert(0, _InItsPlace(load(Path(os.environ["DFLASH_HUB_KERNEL"]))))
importlib.import_module(NAME)
