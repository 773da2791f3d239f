"""Counts the work of a multiprocessor while the bytes of a kernel's loop arrive, in machine instructions.

    python -m tools.aot FOLDER     writes FOLDER/loops.md

Two units can be slower than the memory: the four schedulers, with one instruction per clock each, and shared memory,
with 128 bytes per clock. A loop that exceeds either is bound by it.
"""

import re
from typing import NamedTuple

from dflash_kernels.formats import EVERY, NAMES

from . import compile as _aot

# An H100: bytes that one of its 132 multiprocessors gets in a clock of 1.755 GHz at 3.35 TB/s.
BYTES_A_CLOCK = 3.35e12 / 132 / 1.755e9
WIDTHS = {".U8": 1, ".S8": 1, ".U16": 1, ".64": 2, ".128": 4}  # 128-byte rows that the 32 threads of a warp take
LOOPS = {  # what the table calls it: noun, case, bytes that a turn of the loop reads
    "`linear`, `lm_head_argmax`, 1 to 16 rows": ("linear", "linear 16 rows bf16", lambda c: 2 * tile(c)),
    "the same, 33 to 64 rows": ("linear", "linear 64 rows bf16", lambda c: 2 * tile(c)),
    "the same, 65 to 128 rows": ("linear", "linear 128 rows bf16", lambda c: 2 * tile(c)),
    "the same, 1 to 16 rows, weights in 8 bits": ("linear", "linear 16 rows bf16 x i8", lambda c: tile(c)),
    "the same, weights in q4_0": ("linear", "linear 16 rows bf16 x q4_0", lambda c: block_tile(c)),
    "the same, weights in q4_k": ("linear", "linear 16 rows bf16 x q4_k", lambda c: block_tile(c)),
    "the same, weights in q6_k": ("linear", "linear 16 rows bf16 x q6_k", lambda c: block_tile(c)),
    "the same, weights in q8_0": ("linear", "linear 16 rows bf16 x q8_0", lambda c: block_tile(c)),
    "17 to 32 rows, weights in q4_k": ("linear", "linear 32 rows bf16 x q4_k", lambda c: block_tile(c)),
    "`block_attention`, up to 64 rows a key head, heads of 128": (
        "attention", "block_attention 128 bf16", lambda c: 4 * keys(c)),
    "the same, heads of 64": ("attention", "block_attention 64 bf16", lambda c: 4 * keys(c)),
    "the same, fp8 cache, heads of 128": (
        "attention", "block_attention 128 bf16 fp8 cache", lambda c: 2 * keys(c)),
    "the same, fp8 cache, heads of 64": ("attention", "block_attention 64 bf16 fp8 cache", lambda c: 2 * keys(c)),
}


class Loop(NamedTuple):
    """Of one turn: bytes read from the device's memory, instructions of all warps, clocks of shared memory."""

    nbytes: int
    instructions: int
    shared_clocks: int

    @property
    def arriving(self) -> float:
        """Clocks in which the bytes arrive."""
        return self.nbytes / BYTES_A_CLOCK


def tile(constants: dict) -> int:
    return constants["BLOCK_N"] * constants["BLOCK_K"]


def block_tile(constants: dict) -> int:
    """A record of each output."""
    return constants["BLOCK_N"] * EVERY[NAMES[constants["FORMAT"]]].record


def keys(constants: dict) -> int:
    return constants["BLOCK_N"] * constants["HEAD_DIM"]


def shared_clocks(word: str, warps: int) -> float:
    """For how long an instruction of all warps has shared memory to itself, if its accesses have no conflicts. wgmma
    is four warps' and reads its second operand, and the first unless it is in registers."""
    op, *operands = re.sub(r"^@\S+ ", "", word).replace(",", " ").split()
    name, width = op.split(".")[0], next((rows for ending, rows in WIDTHS.items() if op.endswith(ending)), 1)
    if name in ("LDSM", "STSM"):
        return warps * (int(op[-1]) if op[-1] in "24" else 1)
    if name in ("LDS", "STS", "LDGSTS"):
        return warps * width
    if name in ("HGMMA", "QGMMA", "IGMMA"):
        m, n, k = map(int, re.search(r"\.(\d+)x(\d+)x(\d+)\.", op).groups())
        rows = n + m * operands[1].startswith("gdesc")
        return warps / 4 * rows * k * (2 if name == "HGMMA" else 1) / 128
    return 0


def loop(noun: str, name: str, read) -> Loop:
    """The shortest loop with products of a kernel for sm_90, which is the one that nearly all its time is in."""
    case = next(c for c in _aot.cases(noun, 90) if c.name == name)
    found = [x for x in _aot.loops(_aot.compiled(case, 90)[0]) if any("MMA" in word for word in x)]
    words = min(found, key=len)
    return Loop(read(case.constexprs), len(words) * case.num_warps,
                round(sum(shared_clocks(word, case.num_warps) for word in words)))


def table() -> str:
    import triton

    lines = ["| the loop of | reads | instructions, all warps | of what fits | shared memory, clocks | of what fits |",
             "|---|---|---|---|---|---|"]
    for what, where in LOOPS.items():
        x = loop(*where)
        lines.append(f"| {what} | {x.nbytes >> 10} KB | {x.instructions:,} | {x.instructions / x.arriving / 4:.0%} | "
                     f"{x.shared_clocks:,} | {x.shared_clocks / x.arriving:.0%} |".replace("%", " %"))
    return (f"Counted in what Triton {triton.__version__} makes for sm_90, at an H100's 3.35 TB/s, 132 multiprocessors "
            "and 1.755 GHz:\n\n" + "\n".join(lines) + "\n")
