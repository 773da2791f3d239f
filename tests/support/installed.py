"""What people install: distributions built from this tree, and environments that have them, torch and nothing else."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from tests.support import ROOT

LIBRARY = ROOT / "dflash_kernels" / "_C.abi3.so"
DRAFTER = Path("drafters", "smollm2-135m-instruct")
_MADE = (".git", ".venv", "build", "dist", "results", "__pycache__", "*.so", "*.egg-info", ".*_cache", ".hypothesis")
_BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def build(folder: Path) -> dict[str, Path]:
    """The source distribution, the wheel that is built from it, and the drafter's wheel. Nothing is compiled: the
    library that lies in the tree goes into the wheel."""
    tree, out = folder / "tree", folder / "dist"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*_MADE))
    sdist = _built(tree, out, "build_sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    source = folder / sdist.name.removesuffix(".tar.gz")
    (source / "setup.cfg").write_text("[build]\nbuild_lib = lib\n")
    (source / "lib" / "dflash_kernels").mkdir(parents=True)
    if LIBRARY.exists():
        shutil.copy(LIBRARY, source / "lib" / "dflash_kernels")
    return {"sdist": sdist, "wheel": _built(source, out, "build_wheel"),
            "drafter": _built(tree / DRAFTER, out, "build_wheel")}


def _built(folder: Path, out: Path, kind: str) -> Path:
    done = _run([sys.executable, "-c", _BUILD, kind, str(out)], folder, DFLASH_NO_CPP="1")
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


def _run(command: list[str], folder: Path, **more: str) -> subprocess.CompletedProcess:
    """With no path to this tree and no settings of pip's."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_", "DFLASH_"))}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL,
                          env=clean | {"PYTHONNOUSERSITE": "1", "PIP_CONFIG_FILE": os.devnull} | more)


class Environment:
    """An environment of its own with the distributions of these names, as they are installed here, and what they
    require."""

    def __init__(self, folder: Path, *names: str):
        venv.create(folder, with_pip=False, symlinks=True)
        self.folder, self.bin = folder, folder / "bin"
        here, base = sysconfig.get_path("purelib"), {"base": str(folder), "platbase": str(folder)}
        site = Path(sysconfig.get_path("purelib", "venv", base))
        for name in _with_requirements(names):
            found = metadata.distribution(name)
            for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
                if not (site / top).exists():
                    (site / top).symlink_to(Path(here, found.locate_file(top)))

    def install(self, *what: str | Path) -> None:
        """pip finds all that these require in the environment, or fails."""
        done = _run([sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "install", "--quiet",
                     "--no-index", "--disable-pip-version-check", "--no-compile", *map(str, what)], self.folder)
        assert done.returncode == 0, done.stdout + done.stderr

    def run(self, program: str, *words: str) -> subprocess.CompletedProcess:
        return _run([str(self.bin / program), *words], self.folder, DFLASH_CACHE=str(self.folder / "cache"))


def _with_requirements(names: tuple[str, ...]) -> set[str]:
    found, left = set(), list(names)
    while left:
        name = left.pop()
        try:
            needs = map(Requirement, metadata.requires(name) or ())
        except metadata.PackageNotFoundError:  # of another platform or a smaller build
            continue
        if name not in found:
            found.add(name)
            left += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found
