"""The commands of `make gpu`, the most valuable first, each part with its share of the time."""

import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

SHARES = {"a": 185, "b": 90, "c": 85, "d": 45, "e": 95, "f": 30}  # of the time; what a part leaves, the next ones have
BUDGET, DRY_BUDGET, BUILDING = 530, 3600, 150  # for everything, the build as well; at most for the build
WORKERS = max(1, min((os.cpu_count() or 1) - 2, 14))  # processes of the tests, whose time is that of compiling kernels
DRY = [sys.executable, "-m", "tools.dry_gpu"]
TESTS = ["-m", "pytest", "-p", "no:cacheprovider", "--maxfail=20"]
OPS, ROWS, BLOCKS = (f"tests/gpu/test_{name}_gpu.py" for name in ("ops", "rows", "quant"))
# What compute-sanitizer looks for: in which tests, for how many seconds at most, in which environment. memcheck must
# see each allocation: behind torch's caching allocator it takes a block of megabytes for one. racecheck is for kernels
# whose warps share memory.
CHECKS = {"memcheck": ("sample and bf16", 45, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
          "racecheck": ("bf16 and (10000 or verify_sample or lm_head_topk or block_attention or linear)", 1e9, {})}


@dataclass(frozen=True)
class Step:
    """A command. seconds: its limit within its part. workers: the number of processes. absent: why it is not run."""

    name: str
    words: list[str]
    seconds: float = 1e9
    workers: int = 1
    environment: dict = field(default_factory=dict)
    absent: str = ""


def steps(part: str, out: Path, dry: bool, peers: bool) -> list[Step]:
    python = DRY if dry else [sys.executable]
    tiny = ["--tiny", "--runs", "1"] if dry else ["--runs", "20"]
    alone = [] if peers else ["--no-peers"]

    def tests(name, *words, seconds=1e9):
        return Step(name, [*python, *TESTS, *words], seconds, 1 if dry else WORKERS)

    def bench(*names, seconds=1e9, more=("--no-peers",)):
        words = ["--device", "cuda", *tiny, *more, "--json", str(out / "cases.json"), "--add"]
        return Step(" ".join(names), [*python, "-m", "bench.ops", *names, *words], seconds)

    def script(name, seconds=1e9, *more):
        words = ["-m", f"bench.gpu.{name}", str(out / f"{name}.json"), *more, *(["--tiny"] if dry else [])]
        return Step(name, [*python, *words], seconds)

    # The interpreter computes bfloat16 wrongly, so float16 is in its place.
    first, others = ("f16 and not bf16", "not f16") if dry else ("bf16", "not bf16")
    if part == "a":
        return [tests("ops and rows, bf16", OPS, ROWS, BLOCKS, "-k", first, seconds=90), bench("linear", seconds=40),
                bench("attention", seconds=40), bench("draft", seconds=30),
                bench("blocks", seconds=45)]
    if part == "b":
        return [bench("whole", seconds=75), script("profile")]
    if part == "c":
        return [script("sweep", 1e9, "--seconds", str(SHARES["c"] - 10))]
    if part == "d":
        return [counters(out, dry)]
    if part == "e":
        return [tests("the other tests", "tests/gpu", "-k", others, seconds=40),
                *(sanitizer(tool, dry) for tool in CHECKS)]
    return [bench("memory", "small", "sample", more=alone), bench("experts"),
            *([bench("linear", "attention", more=alone)] if peers else [])]


def counters(out: Path, dry: bool) -> Step:
    """Five kernels under Nsight Compute, where it is installed; without it (dry) they run alone."""
    found, words = shutil.which("ncu"), ["-m", "bench.gpu.counters"]
    if dry:
        return Step("counters", [*DRY, *words, "--tiny"])
    # The clocks are left as they are.
    tool = [found or "ncu", "--profile-from-start", "off", "--clock-control", "none", "--csv", "--log-file",
            str(out / "counters.csv"), *(word for name in ("SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats",
                                                           "Occupancy", "LaunchStats") for word in ("--section", name))]
    return Step("counters", [*tool, sys.executable, *words], absent="" if found else "ncu is not installed")


def sanitizer(tool: str, dry: bool) -> Step:
    found, (which, seconds, environment) = shutil.which("compute-sanitizer"), CHECKS[tool]
    absent = "left out, as there is no GPU" if dry else "" if found else "compute-sanitizer is not installed"
    checker = [found or "compute-sanitizer", "--tool", tool, "--error-exitcode=9"]
    return Step(tool, [*checker, sys.executable, *TESTS, OPS, "-k", which], seconds, 1, environment, absent)
