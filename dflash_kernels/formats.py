"""Formats of weights in blocks of 4 to 8 bits, as GGUF files and 4-bit checkpoints store them. Imports no torch."""

from typing import NamedTuple


class Format(NamedTuple):
    """number: as enum Format in csrc/cpu/types.h. bits: of a code. block, bytes: elements and bytes of one block of a
    file. packed: bytes of 256 k of 16 outputs, packed (csrc/cpu/quant.h), 0 without a CPU kernel; offset: what a code
    is above its value. record: bytes of 256 k of an output on a GPU (_triton/_quant.py)."""

    number: int
    bits: int
    block: int
    bytes: int
    packed: int
    offset: int
    record: int


FORMATS = {
    "q4_0": Format(1, 4, 32, 18, 8 * 288, 8, 144),
    "q4_1": Format(2, 4, 32, 20, 8 * 320, 0, 160),
    "q8_0": Format(3, 8, 32, 34, 8 * 544, 128, 272),
    "q4_k": Format(4, 4, 256, 144, 64 + 8 * 288, 0, 148),
    "q5_k": Format(5, 5, 256, 176, 64 + 8 * 352, 0, 180),
    "q6_k": Format(6, 6, 256, 210, 32 + 8 * 416, 32, 212),
    "q5_0": Format(7, 5, 32, 22, 8 * 352, 16, 176),
    "q5_1": Format(8, 5, 32, 24, 8 * 384, 0, 192),
    "iq4_nl": Format(9, 4, 32, 18, 8 * 288, 128, 144),
    "iq4_xs": Format(10, 4, 256, 136, 32 + 8 * 272, 128, 140),
}
# 4-bit checkpoints' groups of 128 k, which awq_blocks and gptq_blocks make: a float16 scale, the zero point if it is
# not 8, and 64 bytes with codes k and k + 64.
GROUPED = {"int4_g128": Format(11, 4, 128, 66, 0, 8, 132), "uint4_g128": Format(12, 4, 128, 67, 0, 0, 136)}
EVERY = FORMATS | GROUPED
LOOKED_UP = ("iq4_nl", "iq4_xs")  # a code is a place in LOOKUP
LOOKUP = (1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241)
NAMES = {f.number: name for name, f in EVERY.items()}
EXACT = 16  # added to a format's number: blocks become elements before they are multiplied; kExact in C++
RECORD, ALIGNED = 256, 16  # on a GPU: k of a record, and what the number of outputs is rounded up to


def packed_bytes(f: Format, k: int) -> int:
    """Bytes of 16 outputs of K = k, a multiple of f.block."""
    return f.packed * k // 256


def gpu_shape(f: Format, n: int, k: int) -> tuple[int, int, int]:
    """Of a packed weight (n, k) on a GPU."""
    return -(-k // RECORD), -(-n // ALIGNED) * ALIGNED, f.record
