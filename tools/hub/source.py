"""What kernel-builder takes: build.toml, torch-ext with the Python package, the C++ sources, a card, a flake, tests."""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import setup
from bench import ROOT
from dflash_kernels import __version__

PACKAGE, TEMPLATE = "dflash_kernels", Path(__file__).parent / "template"
LEFT_OUT = ("_cuda.abi3.so", "_C.abi3.so", "_namespace.py", "py.typed")
FLAGS = ["-ffp-contract=off", "-fvisibility=hidden"]
# kernel-builder's own -DPy_LIMITED_API=3 stands for Python 3.2; its check of the ABI allows 3.9.
PYTHON = ["-UPy_LIMITED_API", "-DPy_LIMITED_API=0x03090000"]
HUB_VERSION = 0  # by the hub's convention, of kernels that are not final yet; else a number for each change of the API


@dataclass(frozen=True)
class Kernel:
    """backend: of the hub. framework: the table of build.toml."""

    name: str
    backend: str
    framework: str


KERNELS = (Kernel("dflash-kernels", "cuda", "torch-noarch"), Kernel("dflash-kernels-cpu", "cpu", "torch"))


def python_files() -> list[Path]:
    return sorted(file for file in (ROOT / PACKAGE).rglob("*.py") if file.name not in LEFT_OUT)


def identifier() -> str:
    """Of these sources. Ops are registered under it, so that several versions fit in one process."""
    digest = hashlib.sha1()
    for file in (*python_files(), *sorted(f for f in (ROOT / "csrc").rglob("*") if f.is_file())):
        digest.update(f"{file.relative_to(ROOT).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:7]


def ops_name(kernel: Kernel) -> str:
    return f"_{kernel.name.replace('-', '_')}_{kernel.backend}_{identifier()}"


def package(kernel: Kernel, folder: Path) -> None:
    """The Python package under the kernel's name. What it imports of itself is relative already."""
    for file in python_files():
        target = folder / file.relative_to(ROOT / PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    shutil.copy(TEMPLATE / "_namespace.py", folder)


def write(kernel: Kernel, folder: Path) -> None:
    folder.mkdir(parents=True)
    package(kernel, folder / "torch-ext" / kernel.name.replace("-", "_"))
    (folder / "tests").mkdir()
    for path in ("flake.nix", "CARD.md", "tests/__init__.py", "tests/test_ops.py"):
        text = (TEMPLATE / path).read_text(encoding="utf-8")
        (folder / path).write_text(text.replace("PACKAGE", kernel.name.replace("-", "_"))
                                   .replace("NAME", kernel.name).replace("VERSION", __version__), encoding="utf-8")
    shutil.copy(ROOT / "LICENSE", folder)
    parts = [general(kernel)]
    if kernel.framework == "torch":
        for part in ("bindings", "cpu", "params"):
            shutil.copytree(ROOT / "csrc" / part, folder / "csrc" / part, ignore=shutil.ignore_patterns("cuda"))
        parts += [bindings(folder), *instruction_sets(folder)]
    else:
        parts += ["[torch-noarch]\n"]
    (folder / "build.toml").write_text("\n".join(parts), encoding="utf-8")


def general(kernel: Kernel) -> str:
    return (f'[general]\nname = "{kernel.name}"\nversion = {HUB_VERSION}\nedition = 5\nlicense = "Apache-2.0"\n'
            f'backends = ["{kernel.backend}"]\n')


def bindings(folder: Path) -> str:
    found = [f"csrc/bindings/{file.name}" for file in sorted((folder / "csrc/bindings").iterdir())]
    return (f'[torch]\nminver = "2.10"\ninclude = ["csrc"]\nsrc = {listed(found)}\n'
            f'cxx-flags = {listed([*FLAGS, *PYTHON])}\n\n[torch.stable-abi]\ncpu = "2.10"\n')


def instruction_sets(folder: Path) -> list[str]:
    """A component for each instruction set and its flags. A source belongs to one component, so each set has sources of
    its own, and the noun's is a header of theirs."""
    sets: dict[tuple[str, str], list[str]] = {}
    for file in sorted((folder / "csrc/cpu").glob("*.cpp")):
        body = file.rename(file.with_name(f"{file.stem}_kernels.h"))
        for name, flags in setup.instruction_sets(file.stem, "x86_64").items():
            own = folder / "csrc" / "sets" / f"{file.stem}_{name}.cpp"
            own.parent.mkdir(exist_ok=True)
            own.write_text(f'#define DFLASH_ISA {name}\n#include "cpu/{body.name}"\n')
            sets.setdefault((name, flags), []).append(f"csrc/sets/{own.name}")
    headers = [f.relative_to(folder).as_posix() for part in ("cpu", "params")
               for f in sorted((folder / "csrc" / part).iterdir())]
    found = []
    for at, ((name, flags), files) in enumerate(sorted(sets.items())):
        alone = len([key for key in sets if key[0] == name]) == 1
        found.append(f"[kernel.{name if alone else f'{name}_{at}'}]\nbackend = \"cpu\"\ndepends = [\"torch\"]\n"
                     f"include = [\"csrc\"]\nsrc = {listed([*files, *headers])}\n"
                     f"cxx-flags = {listed([*FLAGS, *flags.replace('--param ', '--param=').split()])}\n")
    return found


def listed(words: list[str]) -> str:
    return "[\n" + "".join(f'  "{word}",\n' for word in words) + "]"
