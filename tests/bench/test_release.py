"""The command that builds a release, without compiling: what it refuses, and the compiler that it chooses. What is in
the distributions: tests/bench/test_install.py."""

import os
import subprocess
import sys
import zipfile

import pytest

from tests.support import ROOT
from tools import release


def test_without_its_tools_it_says_so(tmp_path):
    ran = subprocess.run([sys.executable, "-m", "tools.release", str(tmp_path)], capture_output=True, text=True,
                         cwd=ROOT, env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"})
    assert ran.returncode == 1 and ran.stderr == (
        f"release: {tmp_path} must have requirements/release.txt; got no auditwheel: make release\n")


def test_a_wheel_without_the_library_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "a.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(release.LIBRARIES[0], "")
    monkeypatch.setattr(release, "made", lambda *given, **more: file)
    assert release.wheel(tmp_path, tmp_path, release.LIBRARIES[:1]) == file
    with pytest.raises(SystemExit, match="_cuda.abi3.so; dflash_kernels/_cuda.abi3.so was not built"):
        release.wheel(tmp_path, tmp_path, release.LIBRARIES)


def test_a_command_that_fails_ends_it(tmp_path, capfd):
    release.run("true", tmp_path / "a.whl")
    with pytest.raises(SystemExit, match="release: false failed"):
        release.run("false")
    assert capfd.readouterr().out == "$ true a.whl\n$ false\n"


def test_the_compiler_is_one_for_an_old_glibc(tmp_path, monkeypatch):
    monkeypatch.setattr(release, "WORK", tmp_path)
    monkeypatch.setenv("CXX", "ccache g++")
    assert release.compiler(tmp_path) == "ccache g++"
    monkeypatch.delenv("CXX")
    program = tmp_path / "bin" / "python"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    said = subprocess.run([release.compiler(tmp_path), "-c", "a b.cpp"], capture_output=True, text=True, check=True)
    assert said.stdout == "-m ziglang c++ -g0 -target x86_64-linux-gnu.2.28 -c a b.cpp\n"
