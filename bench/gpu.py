"""`make gpu`: builds, tests and measures on a machine with a GPU, in at most eight minutes.

    python bench/gpu.py [tests] [ops] [step]

Needs python with torch for CUDA, triton, pytest and ninja; nothing is fetched. tests: tests/gpu, then compute-sanitizer
over one sample of each op where that is installed. ops, step: the benchmarks, into bench/results/<device>/.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 8 * 60  # seconds for everything
PARTS = ("tests", "ops", "step")
STEPS = {
    "tests": [["-m", "pytest", "tests/gpu", "-x", "--maxfail=20"]],
    "ops": [["bench/run.py", "memory", "linear", "attention", "--device", "cuda", "--runs", "20"]],
    "step": [["bench/run.py", "draft", "--device", "cuda", "--runs", "20"]],
}
SANITIZED = ["-m", "pytest", "tests/gpu/test_ops_gpu.py", "-k", "sample and f32", "-p", "no:cacheprovider"]


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


def main() -> int:
    parts = sys.argv[1:] or PARTS
    if unknown := set(parts) - set(PARTS):
        print(f"parts are {', '.join(PARTS)}; got {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    import torch

    if not torch.cuda.is_available():
        print(f"make gpu needs a GPU that torch can use; torch {torch.__version__} finds none", file=sys.stderr)
        return 2
    end, results = time.monotonic() + BUDGET, {}
    results["build"] = run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], end)
    for part in parts:
        for words in STEPS[part]:
            results[" ".join([part, *words[:2]])] = run([sys.executable, *words], end)
        if part == "tests":
            sanitizer = shutil.which("compute-sanitizer")
            results["compute-sanitizer"] = run([sanitizer, "--error-exitcode=9", sys.executable, *SANITIZED], end) \
                if sanitizer else "not installed"
    print("\n".join(f"{name}: {what}" for name, what in results.items()))
    return int(any(what.startswith(("failed", "out")) for what in results.values()))


if __name__ == "__main__":
    sys.exit(main())
