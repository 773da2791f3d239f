"""Reports ptxas' registers, spills and shared memory of the CUDA C++ kernels on every architecture, without a GPU.

    python -m tools.aot.ptxas FOLDER     writes the table of every kernel there

Sources are compiled with the flags of setup.py. A report is kept in build/aot under a hash of everything that it
depends on, so the second run compiles nothing.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setup import CUDA_ARCHITECTURES, ROOT, find_nvcc, nvcc_flags, nvcc_release
from tools.aot.compile import Report

CACHE = ROOT / "build" / "aot"
PROBE = ROOT / "tests" / "kernels" / "cuda" / "cute_probe.cu"


def kernels() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def _depends_on(source: Path) -> list:
    """The probe includes CUTLASS alone, whose files are as its version says."""
    if source == PROBE:
        return [source.read_bytes(), importlib.metadata.version("nvidia-cutlass")]
    headers = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh"))
    return [p.read_bytes() for p in (source, *headers)]


def report(source: Path, arch: str) -> list[Report]:
    """One for each kernel of a source file."""
    facts = (_depends_on(source), arch, nvcc_flags(), nvcc_release(find_nvcc()))
    kept = CACHE / f"ptxas-{hashlib.sha256(repr(facts).encode()).hexdigest()}.json"
    if not kept.exists():
        found = _compile(source, arch)
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}-{arch}")
        partial.write_text(json.dumps(found))
        partial.replace(kept)
    return [Report(*fields) for fields in json.loads(kept.read_text())]


def _compile(source: Path, arch: str) -> list[Report]:
    with tempfile.TemporaryDirectory() as folder:
        ran = subprocess.run([find_nvcc(), *nvcc_flags(), f"-arch=sm_{arch}", "-cubin", "-Xptxas=-v", "-o",
                              str(Path(folder, "out.cubin")), str(source)], capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{source.name} does not compile for sm_{arch}:\n{ran.stdout}{ran.stderr}")
    return parse(ran.stdout + ran.stderr, int(re.match(r"\d+", arch)[0]))


def parse(log: str, arch: int) -> list[Report]:
    """ptxas names a kernel, then says what it takes; shared memory is mentioned where there is any."""
    found = []
    for part in log.split("Compiling entry function '")[1:]:
        number = lambda pattern, part=part: int((re.search(pattern, part) or [0, 0])[1])  # noqa: E731
        if "Used" not in part or "spill stores" not in part:
            raise RuntimeError(f"ptxas gave unexpected output:\n{log}")
        found.append(Report(_readable(part.split("'")[0]), arch, number(r"Used (\d+) registers"),
                            number(r"(\d+) bytes spill stores"), number(r"(\d+) bytes stack frame"),
                            number(r"(\d+) bytes smem")))
    return found


def _readable(name: str) -> str:
    """write_context_kv_kernel<__half, 8>."""
    full = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    return re.search(r"(\w+(<[^>]*>)?)$", full.replace("(anonymous namespace)::", "").split("(")[0])[1]


def report_all(sources: list[Path], workers: int = 2, architectures: Sequence[str] = CUDA_ARCHITECTURES,
               ) -> list[Report]:
    jobs = [(source, arch) for source in sources for arch in architectures]
    with ThreadPoolExecutor(workers) as pool:
        return [r for found in pool.map(report, *zip(*jobs, strict=True)) for r in found]


def summary(reports: list[Report]) -> str:
    spilled = sum(r.spills > 0 or r.stack > 0 for r in reports)
    return (f"{len({r.name for r in reports})} CUDA C++ kernels × {len(CUDA_ARCHITECTURES)} architectures compiled, "
            f"{spilled} spills")


def table(reports: list[Report]) -> str:
    """Markdown: a row a kernel, registers a thread / bytes of shared memory a block for each architecture."""
    rows = {}
    for r in reports:
        rows.setdefault(r.name, []).append(f"{r.registers} / {r.shared}")
    head = ["kernel", *(f"sm_{a}" for a in CUDA_ARCHITECTURES)]
    lines = [head, ["---"] * len(head), *([f"`{n}`", *cells] for n, cells in sorted(rows.items()))]
    return (f"nvcc {nvcc_release(find_nvcc())}: {summary(reports)}. Registers a thread / bytes of shared memory a "
            "block.\n\n" + "".join("| " + " | ".join(line) + " |\n" for line in lines))


if __name__ == "__main__":
    if not find_nvcc():
        sys.exit("ptxas: there is no nvcc")
    every = report_all(kernels())
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    Path(sys.argv[1], "cuda.md").write_text(table(every), encoding="utf-8")
    sys.exit("\n".join(filter(None, (r.complaint() for r in every))) or 0)
