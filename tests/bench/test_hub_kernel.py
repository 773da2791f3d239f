"""The kernels for the Hugging Face hub: their layout, what they import, and the one without C++ loaded from its folder.
"""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import setup
from tests.support import ROOT
from tools.hub import source, variant

tomllib = pytest.importorskip("tomllib")  # of Python 3.11
TRITON, CPU = source.KERNELS
MAY = {"torch", "triton", *sys.stdlib_module_names}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {kernel: tmp_path_factory.mktemp("hub") / kernel.name for kernel in source.KERNELS}
    for kernel, folder in made.items():
        source.write(kernel, folder)
    variant.build(TRITON, made[TRITON])
    return made


@pytest.mark.parametrize("kernel", source.KERNELS, ids=lambda kernel: kernel.name)
def test_the_layout_is_kernel_builders(folders, kernel):
    folder, package = folders[kernel], kernel.name.replace("-", "_")
    told = tomllib.loads((folder / "build.toml").read_text())
    general = told.pop("general")
    assert general["name"] == kernel.name and re.fullmatch("[a-z][-a-z0-9]*[a-z0-9]", kernel.name)
    assert general["edition"] == 5 and general["backends"] == [kernel.backend] and general["version"] == 0
    assert {*told} == ({"torch-noarch"} if kernel is TRITON else {"torch", "kernel"})
    assert {file.name for file in folder.iterdir()} >= {"build.toml", "flake.nix", "CARD.md", "tests", "torch-ext"}
    assert (folder / "torch-ext" / package / "__init__.py").is_file()
    for file in (folder / "tests").rglob("*.py"):
        ast.parse(file.read_text())
    assert f"import {package} as dk" in (folder / "tests/test_ops.py").read_text()


def test_every_kernel_is_compiled_once_for_each_set(folders):
    folder = folders[CPU]
    told = tomllib.loads((folder / "build.toml").read_text())
    components = told["kernel"].values()
    files = [file for part in (told["torch"], *components) for file in part["src"]]
    assert all((folder / file).is_file() for file in files)
    compiled = [file for file in files if file.endswith(".cpp")]
    assert len(compiled) == len({*compiled}) and told["torch"]["stable-abi"] == {"cpu": "2.10"}
    assert {Path(f).name for f in told["torch"]["src"] if f.endswith(".cpp")} == {
        file.name for file in (ROOT / "csrc/bindings").glob("*.cpp")}
    found = {}
    for part in components:
        flags = {*part["cxx-flags"]} - {*source.FLAGS}
        for file in part["src"]:
            if file.endswith(".cpp"):
                found[Path(file).stem] = flags
                isa, body = re.fullmatch(r'#define DFLASH_ISA (\w+)\n#include "(.*)"\n',
                                         (folder / file).read_text()).groups()
                assert Path(file).stem.endswith(f"_{isa}") and f"csrc/{body}" in part["src"]
    assert found == {f"{file.stem}_{isa}": {*flags.replace("--param ", "--param=").split()}
                     for file in (ROOT / "csrc/cpu").glob("*.cpp")
                     for isa, flags in setup.instruction_sets(file.stem, "x86_64").items()}


def test_every_binding_registers_under_the_copys_own_namespace():
    files = [file for file in (ROOT / "csrc/bindings").glob("*.cpp") if "m.impl(" in file.read_text()]
    assert len(files) > 8
    for file in files:
        assert "DFLASH_CPU_OPS(m)" in file.read_text() and "STABLE_TORCH_LIBRARY" not in file.read_text(), file


@pytest.mark.parametrize("kernel", source.KERNELS, ids=lambda kernel: kernel.name)
def test_it_imports_torch_triton_and_itself_relatively(folders, kernel):
    package = folders[kernel] / "torch-ext" / kernel.name.replace("-", "_")
    files = list(package.rglob("*.py"))
    assert len(files) > 50
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
                [node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])
            assert {name.split(".")[0] for name in names} <= MAY, file
        assert "ops.dflash" not in re.sub(r'"""[\s\S]*?"""', "", file.read_text(encoding="utf-8")), file


LOADED = """
import importlib, json, sys, torch, dflash_kernels
def load(folder, name):
    spec = importlib.util.spec_from_file_location(name, f"{folder}/__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
one, two = (load(folder, json.load(open(f"{folder}/metadata.json"))["id"]) for folder in sys.argv[1:3])
assert one.__name__ != two.__name__ and one.build_info()["ops"] == dflash_kernels.build_info()["ops"]
x, weight, out = torch.randn(3, 96), torch.randn(96), torch.empty(3, 96)
for kernel in (one, two):
    launch = importlib.import_module(f"{kernel.__name__}._triton").load("norm:rms_norm")
    assert launch.__module__.startswith(kernel.__name__)
    launch(x, weight, 1e-6, out.fill_(7))  # in Triton's interpreter
    torch.testing.assert_close(out, torch.nn.functional.rms_norm(x, (96,), weight, 1e-6))
    kernel.rms_norm(x, weight, out=out.fill_(7))
    torch.testing.assert_close(out, dflash_kernels.rms_norm(x, weight))
print(one.__name__, two.__name__)
"""


def test_two_versions_fit_in_a_process_beside_the_library(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "identifier", lambda: "another")
    source.write(TRITON, tmp_path / "another")
    variant.build(TRITON, tmp_path / "another")
    made = [folder / "build" / "torch-cuda" for folder in (folders[TRITON], tmp_path / "another")]
    ran = subprocess.run([sys.executable, "-c", LOADED, *map(str, made)], capture_output=True, text=True, cwd=tmp_path,
                         env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"})
    assert ran.returncode == 0, ran.stderr
    names = ran.stdout.split()
    assert names[1] == "_dflash_kernels_cuda_another" and re.fullmatch("_dflash_kernels_cuda_[0-9a-f]{7}", names[0])


def test_the_package_kernels_takes_metadata_and_digest(folders):
    rust = pytest.importorskip("kernels._rust")
    folder = folders[TRITON] / "build" / "torch-cuda"
    read, told = rust.Metadata.read_from_file(folder / "metadata.json"), json.loads(
        (folder / "metadata.json").read_text())
    assert read.id == told["id"] and read.version == 0 and read.name.python_name == "dflash_kernels"
    hashed = rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, folder)
    assert hashed.files == told["digest"]["files"]
    for kernel in source.KERNELS:
        rust.Build.open(folders[kernel])


def test_the_bindings_are_for_the_python_that_kernel_builder_checks(folders):
    """It compiles with a limited API of its own, which lacks functions that the bindings call."""
    checker = pytest.importorskip("kernel_abi_check")
    told = tomllib.loads((folders[CPU] / "build.toml").read_text())
    assert told["torch"]["cxx-flags"][-2:] == ["-UPy_LIMITED_API", "-DPy_LIMITED_API=0x03090000"]
    assert checker.ObjectFile(ROOT / "dflash_kernels/_C.abi3.so").check_python_abi("3.9") == []


def test_without_the_objects_of_a_build_it_says_so(folders, monkeypatch, tmp_path):
    monkeypatch.setattr(variant, "ROOT", tmp_path)
    (tmp_path / "csrc/cpu").mkdir(parents=True)
    (tmp_path / "csrc/cpu/norm.cpp").touch()
    (tmp_path / "build/temp.here").mkdir(parents=True)
    (tmp_path / "build/temp.here/cpu.gone.generic.o").touch()  # of a file that is no longer there
    (tmp_path / "build/temp.here/cpu.norm.generic.o").touch()
    monkeypatch.setattr(variant.setup, "instruction_sets", lambda noun: {"generic": "", "best": ""})
    with pytest.raises(SystemExit, match="hub-kernel: build must have the objects of 2 kernels; got 1: make build"):
        variant.library("_x", tmp_path / "_x.abi3.so")
    (tmp_path / "build/temp.here/cpu.norm.best.o").touch()
    monkeypatch.setattr(variant.subprocess, "run", lambda command, check: None)
    variant.library("_x", tmp_path / "_x.abi3.so")
    linked, = re.findall("^build .*: link (.*)$", (tmp_path / "build/hub-objects/build.ninja").read_text(), re.M)
    assert {Path(file).name for file in linked.split()} == {"cpu.norm.generic.o", "cpu.norm.best.o"}
    monkeypatch.setattr(variant.platform, "machine", lambda: "aarch64")
    with pytest.raises(SystemExit, match="the processor must be x86_64, as build.toml's flags are; got aarch64"):
        variant.build(CPU, folders[CPU])


def test_the_plugin_of_pytest_needs_a_folder(monkeypatch):
    pytest.importorskip("kernels")
    monkeypatch.delenv("DFLASH_HUB_KERNEL", raising=False)
    with pytest.raises(RuntimeError, match="DFLASH_HUB_KERNEL must be a kernel's folder"):
        importlib.import_module("tools.hub.loaded")
