"""Builds what is released, and checks it: the source distribution, and from it the wheel for manylinux_2_28.

    python -m tools.release TOOLS [--cuda]

TOOLS is an environment with requirements/release.txt (`make release`). The wheel has the C++ kernels for a CPU and the
Triton kernels. With --cuda the CUDA C++ library is built too, with this machine's compiler, into dist/cuda; that wheel
is tagged for the oldest glibc that has what it uses.

CXX: a compiler for glibc 2.28, as in the image manylinux_2_28. Without it zig's is used, which is clang.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from bench import ROOT

PLATFORM, GLIBC = "manylinux_2_28_x86_64", "x86_64-linux-gnu.2.28"
DIST, WORK = ROOT / "dist", ROOT / "build" / "release-work"
LIBRARIES = ("dflash_kernels/_C.abi3.so", "dflash_kernels/_cuda.abi3.so")
BACKEND = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def run(*command: str | Path, **more: str) -> None:
    """Shows the command and what it says; ends where it fails."""
    print("$", *(Path(word).name if isinstance(word, Path) else word for word in command), flush=True)
    if subprocess.run(list(map(str, command)), env=os.environ | more).returncode:
        sys.exit(f"release: {Path(command[0]).name} failed")


def made(folder: Path, kind: str, out: Path, **more: str) -> Path:
    done = subprocess.run([sys.executable, "-c", BACKEND, kind, str(out)], cwd=folder, env=os.environ | more,
                          stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"release: {kind} failed")
    return out / done.stdout.splitlines()[-1]


def compiler(tools: Path) -> str:
    """Of CXX, or a script that calls zig's: setup.py takes one word. zig would add symbols for debuggers, which are
    stripped in the end."""
    if "CXX" in os.environ:
        return os.environ["CXX"]
    script = WORK / "zig-c++"
    script.write_text(f'#!/bin/sh\nexec {tools / "bin" / "python"} -m ziglang c++ -g0 -target {GLIBC} "$@"\n')
    script.chmod(0o755)
    return str(script)


def source() -> tuple[Path, Path]:
    """The source distribution, and the folder with what is in it."""
    sdist = made(ROOT, "build_sdist", DIST)
    with tarfile.open(sdist) as archive:
        archive.extractall(WORK, filter="data")
    return sdist, WORK / sdist.name.removesuffix(".tar.gz")


def wheel(folder: Path, out: Path, libraries: tuple[str, ...], **more: str) -> Path:
    built = made(folder, "build_wheel", out, **more)
    missing = {*libraries} - {*zipfile.ZipFile(built).namelist()}
    if missing:
        sys.exit(f"release: the wheel must have {', '.join(libraries)}; {', '.join(sorted(missing))} was not built")
    return built


def repaired(raw: Path, platform: str, out: Path, programs: Path) -> None:
    """Tags the wheel for the platform ("auto": the oldest that it fits) and checks it."""
    # torch's libraries are torch's: the library is loaded after torch is imported.
    run(programs / "auditwheel", "repair", "--plat", platform, "--only-plat", "--strip", "--exclude", "libtorch*.so",
        "--exclude", "libc10.so", "--wheel-dir", out, raw, PATH=f"{programs}{os.pathsep}{os.environ['PATH']}")
    file, = out.glob("*.whl")
    run(programs / "abi3audit", "--strict", file)
    run(programs / "twine", "check", "--strict", file)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.release", description=__doc__.partition("\n")[0])
    parser.add_argument("tools", type=Path)
    parser.add_argument("--cuda", action="store_true")
    options = parser.parse_args()
    programs = options.tools.resolve() / "bin"
    if not (programs / "auditwheel").is_file():
        sys.exit(f"release: {options.tools} must have requirements/release.txt; got no auditwheel: make release")
    for folder in (DIST, WORK):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    sdist, folder = source()
    run(programs / "twine", "check", "--strict", sdist)
    raw = wheel(folder, WORK, LIBRARIES[:1], DFLASH_NO_CUDA="1", CXX=compiler(options.tools.resolve()))
    repaired(raw, PLATFORM, DIST, programs)
    if options.cuda:
        repaired(wheel(folder, WORK / "cuda", LIBRARIES), "auto", DIST / "cuda", programs)
    for file in sorted(DIST.rglob("*.*")):
        if file.is_file():
            print(f"{file.relative_to(ROOT)}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
