"""Runs the CPU kernels' tests on a library built with AddressSanitizer and UndefinedBehaviorSanitizer.

    python -m tools.sanitize [pytest arguments]        or: make sanitize ARGS="..."

The package is copied to build/sanitize and built there with DFLASH_SANITIZE=address,undefined. The library of other
commands is unchanged, and the next run compiles only changed files. Python is not sanitized, so the sanitizers'
libraries are preloaded, and leaks are not counted (the interpreter's own would hide ours). The first finding ends the
run with its report. Without arguments it runs the tests of every csrc/cpu/<noun>.cpp and the input fuzz. The first
build takes some minutes.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "sanitize"
COPIED = ("setup.py", "pyproject.toml", "csrc", "dflash_kernels", "python", "tests", "tools")


def copy() -> None:
    """Writes only files that differ, so that ninja compiles only changes since the copy's last build."""
    sources = [p for name in COPIED for p in ((ROOT / name).rglob("*") if (ROOT / name).is_dir() else [ROOT / name])
               if p.is_file() and p.suffix not in (".so", ".pyc")]
    wanted = {FOLDER / p.relative_to(ROOT): p for p in sources}
    for name in COPIED:
        for old in (FOLDER / name).rglob("*") if (FOLDER / name).is_dir() else ():
            if old.is_file() and old not in wanted and old.suffix not in (".so", ".pyc"):
                old.unlink()
    for target, source in wanted.items():
        if not target.exists() or target.read_bytes() != source.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def run_time_libraries() -> str:
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    found = []
    for name in ("asan", "ubsan", "stdc++"):
        ran = subprocess.run([*compiler, f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True)
        if not Path(ran.stdout.strip()).is_absolute():
            sys.exit(f"sanitize: {compiler[-1]} has no lib{name}.so; install its sanitizer libraries")
        found.append(ran.stdout.strip())
    return " ".join(found)


def default_tests() -> list[str]:
    nouns = {path.stem for path in (ROOT / "csrc/cpu").glob("*.cpp")} | {"bad_input"}
    return [f"tests/kernels/test_{n}.py" for n in sorted(nouns) if (ROOT / f"tests/kernels/test_{n}.py").exists()]


def main(arguments: list[str]) -> int:
    libraries = run_time_libraries()
    copy()
    environment = os.environ | {"DFLASH_SANITIZE": "address,undefined", "DFLASH_NO_CUDA": "1",
                                "PYTHONPATH": str(FOLDER)}
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(build, cwd=FOLDER, env=environment, check=True)
    if not list((FOLDER / "dflash_kernels").glob("_C*.so")):
        sys.exit("sanitize: the library was not built")
    environment |= {"LD_PRELOAD": libraries, "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0",
                    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *(arguments or default_tests())]
    return subprocess.run(command, cwd=FOLDER, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
