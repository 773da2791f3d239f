"""The command that compiles the kernels for aarch64, without compiling: what it asks for, and how it compares."""

import shutil
import types

import pytest

from tools.cross import __main__ as cross


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: name if "qemu" in name else None)
    with pytest.raises(SystemExit) as refused:
        cross.main()
    assert str(refused.value) == (
        "cross: aarch64-linux-gnu-g++ and qemu-aarch64-static must be installed; aarch64-linux-gnu-g++ not found: "
        "apt-get install g++-aarch64-linux-gnu qemu-user-static")


@pytest.mark.parametrize("there", ["linear float32 1a\n", "linear float32 2b\n"])
def test_other_bits_are_an_error(monkeypatch, capsys, there):
    asked = []

    def run(command, **options):
        asked.append(command[0])
        return types.SimpleNamespace(stdout=there if command[0] == cross.EMULATOR else "linear float32 1a\n")

    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(cross.subprocess, "run", run)
    monkeypatch.setattr(cross, "compiled", lambda compiler, folder, names: folder / "probe")
    if "1a" in there:
        cross.main()
        assert "linear float32 1a" in capsys.readouterr().out and asked == [cross.EMULATOR, cross.WORK / "here/probe"]
    else:
        with pytest.raises(SystemExit, match="results must have the same bits on both; they differ"):
            cross.main()
        assert "differs: 2b" in capsys.readouterr().out
