"""Formats of weights in blocks of 4 to 8 bits, as GGUF files store them. Imports no torch."""

from typing import NamedTuple


class Format(NamedTuple):
    """number: as enum Format in csrc/cpu/types.h. block, bytes: elements and bytes of one block of a file. packed:
    bytes of 256 k of 16 outputs, packed (csrc/cpu/quant.h); offset: what a code is above its value."""

    number: int
    block: int
    bytes: int
    packed: int
    offset: int


FORMATS = {
    "q4_0": Format(1, 32, 18, 8 * 288, 8),
    "q4_1": Format(2, 32, 20, 8 * 320, 0),
    "q8_0": Format(3, 32, 34, 8 * 544, 128),
    "q4_k": Format(4, 256, 144, 64 + 8 * 288, 0),
    "q5_k": Format(5, 256, 176, 64 + 8 * 352, 0),
    "q6_k": Format(6, 256, 210, 32 + 8 * 416, 32),
}
NAMES = {f.number: name for name, f in FORMATS.items()}
EXACT = 16  # added to a format's number: blocks become elements before they are multiplied; kExact in C++


def packed_bytes(f: Format, k: int) -> int:
    """Bytes of 16 outputs of K = k, a multiple of f.block."""
    return f.packed * k // 256
