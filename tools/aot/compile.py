"""Compiles kernels for GPUs that this machine does not have, and reports the resources of each.

    python -m tools.aot FOLDER [CACHE]     writes triton.md, triton.json and loops.md there: every case, of which it
                                           compiles those that have changed since

A spilled register is memory traffic that no roofline counts, and a block over its architecture's shared memory does not
launch. ptxas finds both without a GPU.
"""

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from dflash_kernels._triton import LAUNCHERS

from . import experts, launched, products
from .launched import Case
from .sampled import sample, selector

# Bytes of shared memory that one block may have (CUDA C++ Programming Guide, compute capabilities).
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
NOUNS = tuple(dict.fromkeys(where.split(":")[0] for where in LAUNCHERS.values()))


class Report(NamedTuple):
    """registers and spilled bytes are a thread's, shared bytes a block's. groups: of asynchronous copies in a turn of
    the main loop, None where it has none; waits: how many of them may still be under way when it waits. warnings:
    what ptxas calls slow, by number (C7515: each wgmma waits for the one before)."""

    name: str
    arch: int
    registers: int
    spills: int
    stack: int
    shared: int
    groups: int | None = None
    waits: int | None = None
    warnings: tuple[str, ...] = ()

    @property
    def ahead(self) -> int | None:
        """Turns of the main loop whose copies are under way while one waits for its own; None: it copies nothing."""
        return None if self.groups is None else self.waits // self.groups

    def complaint(self) -> str:
        """Why this must not ship, or "". A stack frame alone is local memory too."""
        if self.spills or self.stack:
            return f"{self.name} sm_{self.arch}: {self.spills} bytes spilled, {self.stack} bytes of stack"
        if self.shared > SHARED_LIMIT[self.arch]:
            return f"{self.name} sm_{self.arch}: {self.shared} bytes of shared memory, over {SHARED_LIMIT[self.arch]}"
        return ""


def cases(noun: str, arch: int) -> list[Case]:
    others = {"sample": sample, "selector": selector, "linear": products.linear, "lm_head": products.lm_head,
              "lm_head_topk": products.lm_head_topk, "experts": experts.experts, "router": experts.router}
    return list(others[noun]()) if noun in others else launched.cases(noun, arch)


def key(case: Case, arch: int) -> str:
    """Of everything that a report depends on: the kernel's source and that of what it calls, its configuration, the
    compiler. case: one of `arch`'s."""
    import triton

    facts = (Report._fields,
             case.name, case.kernel.cache_key, case.signature, case.constexprs, case[4:], arch, triton.__version__)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def keys() -> dict[str, tuple[str, int]]:
    """(name, architecture) of every case of every noun on every architecture, by its key."""
    return {key(case, arch): (case.name, arch) for noun in NOUNS for arch in SHARED_LIMIT
            for case in cases(noun, arch)}


def report(noun: str, index: int, arch: int, cache: str | os.PathLike | None = None) -> Report:
    """Compiles case `index` of a noun. cache: a folder of earlier reports, each under its key."""
    case = cases(noun, arch)[index]
    kept = Path(cache, key(case, arch) + ".json") if cache else None
    if kept and kept.exists():
        return _read(json.loads(kept.read_text()))
    found = report_of(case, arch, *compiled(case, arch))
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(found))
        partial.replace(kept)
    return found


def _read(fields: list) -> Report:
    return Report(*fields[:-1], tuple(fields[-1]))


def compiled(case: Case, arch: int) -> tuple[Any, str]:
    """Triton's compiled kernel, and what ptxas said of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attrs = _specialised(case)
    source = ASTSource(case.kernel, signature, case.constexprs, attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    log = io.StringIO()
    # Compiled anew, into a folder of its own: a cached kernel comes without the log of ptxas.
    with (tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(log),
          _environment(TRITON_CACHE_DIR=folder, TRITON_DUMP_PTXAS_LOG="1")):
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options), log.getvalue()


def report_of(case: Case, arch: int, kernel: Any, log: str) -> Report:
    """Of what `compiled` gave."""
    return Report(case.name, arch, *(_number(p, log) for p in (
        r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes stack frame")), kernel.metadata.shared,
        *main_loop(kernel.asm["ttgir"]), tuple(sorted(set(re.findall(r"\bC75\d\d\b", log)))))


def main_loop(ttgir: str) -> tuple[int | None, int | None]:
    """(groups, waits) of a Report: of the shortest loop with products and asynchronous copies, as a loop over tiles
    that need no mask is shorter than the same with masks; of a kernel without products, of the shortest with copies."""
    open_loops, found = [], []
    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        if re.search(r"\bscf\.(for|while)\b", line):
            open_loops.append((indent, []))
        elif open_loops and indent <= open_loops[-1][0] and line.lstrip().startswith("}"):
            found.append(open_loops.pop()[1])
        elif open_loops:
            open_loops[-1][1].append(line)
    products = r"= tt\.dot |= ttng\.warp_group_dot |ttng\.tc_gen5_mma "
    some = re.search(products, ttgir)
    for body in sorted(found, key=len):
        waits = [int(n) for n in re.findall(r"ttg\.async_wait .*num = (\d+)", "\n".join(body))]
        if waits and (not some or any(re.search(products, line) for line in body)):
            return sum("ttg.async_commit_group" in line for line in body), min(waits)
    return None, None


def loops(kernel: Any) -> list[list[str]]:
    """The machine's instructions in each loop of a compiled kernel, from the branch's target to the branch, without the
    longest part that a branch in it passes over: what most turns do not do, such as the end of a split."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "-sass", file.name], check=True,
                              capture_output=True, text=True).stdout
    lines = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", text)]
    jumps = [(at, int(m[1], 16)) for at, word in lines if (m := re.search(r"\bBRA\b.*0x([0-9a-f]+)", word))]
    found = []
    for end, begin in (jump for jump in jumps if jump[1] < jump[0]):
        over = max(((at, to) for at, to in jumps if begin <= at < to <= end), key=lambda x: x[1] - x[0], default=(0, 0))
        found.append([word for at, word in lines if begin <= at <= end and not over[0] < at < over[1]])
    return found


def _specialised(case: Case) -> tuple[dict, dict]:
    """The signature and attributes of the usual call: pointers, and integers marked like "i32:16", divide by 16."""
    marked = [n for n, kind in case.signature.items() if kind.startswith("*") or kind.endswith(":16")]
    attrs = {(case.kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in marked}
    return {n: kind.removesuffix(":16") for n, kind in case.signature.items()}, attrs


@contextlib.contextmanager
def _environment(**values):
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _number(pattern: str, log: str) -> int:
    found = re.search(pattern, log)
    if not found:
        raise RuntimeError(f"ptxas said nothing about {pattern!r}:\n{log}")
    return int(found[1])


def report_all(cache: str | os.PathLike | None = None, workers: int = 2,
               known: Mapping[str, Report] | None = None) -> list[Report]:
    """Every case of every noun for every architecture, in `workers` processes. known: reports by key; what has one is
    not compiled."""
    jobs = {key(case, arch): (noun, index, arch) for noun in NOUNS for arch in SHARED_LIMIT
            for index, case in enumerate(cases(noun, arch))}
    found = {k: r for k, r in (known or {}).items() if k in jobs}
    anew = [job for k, job in jobs.items() if k not in found]
    if anew:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            return [*found.values(), *pool.map(report, *zip(*anew, strict=True), [cache] * len(anew))]
    return list(found.values())


def summary(reports: list[Report]) -> str:
    spilled = sum(r.spills > 0 or r.stack > 0 for r in reports)
    return f"{len({r.name for r in reports})} kernels × {len(SHARED_LIMIT)} architectures compiled, {spilled} spills"


def table(reports: list[Report]) -> str:
    """Markdown: a row a kernel, what it takes on each architecture."""
    import triton

    rows = {}
    for r in reports:
        more = ([] if r.ahead is None else [f"{r.ahead} ahead"]) + list(r.warnings)
        rows.setdefault(r.name, {})[r.arch] = ", ".join([f"{r.registers} / {r.shared}", *more])
    head = ["kernel", *(f"sm_{a}" for a in SHARED_LIMIT)]
    lines = [head, ["---"] * len(head), *([n, *cells.values()] for n, cells in sorted(rows.items()))]
    return (f"Triton {triton.__version__}: {summary(reports)}. Registers a thread / bytes of shared memory a block; "
            "turns of the main loop whose copies are under way while one waits for its own; warnings of ptxas.\n\n"
            + "".join("| " + " | ".join(line) + " |\n" for line in lines))


def write(reports: list[Report], folder: str | os.PathLike, known: Mapping[str, tuple[str, int]]) -> None:
    """known: what keys() gives."""
    import triton

    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "triton.md").write_text(table(reports))
    of = {what: key for key, what in known.items()}
    found = [{"key": of[r.name, r.arch]} | r._asdict() | {"ahead": r.ahead}
             for r in sorted(reports, key=lambda r: (r.name, r.arch))]
    lines = ",\n".join(map(json.dumps, found))
    Path(folder, "triton.json").write_text(f'{{"triton": "{triton.__version__}", "kernels": [\n{lines}\n]}}\n')


def read(file: str | os.PathLike) -> tuple[str, dict[str, Report]]:
    """What `write` wrote as triton.json: Triton's version, and the reports by key."""
    found = json.loads(Path(file).read_text())
    return found["triton"], {row["key"]: _read([row[name] for name in Report._fields]) for row in found["kernels"]}
