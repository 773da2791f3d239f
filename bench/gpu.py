"""`make gpu`: builds, tests and measures on a machine with a GPU, in at most eight minutes.

    python bench/gpu.py [dry] [tests] [ops] [step]

Needs python with torch for CUDA, triton, pytest and ninja; nothing is fetched. tests: tests/gpu, then compute-sanitizer
over one sample of each op where that is installed. ops, step: the benchmarks, into bench/results/<device>/.

dry: the same commands without a GPU, on tiny shapes, in dflash_kernels.testing.dry, with results into a folder that is
thrown away. It needs no CUDA, and finds what Python would trip over.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 8 * 60  # seconds for everything
PARTS = ("tests", "ops", "step")
STEPS = {
    "tests": [["-m", "pytest", "tests/gpu", "-x", "--maxfail=20"]],
    "ops": [["bench/run.py", "memory", "linear", "attention", "sample", "--device", "cuda", "--runs", "20"]],
    "step": [["bench/run.py", "draft", "--device", "cuda", "--runs", "20"]],
}
SANITIZED = ["-m", "pytest", "tests/gpu/test_ops_gpu.py", "-k", "sample and f32", "-p", "no:cacheprovider"]
DRY = ["-m", "dflash_kernels.testing.dry"]


def run(words: list[str], end: float) -> str:
    """What became of one command: "passed", "failed (code)" or "out of time"."""
    left = end - time.monotonic()
    if left <= 0:
        return "out of time"
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}", "PYTHONUNBUFFERED": "1"}
    print("+", *words, flush=True)
    try:
        code = subprocess.run(words, cwd=ROOT, env=env, timeout=left).returncode
    except subprocess.TimeoutExpired:
        return "out of time"
    return f"failed ({code})" if code else "passed"


def sanitizer(dry: bool, end: float) -> str:
    found = shutil.which("compute-sanitizer")
    if dry:
        return "left out, as there is no GPU"
    return run([found, "--error-exitcode=9", sys.executable, *SANITIZED], end) if found else "not installed"


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
                results[" ".join([part, *words[:2]])] = run([sys.executable, *command], end)
            if part == "tests":
                results["compute-sanitizer"] = sanitizer(dry, end)
    print("\n".join(f"{name}: {what}" for name, what in results.items()))
    return int(any(what.startswith(("failed", "out")) for what in results.values()))


if __name__ == "__main__":
    sys.exit(main())
