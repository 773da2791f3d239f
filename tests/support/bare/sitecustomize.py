"""First on PYTHONPATH, it makes Python look as on a bare machine: torch, triton, pytest, ninja, setuptools and what
they require can be found, what lies in folders of PYTHONPATH, the standard library, and what ALSO_THERE names."""

import importlib.metadata as metadata
import os
import re
import sys
import sysconfig
from importlib.machinery import PathFinder

THERE = ("torch", "triton", "pytest", "ninja", "setuptools", *os.environ.get("ALSO_THERE", "").split())
SITES = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}


def with_requirements(names):
    found, left = set(), list(names)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name not in found:
            found.add(name)
            try:
                needs = metadata.requires(name) or []
            except metadata.PackageNotFoundError:
                continue
            left += [re.match(r"[\w.-]+", need)[0] for need in needs if "extra ==" not in need]
    return found


def hidden():
    """Top-level modules that belong to other distributions alone."""
    there = with_requirements(THERE)
    return {module for module, owners in metadata.packages_distributions().items()
            if not any(re.sub(r"[-_.]+", "-", owner).lower() in there | {"dflash-kernels"} for owner in owners)}


class OnlyThere(PathFinder):
    absent = hidden()

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if path is None and fullname in cls.absent:  # setuptools brings some of its own, in a folder of its own
            path = [folder for folder in sys.path if folder not in SITES]
        return super().find_spec(fullname, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = OnlyThere
