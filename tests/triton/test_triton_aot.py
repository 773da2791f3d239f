"""Every GPU kernel in every configuration of its table, compiled for four architectures without a GPU."""

import importlib
import json
import re

import pytest
import torch

from dflash_kernels.formats import EVERY
from tests.support import ROOT

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from tools.aot import compile as _aot  # noqa: E402
from tools.aot import launched  # noqa: E402
from tools.aot import loops as _loops  # noqa: E402

CACHE, COMMITTED = ROOT / "build" / "aot", ROOT / "bench" / "results" / "aot" / "triton.json"


@pytest.fixture(scope="module")
def reports():
    """(name, architecture) -> Report: those that `make aot` wrote, where it did so with this Triton."""
    version, rows = _aot.read(COMMITTED)
    found = rows.values() if version == triton.__version__ else _aot.report_all(CACHE)
    return {(r.name, r.arch): r for r in found}


def test_what_is_committed_is_of_the_kernels_as_they_are():
    version, rows = _aot.read(COMMITTED)
    if version != triton.__version__:
        pytest.skip(f"committed with Triton {version}; every kernel is compiled here with {triton.__version__}")
    known = _aot.keys()
    stale = sorted({rows[key].name for key in rows.keys() - known} | {known[key][0] for key in known.keys() - rows})
    assert not stale, f"changed since `make aot` compiled them: {', '.join(stale)}"
    assert all(known[key] == (r.name, r.arch) for key, r in rows.items())


@triton.jit(do_not_specialize=["free"])
def probe(x, absent, one, sixteens, odd, far, free, number, SIZE: tl.constexpr, WIDE: tl.constexpr):
    pass


def test_a_recorded_launch_is_specialised_as_triton_does():
    x = launched.empty(4, dtype=torch.float16)
    (launch,) = launched.launches(lambda: probe[1,](x, None, 1, 32, 7, 1 << 31, 16, 1.0, WIDE=True, num_warps=2,
                                                    num_stages=4, maxnreg=64, SIZE=8))
    case = launched.case("probe", launch)
    assert case.signature == {"x": "*fp16", "absent": "constexpr", "one": "constexpr", "sixteens": "i32:16",
                              "odd": "i32", "far": "i64:16", "free": "i32", "number": "fp32", "SIZE": "constexpr",
                              "WIDE": "constexpr"}
    assert list(case.signature) == case.kernel.arg_names and case.kernel is probe
    assert list(case.constexprs.items()) == [("WIDE", True), ("SIZE", 8), ("absent", None), ("one", 1)]
    assert case[4:] == (2, 4, {"maxnreg": 64}) and launch.options["num_warps"] == 2


def test_attention_is_launched_as_each_chip_has_it():
    """From sm_89 on an instruction reads an fp8 cache; of other caches there is one kernel, which has no use for it."""
    attention = importlib.import_module("dflash_kernels._triton.attention")
    for arch in _aot.SHARED_LIMIT:
        found = {case.name: case for case in _aot.cases("attention", arch)}
        fp8, other = found["block_attention 64 bf16 fp8 cache"], found["block_attention 64 bf16"]
        assert (fp8.constexprs["NATIVE"], other.constexprs["NATIVE"]) == (arch >= 89, False)
        tile = attention.config(2, 2, 64, False, arch // 10)
        assert (other.constexprs["BLOCK_M"], other.num_warps) == (tile.BLOCK_M, tile.warps)


@pytest.mark.parametrize("noun", [noun for noun in _aot.NOUNS if noun != "attention"])
def test_the_compiler_says_what_is_committed(noun, reports):
    """Of each noun's first case; of attention below."""
    found = _aot.report(noun, 0, 90)
    assert found == reports[found.name, 90]


@pytest.mark.timeout(1800)
def test_compiles_for_every_architecture_without_spills_and_within_shared_memory(tell, reports):
    known = _aot.keys()
    assert len(set(known.values())) == len(known), "two cases have the same name"
    assert set(known.values()) == reports.keys()
    tell(f"Triton: {_aot.summary(list(reports.values()))}")
    wrong = [r.complaint() for r in reports.values() if r.complaint()]
    assert not wrong, "\n".join(wrong)


def test_no_attention_in_16_bits_waits_for_its_own_tile(reports):
    """While a tile's keys are waited for, those of the next are on their way; of two with heads of 128 on sm_90, where
    a multiprocessor has one block and nobody else hides the wait. Two buffers in shared memory do not show it: copies
    arrive in order, and the page table's was asked for last."""
    seen = 0
    for arch in _aot.SHARED_LIMIT:
        for case in _aot.cases("attention", arch):
            if case.signature.get("k_cache") in ("*bf16", "*fp16"):
                found, seen = reports[case.name, arch], seen + 1
                least = 2 if arch == 90 and case.constexprs["BLOCK_D"] == 128 and not case.constexprs["SOFTCAP"] else 1
                assert found.ahead is not None and found.ahead >= least, found
    assert seen == 9 * len(_aot.SHARED_LIMIT)


def test_splits_are_merged_with_several_on_their_way(reports):
    """Each is a trip to the second-level cache. Written as 8 loads and 8 combines they came one after another: what the
    compiler makes of an order of loads is its own."""
    combines = [r for (name, _), r in reports.items() if "combine_splits" in name]
    assert len(combines) == 9 * len(_aot.SHARED_LIMIT)
    assert all(r.ahead == 6 for r in combines), [r for r in combines if r.ahead != 6]


def test_attention_counts_on_as_many_programs_as_a_multiprocessor_holds(reports):
    """64 K registers, which a warp gets in eights for each thread, and a KB more of shared memory than one block may
    have, of which each takes one."""
    attention, wrong = importlib.import_module("dflash_kernels._triton.attention"), []
    for arch in _aot.SHARED_LIMIT:
        for case in (c for c in _aot.cases("attention", arch) if "combine_splits" not in c.name):
            r, warps = reports[case.name, arch], case.num_warps
            held = min((64 << 10) // (-(-r.registers // 8) * 8 * 32 * warps),
                       (_aot.SHARED_LIMIT[arch] + 1024) // (r.shared + 1024))
            if held != attention.blocks_of(warps):
                wrong.append((case.name, arch, r.registers, r.shared, held))
    assert not wrong, wrong


@pytest.mark.parametrize("least,waits", [(0, (0,)), (1, (3, 5)), (2, (7,))])
def test_how_far_a_loop_copies_ahead_is_read_from_its_waits(least, waits):
    """Of the shortest loop with products; three groups a turn."""
    def loop(waits, products, more=0):
        return ["  %r = scf.for %i = %a to %b step %c  : i32 {", *(f"    %w = ttg.async_wait %p {{num = {n} : i32}}"
                for n in waits), *["    %s = tt.dot %q, %k, %z : x"] * products, *["    scf.if %t {", "    }"] * more,
                *["    %g = ttg.async_commit_group tokens %t"] * 3, "  } loc(#l)"]

    ttgir = "\n".join(["module {", *loop((0,), 2, more=9), *loop(waits, 2), *loop((9,), 0), "}"])
    groups, found = _aot.main_loop(ttgir)
    assert (groups, found) == (3, min(waits))
    assert _aot.Report("k", 90, 32, 0, 0, 0, groups, found).ahead == least
    assert _aot.main_loop("\n".join([*loop((), 0), *loop(waits, 0), *loop((9,), 0, more=9)])) == (3, min(waits))
    assert _aot.main_loop("\n".join(loop((), 0))) == (None, None)


def test_what_has_a_report_is_not_compiled_again(tmp_path, monkeypatch):
    """By its key: the committed reports do without a folder of earlier ones."""
    monkeypatch.setattr(_aot, "NOUNS", ("activation",))
    known = {key: _aot.Report(*what, 32, 0, 0, 0) for key, what in _aot.keys().items()}
    assert _aot.report_all(tmp_path, 1, known) == list(known.values()) and not [*tmp_path.iterdir()]
    changed, _ = known.popitem()
    found = _aot.report_all(tmp_path, 1, {**known, "gone": _aot.Report("gone", 90, 32, 0, 0, 0)})
    assert [p.stem for p in tmp_path.iterdir()] == [changed]
    assert found[:-1] == list(known.values()) and (found[-1].name, found[-1].arch) == _aot.keys()[changed]


def test_the_report_carries_warnings_and_waits(tmp_path):
    written = [_aot.Report("k", 90, 32, 0, 0, 64, 3, 7, ("C7515",)), _aot.Report("k", 100, 30, 0, 0, 0)]
    _aot.write(written, tmp_path, {"a": ("k", 90), "b": ("k", 100)})
    assert _aot.read(tmp_path / "triton.json") == (triton.__version__, dict(zip("ba", written[::-1], strict=True)))
    assert "| k | 32 / 64, 2 ahead, C7515 | 30 / 0 |" in (tmp_path / "triton.md").read_text()
    first, second = json.loads((tmp_path / "triton.json").read_text())["kernels"]
    assert (first["ahead"], first["warnings"], second["ahead"]) == (2, ["C7515"], None)


def test_attention_issues_its_instructions_while_keys_arrive(reports):
    """An H100's multiprocessor gets 3.35 TB/s / 132, at 1.755 GHz, and issues 4 instructions a clock at best. The loop
    over whole tiles is the shortest with products."""
    case = next(c for c in _aot.cases("attention", 90) if c.name == "block_attention 128 bf16")
    kernel, log = _aot.compiled(case, 90)
    assert _aot.report_of(case, 90, kernel, log) == reports[case.name, 90]
    loops = [x for x in _aot.loops(kernel) if any("HGMMA" in word for word in x)]
    arriving = 2 * 2 * 128 * case.constexprs["BLOCK_N"] / (3.35e12 / 132 / 1.755e9)  # clocks for the tile's K and V
    issued = min(map(len, loops)) * case.num_warps
    assert len(loops) >= 3 and 0 < issued < 0.7 * 4 * arriving, (issued, 4 * arriving)


def test_linear_counts_on_no_more_programs_than_a_multiprocessor_holds(reports):
    """Of sm_90: 64 K registers, which a warp gets in eights for each thread, and 228 KB of shared memory, of which a
    block takes one more."""
    linear, held = importlib.import_module("dflash_kernels._triton.linear"), {}
    for case in _aot.cases("linear", 90):
        if found := re.fullmatch(r"linear (\d+) rows (bf16|fp32)( x \w+_\w+)?", case.name):
            r, size = reports[case.name, 90], (4 if found[2] == "fp32" else 2, int(found[1]))
            table, threads = linear.BLOCK_CONFIGS if found[3] else linear.CONFIGS, 32 * case.num_warps
            most = min((64 << 10) // (-(-r.registers // 8) * 8 * threads), (228 << 10) // (r.shared + 1024))
            held[case.name] = table[size].fill, most
    assert len(held) == len(linear.CONFIGS) + 2 * len(EVERY) + 1
    assert all(1 <= fill <= most for fill, most in held.values()), held


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
