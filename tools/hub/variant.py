"""What kernel-builder would build of a kernel for this machine: the package with its ops' names, and metadata.json."""

import base64
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import setup
from bench import ROOT

from . import source

OPS = '''"""Written by kernel-builder, or in its place by tools/hub."""

import torch
{library}
ops = torch.ops.{name}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{name}::{{op_name}}"
'''
COMPATIBLE = '''"""For older versions of the package `kernels`, which look for the kernel's package in this folder."""

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location("{name}", Path(__file__).parents[1] / "__init__.py")
_module = importlib.util.module_from_spec(_spec)
sys.modules["{name}"] = _module
_spec.loader.exec_module(_module)
globals().update({{name: getattr(_module, name) for name in (*_module.__all__, "__all__")}})
'''


def build(kernel: source.Kernel, folder: Path) -> Path:
    """folder: with the sources. Returns the variant's folder."""
    name, native = source.ops_name(kernel), kernel.framework == "torch"
    if native and platform.machine() != "x86_64":
        sys.exit(f"hub-kernel: the processor must be x86_64, as build.toml's flags are; got {platform.machine()}")
    where = f"torch-stable-abi210-cpu-{platform.machine()}-linux" if native else f"torch-{kernel.backend}"
    made = folder / "build" / where
    source.package(kernel, made)
    (made / "_ops.py").write_text(OPS.format(name=name, library=f"\nfrom . import {name}  # noqa: F401\n" * native))
    older = made / kernel.name.replace("-", "_")
    older.mkdir()
    (older / "__init__.py").write_text(COMPATIBLE.format(name=name))
    if native:
        library(name, made / f"{name}.abi3.so")
    files = sorted(file for file in made.rglob("*") if file.is_file())
    about = {"name": kernel.name, "id": name, "version": source.HUB_VERSION, "license": "Apache-2.0",
             "python-depends": [], "backend": {"type": kernel.backend},
             "digest": {"algorithm": "sha256",
                        "files": {file.relative_to(made).as_posix(): digest(file) for file in files}}}
    (made / "metadata.json").write_text(json.dumps(about, indent=2) + "\n")
    return made


def digest(file: Path) -> str:
    return base64.b64encode(hashlib.sha256(file.read_bytes()).digest()).decode()


def library(name: str, target: Path) -> None:
    """Links the kernels' objects, which `make build` left, with bindings that register under this name."""
    expected = [f"cpu.{file.stem}.{isa}.o" for file in sorted((ROOT / "csrc/cpu").glob("*.cpp"))
                for isa in setup.instruction_sets(file.stem)]
    found = [[folder / name for name in expected if (folder / name).is_file()]  # a folder for each Python
             for folder in sorted((ROOT / "build").glob("temp.*"), key=lambda folder: -folder.stat().st_mtime)]
    compiled = max(found, key=len, default=[])
    if len(compiled) < len(expected):
        sys.exit(f"hub-kernel: build must have the objects of {len(expected)} kernels; got {len(compiled)}: make build")
    compiler, torch_dir = os.environ.get("CXX", "g++"), Path(torch.__file__).parent
    folder = ROOT / "build" / "hub-objects"
    folder.mkdir(parents=True, exist_ok=True)
    flags = (f"-O3 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off -fno-gnu-unique -I{ROOT / 'csrc'} "
             f"{setup.binding_flags(torch_dir)} -DTORCH_EXTENSION_NAME={name}")
    lines = [setup.cxx_rule(compiler), f"rule link\n  command = {compiler} -shared $in -o $out -L{torch_dir / 'lib'} "
             "-ltorch_cpu -ltorch"]
    objects = [str(file) for file in compiled]
    for file in sorted((ROOT / "csrc/bindings").glob("*.cpp")):
        objects.append(f"bindings.{file.stem}.o")
        lines.append(f"build {objects[-1]}: cxx {file}\n  flags = {flags}")
    lines.append(f"build {target.resolve()}: link {' '.join(objects)}\ndefault {target.resolve()}\n")
    (folder / "build.ninja").write_text("\n".join(lines))
    ninja = shutil.which("ninja") or str(Path(sys.executable).parent / "ninja")
    jobs = os.environ.get("MAX_JOBS")
    subprocess.run([ninja, "-C", str(folder), "--quiet", *(["-j", jobs] if jobs else [])], check=True)
