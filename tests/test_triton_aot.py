"""Every GPU kernel in every configuration of its table, compiled for four architectures without a GPU."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from dflash_kernels._triton import LAUNCHERS, _aot, _loops, load  # noqa: E402

CACHE = Path(__file__).resolve().parent.parent / "build" / "aot"


@pytest.mark.timeout(1800)
def test_compiles_for_every_architecture_without_spills_and_within_shared_memory(tell):
    reports = _aot.report_all(CACHE)
    assert len({(r.name, r.arch) for r in reports}) == len(reports), "two cases have the same name"
    tell(f"Triton: {_aot.summary(reports)}")
    wrong = [r.complaint() for r in reports if r.complaint()]
    assert not wrong, "\n".join(wrong)


def test_attention_prefetches_keys_and_values():
    """Two tiles of each are in shared memory. Addresses that a compiler takes for unaligned are not prefetched, and
    need not spill either."""
    for index, case in enumerate(case.on(90) for case in _aot.cases("attention")):
        if tile := case.constexprs.get("BLOCK_N"):
            itemsize = {"*u8": 1, "*fp32": 4}.get(case.signature["k_cache"], 2)
            found, least = _aot.report("attention", index, 90, CACHE), 4 * tile * case.constexprs["BLOCK_D"] * itemsize
            assert found.shared >= least, f"{found.name}: {found.shared} bytes of shared memory, not {least}"


def test_attention_issues_its_instructions_while_keys_arrive():
    """An H100's multiprocessor gets 3.35 TB/s / 132, at 1.755 GHz, and issues 4 instructions a clock at best. The loop
    over whole tiles is the shortest with products."""
    case = next(c for c in _aot.cases("attention") if c.name == "block_attention 128 bf16").on(90)
    loops = [x for x in _aot.loops(_aot.compiled(case, 90)[0]) if any("HGMMA" in word for word in x)]
    arriving = 2 * 2 * 128 * case.constexprs["BLOCK_N"] / (3.35e12 / 132 / 1.755e9)  # clocks for the tile's K and V
    issued = min(map(len, loops)) * case.num_warps
    assert len(loops) >= 3 and 0 < issued < 0.7 * 4 * arriving, (issued, 4 * arriving)


def test_linear_counts_on_no_more_programs_than_a_multiprocessor_holds():
    """Of sm_90: 64 K registers, which a warp gets in eights for each thread, and 228 KB of shared memory, of which a
    block takes one more."""
    linear, held = importlib.import_module("dflash_kernels._triton.linear"), {}
    for index, case in enumerate(_aot.cases("linear")):
        if found := re.fullmatch(r"linear (\d+) rows (bf16|fp32)", case.name):
            r, size = _aot.report("linear", index, 90, CACHE), (4 if found[2] == "fp32" else 2, int(found[1]))
            threads = 32 * linear.CONFIGS[size].warps
            held[size] = min((64 << 10) // (-(-r.registers // 8) * 8 * threads), (228 << 10) // (r.shared + 1024))
    assert held.keys() == linear.CONFIGS.keys()
    assert all(1 <= linear.CONFIGS[size].fill <= most for size, most in held.items()), held


def test_b6_shared_memory_bounds_linear_from_65_rows_on():
    """As counted by hand: for 8 KB of weights each of 8 warps loads 34 times four matrices of 128 bytes, 3 numbers for
    all its threads, and copies 6 times 512 bytes."""
    found = _loops.loop(*_loops.LOOPS["the same, 65 to 128 rows"])
    assert found.nbytes == 8192 and found.shared_clocks == 8 * (34 * 4 + 3 + 6 * 4) > 2 * found.arriving
    assert _loops.shared_clocks("@P0 LDGSTS.E.BYPASS.128 [R1], [R2.64]", 4) == 16
    assert _loops.shared_clocks("HGMMA.64x32x16.F32.BF16 R72, gdesc[UR8], RZ, !UPT, gsb0 ", 8) == 2 * 96 * 32 / 128
    assert _loops.shared_clocks("HGMMA.64x64x16.F32.BF16 R24, R56, gdesc[UR8].tnspB, R24", 4) == 64 * 32 / 128
    assert _loops.shared_clocks("LDG.E.128 R4, [R2.64]", 8) == _loops.shared_clocks("LDGDEPBAR", 8) == 0


def test_spills_stack_and_too_much_shared_memory_are_complaints():
    good = _aot.Report("k", 90, registers=32, spills=0, stack=0, shared=227 << 10)
    assert good.complaint() == ""
    assert "8 bytes spilled" in good._replace(spills=8).complaint()
    assert "16 bytes of stack" in good._replace(stack=16).complaint()
    assert "over 101376" in good._replace(arch=120).complaint()


@pytest.mark.parametrize("op", LAUNCHERS)
def test_a_launcher_has_the_name_and_the_arguments_of_its_op(op):
    function, schema = load(LAUNCHERS[op]), getattr(torch.ops.dflash, op).default._schema
    assert function.__name__ == op
    assert list(inspect.signature(function).parameters) == [a.name for a in schema.arguments]
