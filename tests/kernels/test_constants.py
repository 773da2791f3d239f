"""Numbers that C++ and Python share are equal, and written once in each."""

import ast
import re
import struct

import pytest

from dflash_decode.checkpoint.fields import MOST_HEAD_DIM
from dflash_kernels import reference
from tests.support import ROOT

# Name in Python: where C++ has it, as csrc's file and name.
SHARED = {
    "GREEDY": ("cpu/sample_distribution.h", "kGreedy"),
    "HOTTEST": ("cpu/sample_distribution.h", "kHottest"),
    "SAMPLE_CHUNK": ("cpu/sample.h", "kSampleChunk"),
    "CHUNK_SUMS": ("cpu/sample.h", "kChunkSums"),
    "ROW_STATS": ("cpu/sample.h", "kRowStats"),
    "MAX_LAYERS": ("params/context.h", "kMaxLayers"),
    "MAX_EXPERTS": ("cpu/router.cpp", "kMaxExperts"),
    "MAX_K": ("cpu/router.cpp", "kMaxChosen"),
    "TINY": ("cpu/router.cpp", "kTiny"),
    "GATE_ALPHA": ("cpu/experts.cpp", "kAlpha"),
    "GATE_LIMIT": ("cpu/experts.cpp", "kLimit"),
    "MAX_HEAD_DIM": ("cpu/rope_head.h", "kMaxHeadDim"),
}


def in_cpp(file, name):
    text = re.sub(r"//[^\n]*", "", (ROOT / "csrc" / file).read_text(encoding="utf-8"))
    (found,) = re.findall(rf"\bconstexpr [^;]*\b{name} = ([^,;]+)[,;]", text)
    return ast.literal_eval(found)


def assignments(text):
    """(name, value) of a module's constants: those with one literal, and tuples of them."""
    for node in ast.parse(text).body:
        if not isinstance(node, ast.Assign) or len(node.targets) > 1:
            continue
        target, value = node.targets[0], node.value
        whole = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts)
        for name, number in zip(target.elts, value.elts, strict=True) if whole else [(target, value)]:
            if isinstance(name, ast.Name) and isinstance(number, ast.Constant):
                yield name.id, number.value


def in_python(name):
    """Values of all constants of that name in the package."""
    return [value for file in sorted((ROOT / "dflash_kernels").rglob("*.py"))
            for found, value in assignments(file.read_text(encoding="utf-8")) if found == name]


@pytest.mark.parametrize("name", SHARED)
def test_cpp_and_python_have_one_value(name):
    assert in_python(name) == [in_cpp(*SHARED[name])]


def test_random_numbers_are_for_the_same_purposes():
    text = (ROOT / "csrc" / "cpu" / "philox.h").read_text(encoding="utf-8")
    (names,) = re.findall(r"enum class Purpose : uint32_t \{ ([\w, ]+) \};", text)
    assert {name.upper(): [number] for number, name in enumerate(names.split(", "))} == {
        name: in_python(name) for name in ("SAMPLE", "ACCEPT", "DRAFT")}


def test_a_packed_block_has_as_many_outputs_in_every_language():
    assert in_cpp("cpu/gemm.h", "kBlock") == reference.linear.BLOCK
    assert in_python("BLOCK") == [reference.linear.BLOCK]


def test_an_fp8_cache_holds_the_same_range_in_every_language():
    (bits,) = struct.unpack("<I", struct.pack("<f", reference._fp8.LARGEST))
    assert in_cpp("cpu/fp8.h", "kLargest") == bits
    triton = (ROOT / "dflash_kernels" / "_triton" / "_fp8.py").read_text(encoding="utf-8")
    assert f"0x{bits:08X}" in triton


def test_triton_takes_them_from_the_same_place():
    pytest.importorskip("triton")
    from dflash_kernels._triton import rope, sample_accept, sample_distribution

    (chunk,), (greedy,), (stats,), (widest,) = map(in_python, ("SAMPLE_CHUNK", "GREEDY", "ROW_STATS", "MAX_HEAD_DIM"))
    assert (sample_distribution.CHUNK.value, sample_distribution.GREEDY.value) == (chunk, greedy)
    assert [sample_distribution.LARGEST.value] == in_python("HOTTEST")
    assert [[p.value] for p in (sample_distribution.SAMPLE, sample_distribution.ACCEPT, sample_distribution.DRAFT)] == [
        in_python(name) for name in ("SAMPLE", "ACCEPT", "DRAFT")]
    assert sample_accept.STATS.value == stats
    assert max(rope.CONFIGS) == widest


def test_a_checkpoint_may_have_heads_as_wide_as_the_kernels():
    assert in_python("MAX_HEAD_DIM") == [MOST_HEAD_DIM]


def test_constants_are_found_in_both_languages():
    text = 'A = 1\nB, C = 2.5, "x"\nD = A\nE, F = (G for G in H)\nI = J = 3'
    assert list(assignments(text)) == [("A", 1), ("B", 2.5), ("C", "x")]
    assert in_cpp("cpu/stream.cpp", "kLine") == 64 and in_cpp("cpu/stream.cpp", "kAhead") == 2048
