"""Builds `dflash_kernels._C` and, where nvcc is, `dflash_kernels._cuda`: abi3 libraries against torch's stable ABI.

Every file in csrc/cpu is compiled once per instruction set and the library picks one at run time; everything in
csrc/bindings is compiled once. Every file in csrc/cuda is compiled for all architectures of CUDA_ARCHITECTURES, on a
machine without a GPU too. Environment: CXX (compiler), CUDA_HOME (where nvcc is, when not on PATH), DFLASH_NO_CUDA=1
(skip CUDA sources even where nvcc is found), DFLASH_NO_CPP=1 (install the Python and Triton parts alone),
DFLASH_SANITIZE=address,undefined.
"""

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10: the oldest torch the library loads under
PY_LIMITED_API = "0x030a0000"  # 3.10
CUDA_EXTENSION = "dflash_kernels._cuda"
OLDEST_NVCC = (12, 8)
OLDEST_GCC = 11
CUDA_ARCHITECTURES = ("80", "90a", "100a", "120a")

X86 = {
    # For processors before 2013. Loops are peeled less: a tenth of the wheel, and no time but for NOT_PEELED_LESS.
    "generic": "--param max-completely-peeled-insns=60",
    "avx2": "-mavx2 -mfma -mf16c -mbmi2",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mbmi2",
}
BYTE = {"avx2_vnni": X86["avx2"] + " -mavxvnni", "avx512_vnni": X86["avx512"] + " -mavx512vnni"}
DOT = {"avx512_bf16": BYTE["avx512_vnni"] + " -mavx512bf16"}
AMX = {"amx": DOT["avx512_bf16"] + " -mamx-tile -mamx-bf16"}
# Nouns with code of their own for these; the others use the objects of the next lower set there.
BYTE_NOUNS = {"quant", "rate"}
DOT_NOUNS = {"attention", "experts", "gemm", "linear", "lm_head", "lm_head_topk", "rate"}
NOT_PEELED_LESS = {"quant"}


def instruction_sets(noun: str, machine: str = platform.machine()) -> dict[str, str]:
    if machine.lower() not in ("x86_64", "amd64"):
        return {"generic": ""}
    sets = X86.copy()
    for nouns, flags in ((BYTE_NOUNS, BYTE), (DOT_NOUNS, DOT | AMX)):
        sets |= flags if noun in nouns else {}
    return sets | {"generic": ""} if noun in NOT_PEELED_LESS else sets


def find_nvcc() -> str | None:
    if os.environ.get("DFLASH_NO_CUDA") == "1":
        return None
    home = os.environ.get("CUDA_HOME")
    return shutil.which(str(Path(home, "bin", "nvcc"))) if home else shutil.which("nvcc")


def nvcc_release(nvcc: str) -> str:
    """Such as "13.0"."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", said)[1]


def gcc_release(compiler: str) -> int | None:
    """None for other compilers, and where it does not say."""
    command = shlex.split(compiler)
    if not Path(command[-1]).name.startswith("g++"):
        return None
    said = subprocess.run([*command, "-dumpversion"], capture_output=True, text=True).stdout
    return int(said.split(".")[0]) if said[:1].isdigit() else None


def find_cutlass() -> Path | None:
    """The headers that the nvidia-cutlass package carries."""
    package = importlib.util.find_spec("cutlass_library")
    folder = package and Path(package.submodule_search_locations[0], "source", "include")
    return folder if folder and (folder / "cute" / "tensor.hpp").exists() else None


def nvcc_flags() -> list[str]:
    # -fmad=false: a row's bits must not depend on which multiply-adds the compiler chose to fuse.
    # --expt-relaxed-constexpr: CuTe's constants are host functions that kernels use.
    cutlass = find_cutlass()
    return ["-std=c++17", "-O3", "-fmad=false", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}",
            *(["-isystem", str(cutlass)] if cutlass else [])]


def gencode() -> list[str]:
    """The first architecture's PTX goes in too, for chips that none of the architectures is made for."""
    return [*(f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES),
            f"-gencode=arch=compute_{CUDA_ARCHITECTURES[0]},code=compute_{CUDA_ARCHITECTURES[0]}"]


def sources_mark() -> str:
    """What a library carries in its bytes, to be known as built from these sources for this kind of machine. A library
    that was built elsewhere and lies in the tree needs no building where it has this tree's mark."""
    digest = hashlib.sha256()
    for file in (ROOT / "setup.py", *sorted(f for f in (ROOT / "csrc").rglob("*") if f.is_file())):
        digest.update(f"{file.relative_to(ROOT).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    return f"dflash sources {digest.hexdigest()} {platform.machine()}"


def mark_source(build: Path) -> Path:
    """A file that has the mark in it, written where that changes it."""
    file, text = build / "sources_mark.cpp", ('extern "C" __attribute__((used)) const char dflash_sources_mark[] = '
                                              f'"{sources_mark()}";\n')
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    return file


class NinjaBuildExt(build_ext):
    """Writes one build.ninja for each extension and runs it, both at a time: nvcc has one file, for one core."""

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or (1 if os.environ.get("MAX_JOBS") == "1" else 2)

    def build_extension(self, ext):
        compiler = os.environ.get("CXX", "g++")
        if os.environ.get("DFLASH_NO_CPP") == "1":
            return self._skip(ext, "DFLASH_NO_CPP=1 is set")
        if shutil.which(shlex.split(compiler)[-1]) is None:
            return self._skip(ext, f"no C++ compiler found ({compiler}); install g++ and reinstall to get the CPU "
                                   "kernels")
        if (release := gcc_release(compiler)) and release < OLDEST_GCC:
            return self._skip(ext, f"{compiler} is version {release}, and {OLDEST_GCC} is needed; install a newer one "
                                   "and name it in CXX")
        try:
            import torch
        except ImportError:
            return self._skip(ext, "torch is not importable at build time; install torch first and use "
                                   "--no-build-isolation")
        cuda = ext.name == CUDA_EXTENSION
        if cuda and not find_nvcc():
            return
        if cuda and tuple(map(int, nvcc_release(find_nvcc()).split("."))) < OLDEST_NVCC:
            print(f"dflash-kernels: building without CUDA C++ kernels: nvcc is {nvcc_release(find_nvcc())}, and the "
                  "architectures need {}.{}. The Triton kernels do without.".format(*OLDEST_NVCC), file=sys.stderr)
            return
        build = (ROOT / self.build_temp).resolve() / ("cuda" if cuda else "")
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        write = self._write_cuda_ninja if cuda else self._write_ninja
        write(build, target, compiler, Path(torch.__file__).parent)
        ninja = shutil.which("ninja") or str(Path(sys.executable).parent / "ninja")
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run([ninja, "-C", str(build), *(["-j", jobs] if jobs else [])], check=True)

    def _skip(self, ext, reason):
        if ext.name == CUDA_EXTENSION:
            return
        print(f"dflash-kernels: building without C++ kernels: {reason}. The reference backend is used instead; "
              "it is correct and slow.", file=sys.stderr)

    def _write_ninja(self, build, target, compiler, torch_dir):
        sanitize = os.environ.get("DFLASH_SANITIZE")
        san = f" -fsanitize={sanitize} -fno-omit-frame-pointer -g" if sanitize else ""
        # -ffp-contract=off: a row's bits must not depend on which multiply-adds the compiler chose to fuse.
        # -O1 where sanitized: with -O3 the checks inside inlined tiles take the compiler minutes a file.
        common = (f"{'-O1' if sanitize else '-O3'} -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra"
                  f" -Wno-uninitialized -Wno-maybe-uninitialized -I{ROOT / 'csrc'}{san}")
        nvcc = "found" if find_nvcc() else "not found"
        host = f"{common} {binding_flags(torch_dir)} -DDFLASH_NVCC='\"{nvcc}\"'"
        lines = [
            "ninja_required_version = 1.5",
            cxx_rule(compiler),
            f"rule link\n  command = {compiler} -shared{san} $in -o $out -L{torch_dir / 'lib'} -ltorch_cpu -ltorch"
            "\n  description = $out",
        ]
        objects = []

        def compile_one(source: Path, obj: str, flags: str):
            objects.append(obj)
            lines.append(f"build {obj}: cxx {source}\n  flags = {flags}")

        for source in sorted((ROOT / "csrc/bindings").glob("*.cpp")):
            compile_one(source, f"bindings.{source.stem}.o", host)
        for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
            for name, flags in instruction_sets(source.stem).items():
                compile_one(source, f"cpu.{source.stem}.{name}.o", f"{common} -DDFLASH_ISA={name} {flags}")
        if not sanitize:
            compile_one(mark_source(build), "sources_mark.o", common)
        lines.append(f"build {target}: link {' '.join(objects)}\ndefault {target}\n")
        (build / "build.ninja").write_text("\n".join(lines))

    def _write_cuda_ninja(self, build, target, compiler, torch_dir):
        nvcc = find_nvcc()
        host_compiler = shlex.split(compiler)[-1]  # nvcc takes a program, not a launcher such as ccache before it
        # USE_CUDA: torch's stable headers declare the current stream's function for those who ask.
        host = ("-O3 -std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra -DUSE_CUDA "
                f"-DDFLASH_CUDA_VERSION='\"{nvcc_release(nvcc)}\"' "
                f"-DDFLASH_CUDA_ARCHITECTURES='\"{' '.join(CUDA_ARCHITECTURES)}\"' "
                f"-I{ROOT / 'csrc'} {binding_flags(torch_dir)}")
        device = shlex.join([*nvcc_flags(), *gencode(), "-ccbin", host_compiler,
                             "-Xcompiler=-fPIC,-fvisibility=hidden"])
        # libtorch leads to the library that has the current stream's function, in a torch that has it; this machine's
        # may have none. CUDA's runtime is linked in whole and hidden, as torch brings another.
        libraries = f"-L{torch_dir / 'lib'} -Xlinker=--no-as-needed -ltorch_cpu -ltorch -Xlinker=--exclude-libs=ALL"
        lines = [
            "ninja_required_version = 1.5",
            cxx_rule(compiler),
            f"rule nvcc\n  command = {nvcc} -MD -MF $out.d {device} -c $in -o $out\n  depfile = $out.d\n  deps = gcc"
            "\n  description = $out",
            f"rule link\n  command = {nvcc} -shared -cudart=static -ccbin {host_compiler} $in -o $out {libraries}"
            "\n  description = $out",
        ]
        objects = []
        for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
            objects.append(f"{source.stem}.cu.o")
            lines.append(f"build {objects[-1]}: nvcc {source}")
        for source in sorted((ROOT / "csrc/bindings/cuda").glob("*.cpp")):
            objects.append(f"bindings.{source.stem}.o")
            lines.append(f"build {objects[-1]}: cxx {source}\n  flags = {host}")
        objects.append("sources_mark.o")
        lines.append(f"build sources_mark.o: cxx {mark_source(build)}\n  flags = {host}")
        lines.append(f"build {target}: link {' '.join(objects)}\ndefault {target}\n")
        (build / "build.ninja").write_text("\n".join(lines))


def cxx_rule(compiler: str) -> str:
    return (f"rule cxx\n  command = {compiler} -MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc"
            "\n  description = $out")


def binding_flags(torch_dir: Path) -> str:
    return (f"-DPy_LIMITED_API={PY_LIMITED_API} -DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION} -Wno-unused-parameter "
            f"-isystem {torch_dir / 'include'} -isystem {sysconfig.get_paths()['include']}")


class Abi3Wheel(bdist_wheel):
    def finalize_options(self):
        self.py_limited_api = "cp310"
        super().finalize_options()


if __name__ == "__main__":
    sources = [str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("csrc/**/*.cpp"))]
    setup(
        ext_modules=[Extension(name, sources=sources, py_limited_api=True, optional=True)
                     for name in ("dflash_kernels._C", CUDA_EXTENSION)],
        cmdclass={"build_ext": NinjaBuildExt, "bdist_wheel": Abi3Wheel},
    )
