"""Compiles the CPU kernels for aarch64 and runs some of them in an emulator, without torch.

    python -m tools.cross        after: apt-get install g++-aarch64-linux-gnu qemu-user-static

Every file of csrc/cpu is compiled. probe.cpp then runs five kernels, there and as compiled for this machine. The bits
of their results must be equal: the code for any processor fixes the order of every sum.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import setup
from bench import ROOT

CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
WORK, SYSTEM = ROOT / "build" / "cross", "/usr/aarch64-linux-gnu"
PROBED = ("activation", "attention", "gemm", "linear", "norm", "quant", "verify")  # gemm and quant are parts of linear
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=off", "-fvisibility=hidden", "-DDFLASH_ISA=generic", f"-I{ROOT / 'csrc'}")


def compiled(compiler: str, folder: Path, names: list[str]) -> Path:
    """The probe with these nouns' kernels. The others' objects are made and left."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = {name: ROOT / "csrc/cpu" / f"{name}.cpp" for name in names}
    sources["probe"] = Path(__file__).parent / "probe.cpp"
    for name, source in sources.items():
        subprocess.run([*compiler.split(), *FLAGS, "-c", str(source), "-o", str(folder / f"{name}.o")], check=True)
    objects = [str(folder / f"{name}.o") for name in (*PROBED, "probe")]
    subprocess.run([*compiler.split(), *objects, "-o", str(folder / "probe")], check=True)
    return folder / "probe"


def main() -> None:
    if missing := [program for program in (CROSS, EMULATOR) if not shutil.which(program)]:
        sys.exit(f"cross: {' and '.join((CROSS, EMULATOR))} must be installed; {' and '.join(missing)} not found: "
                 "apt-get install g++-aarch64-linux-gnu qemu-user-static")
    nouns = sorted(file.stem for file in (ROOT / "csrc/cpu").glob("*.cpp"))
    assert all(setup.instruction_sets(noun, "aarch64") == {"generic": ""} for noun in nouns)
    there = subprocess.run([EMULATOR, "-L", SYSTEM, compiled(CROSS, WORK / "aarch64", nouns)], check=True,
                           stdout=subprocess.PIPE, text=True).stdout
    here = subprocess.run([compiled(os.environ.get("CXX", "g++"), WORK / "here", list(PROBED))], check=True,
                          stdout=subprocess.PIPE, text=True).stdout
    print(f"{len(nouns)} files compiled for aarch64: {', '.join(nouns)}")
    for other, own in zip(there.splitlines(), here.splitlines(), strict=True):
        print(f"{own:52} {'the same on aarch64' if other == own else f'differs: {other.split()[-1]}'}")
    if there != here:
        sys.exit("cross: results must have the same bits on both; they differ")


if __name__ == "__main__":
    main()
