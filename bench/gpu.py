"""`make gpu`: builds, tests and measures on a machine with a GPU, in at most eight minutes.

    python bench/gpu.py [dry] [tests] [ops] [step]

Needs python with torch for CUDA, triton, pytest and ninja; nothing is fetched. tests: tests/gpu, then compute-sanitizer
over one sample of each op where that is installed. ops, step: the benchmarks, into bench/results/<device>/.

dry: the same commands without a GPU, on tiny shapes, in dflash_kernels.testing.dry, with results into a folder that is
thrown away. It needs no CUDA, and finds what Python would trip over.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUDGET, SANITIZER = 8 * 60, 90  # seconds for everything, and at most for compute-sanitizer
PARTS = ("tests", "ops", "step")
STEPS = {
    "tests": [["-m", "pytest", "tests/gpu", "--maxfail=20", "-p", "no:cacheprovider"]],
    "ops": [["bench/run.py", "memory", "small", "linear", "attention", "sample", "--device", "cuda", "--runs", "20"]],
    "step": [["bench/run.py", "draft", "--device", "cuda", "--runs", "20"]],
}
SANITIZED = ["-m", "pytest", "tests/gpu/test_ops_gpu.py", "-k", "sample and f32", "-p", "no:cacheprovider"]
DRY = ["-m", "dflash_kernels.testing.dry"]
AT_ONCE = min((os.cpu_count() or 1) // 2, 8) or 1  # processes of the tests, whose time is that of compiling kernels


def run(words: list[str], end: float, at_once: int = 1) -> str:
    """What became of one command, "passed", "failed (code)" or "out of time", and its seconds. at_once: in so many
    processes, each with its share (tests/gpu/conftest.py)."""
    start = time.monotonic()
    if start >= end:
        return "out of time before it began"
    print("+", *words, flush=True)
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile()) if at_once > 1 else None for _ in range(at_once)]
        processes = [subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log and subprocess.STDOUT, env=os.environ | {
            "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}", "PYTHONUNBUFFERED": "1", "DFLASH_SHARE": f"{i}/{at_once}"})
            for i, log in enumerate(logs)]
        codes = [waited(process, end) for process in processes]
        for log in filter(None, logs):
            log.seek(0)
            print(log.read().decode(errors="replace"), end="", flush=True)
    took = f", {time.monotonic() - start:.0f} s"
    wrong = [code for code in codes if code]
    return "out of time" + took if None in codes else f"failed ({wrong[0]}){took}" if wrong else "passed" + took


def waited(process: subprocess.Popen, end: float) -> int | None:
    """Its exit status, or None where it had to be killed."""
    try:
        return process.wait(max(end - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def sanitizer(dry: bool, end: float) -> str:
    found = shutil.which("compute-sanitizer")
    if dry:
        return "left out, as there is no GPU"
    if not found:
        return "not installed"
    return run([found, "--error-exitcode=9", sys.executable, *SANITIZED], min(end, time.monotonic() + SANITIZER))


def dried(words: list[str], folder: str) -> list[str]:
    """The command on the stand-in for a GPU."""
    tiny = ["--tiny", "--runs", "1", "--folder", folder] if words[0] == "bench/run.py" else ["-rs"]
    return [*DRY, *words, *tiny]


def main() -> int:
    dry, parts = "dry" in sys.argv[1:], [word for word in sys.argv[1:] if word != "dry"] or PARTS
    if unknown := set(parts) - set(PARTS):
        print(f"parts are {', '.join(PARTS)}; got {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    import torch

    if not dry and not torch.cuda.is_available():
        print(f"make gpu needs a GPU that torch can use; torch {torch.__version__} finds none", file=sys.stderr)
        return 2
    end, results = time.monotonic() + BUDGET, {}
    results["build"] = run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], end)
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            for words in STEPS[part]:
                command = dried(words, folder) if dry else words
                at_once = AT_ONCE if part == "tests" and not dry else 1
                results[" ".join([part, *words[:2]])] = run([sys.executable, *command], end, at_once)
            if part == "tests":
                results["compute-sanitizer"] = sanitizer(dry, end)
    print("\n".join(f"{name}: {what}" for name, what in results.items()))
    return int(any(what.startswith(("failed", "out")) for what in results.values()))


if __name__ == "__main__":
    sys.exit(main())
