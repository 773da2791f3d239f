"""Weights in blocks of 4 to 8 bits, as the kernels read them, and the one function that makes elements of them.

Where one is read it becomes x's type in registers: code * d + m in float32, which every format has exactly or with one
rounding, then rounded to x's type. That is what csrc/cpu/quant.h calls exact; rows of x are not rounded.

The layout is the file's bits in another order. K is cut into records of 256, each 8 pieces of 32 k, zeros filling the
last. A record has sections one after the other, each for all outputs, so that what a program reads of it, 64 outputs,
is one run of memory in each section:

    codes    32 words an output: word j has, in its nibble i, 4 bits of the code of k = 32 i + j. q8_0: 64 words, and
             word j of half h has in its byte b the code of k = 32 (4 h + b) + j
    upper    of 5 bits: 32 bytes, a bit of each code; of 6: 32 halfwords, two bits of each. The even pieces' and the
             odd pieces' (Q5_AT, Q6_AT in reference/quant_gpu.py), so that a shift and a mask bring four codes together
    scales   words, each of all outputs side by side, which asynchronous copies can take: 4 bytes are their smallest

A thread thus has a whole piece's codes by one mask for each: a tile of (32, BLOCK_N) words is 8 tiles of the weight,
and no element changes threads. Bytes for 256 weights, and beside the file's:

    q4_0     128 codes                 16: two d                               144    144
    q4_1     128                       32: d, m                                160    160
    q5_0     128 + 32                  16: two d                               176    176
    q5_1     128 + 32                  32: d, m                                192    192
    iq4_nl   128                       16: two d                               144    144
    iq4_xs   128                       4: d of 256 as float32; 8: eight d      140    136
    q8_0     256                       16: two d                               272    272
    q4_k     128                       4: d and m of 256; 16: two (d, m)       148    144
    q5_k     128 + 32                  the same                                180    176
    q6_k     128 + 64                  4: d of 256 as float32; 16: four d      212    210
    int4_g128   128                    4: two d                                132    133, with zero points
    uint4_g128  128                    8: two (d, zero point)                  136    133

K-formats' 6-bit scales are 8 bits here, 2.8 % more bytes of q4_k: unpacking 6 bits out of 12 bytes takes ten operations
for each pair. As products of float16, rounded, they would take 11 % more bytes and be other values; as float32, 33 %.

On an H100 (14.5 bytes a clock for each multiprocessor, which starts 128 threads' instructions a clock) 4.5 bits a
weight leave five instructions for each. A mask, a conversion, a multiply-add and half of a rounding are 3.5, a product
with 16 rows 0.25; how many a compiled loop has is in bench/results/aot/loops.md. A scale for a code that a mask leaves
at bit p is d 2^-p, exactly.
"""

import triton
import triton.language as tl

from ..formats import EVERY

Q4_0, Q4_1, Q8_0, Q4_K, Q5_K, Q6_K, Q5_0, Q5_1, IQ4_NL, IQ4_XS, INT4, UINT4 = (
    tl.constexpr(f.number) for f in EVERY.values())
# By a format's number: bytes of a record of one output, and bits of a code.
BYTES, BITS = (tl.constexpr((0, *(getattr(f, of) for f in EVERY.values()))) for of in ("record", "bits"))
RECORD = tl.constexpr(256)
PIECE = tl.constexpr(32)


def bytes_per_weight(format: int) -> float:
    return BYTES.value[format] / RECORD.value


@triton.jit
def outputs_of(record_stride, FORMAT: tl.constexpr):
    """How many outputs a section has."""
    return tl.multiple_of(record_stride // BYTES[FORMAT], 16)


@triton.jit
def _tile(record, at: tl.constexpr, out, outputs, kind: tl.constexpr):
    """(32, N) words, halfwords or bytes of the section that begins at byte `at` of an output's record."""
    section = (record + at * outputs).to(tl.pointer_type(kind))
    return tl.load(section + (out * PIECE)[None, :] + tl.arange(0, PIECE)[:, None], (out < outputs)[None, :], 0)


@triton.jit
def _word(record, at: tl.constexpr, out, outputs):
    """(N,) of the scales' section."""
    return tl.load((record + at * outputs).to(tl.pointer_type(tl.uint32)) + out, out < outputs, 0)


@triton.jit
def _half(word, WHICH: tl.constexpr):
    return (word >> (16 * WHICH)).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _codes(record, P: tl.constexpr, out, outputs, FORMAT: tl.constexpr):
    """Words (32, N) that have the codes of piece P, among others."""
    if FORMAT == Q8_0:
        word = _tile(record, 128 * (P // 4), out, outputs, tl.uint32)
    else:
        word = _tile(record, 0, out, outputs, tl.uint32)
    if BITS[FORMAT] == 5:
        upper = _tile(record, 128, out, outputs, tl.uint8).to(tl.uint32)
        # Bits 0 to 3 become bit 4 of each byte.
        upper = (((upper >> (4 * (P % 2))) & 15) * 0x2040810) & 0x10101010
        word = ((word >> (4 * (P % 2))) & 0x0F0F0F0F) | upper
    if BITS[FORMAT] == 6:
        upper = _tile(record, 128, out, outputs, tl.uint16).to(tl.uint32)
        upper = ((upper >> (2 * (P % 2))) & 0x3030) | ((upper << (18 + 2 * (P % 2))) & 0x30300000)
        word = ((word >> (4 * (P % 2))) & 0x0F0F0F0F) | upper
    return word


@triton.jit
def _looked_up(code):
    """formats.LOOKUP[code], float32: a polynomial that is 0.07 to 0.93 above each of them, rounded down. Of selected
    bytes ptxas spills some."""
    x = code.to(tl.float32)
    y = tl.fma(tl.fma(x, 0.00158604, 0.0310864), x, -1.37193)
    return tl.floor(tl.fma(tl.fma(y, x, 24.1738), x, 1.933))


@triton.jit
def _scales(record, P: tl.constexpr, out, outputs, FORMAT: tl.constexpr):
    """d and m of piece P, (N,); of q6_k (2, N), for 16 k each."""
    if FORMAT == Q4_0:
        d = _half(_word(record, 128 + 4 * (P // 2), out, outputs), P % 2)
        m = d * -8.0
    if FORMAT == Q5_0:
        d = _half(_word(record, 160 + 4 * (P // 2), out, outputs), P % 2)
        m = d * -16.0
    if FORMAT == IQ4_NL:
        d = _half(_word(record, 128 + 4 * (P // 2), out, outputs), P % 2)
        m = d * -128.0
    if FORMAT == IQ4_XS:
        signed = _word(record, 132 + 4 * (P // 4), out, outputs).to(tl.int32, bitcast=True) << (24 - 8 * (P % 4)) >> 24
        d = _word(record, 128, out, outputs).to(tl.float32, bitcast=True) * signed.to(tl.float32)
        m = d * -128.0
    if FORMAT == Q4_1 or FORMAT == Q5_1:  # noqa: SIM109 (a kernel has no `in`)
        both = _word(record, (128 if FORMAT == Q4_1 else 160) + 4 * P, out, outputs)
        d, m = _half(both, 0), _half(both, 1)
    if FORMAT == Q8_0:
        d = _half(_word(record, 256 + 4 * (P // 2), out, outputs), P % 2)
        m = d * -128.0
    if FORMAT == Q4_K or FORMAT == Q5_K:  # noqa: SIM109
        AT: tl.constexpr = 128 if FORMAT == Q4_K else 160
        top = _word(record, AT, out, outputs)
        both = _word(record, AT + 4 + 4 * (P // 2), out, outputs) >> (16 * (P % 2))
        d = _half(top, 0) * (both & 255).to(tl.float32)
        m = _half(top, 1) * ((both >> 8) & 255).to(tl.float32)
    if FORMAT == Q6_K:
        section = (record + (196 + 4 * (P // 4)) * outputs).to(tl.pointer_type(tl.int32))
        four = tl.load(section + (tl.arange(0, 2) * 2 * outputs)[:, None] + out[None, :], (out < outputs)[None, :], 0)
        signed = (four << (24 - 8 * (P % 4))) >> 24
        d = _word(record, 192, out, outputs).to(tl.float32, bitcast=True)[None, :] * signed.to(tl.float32)
        m = d * -32.0
    if FORMAT == INT4:
        d = _half(_word(record, 128, out, outputs), P // 4)
        m = d * -8.0
    if FORMAT == UINT4:
        both = _word(record, 128 + 4 * (P // 4), out, outputs)
        d = _half(both, 0)
        m = -d * (both >> 16).to(tl.float32)
    return d, m


@triton.jit
def widened(record, P: tl.constexpr, out, outputs, FORMAT: tl.constexpr, kind: tl.constexpr):
    """Piece P of a record, (32, N) of type kind, for outputs `out`."""
    word = _codes(record, P, out, outputs, FORMAT)
    d, m = _scales(record, P, out, outputs, FORMAT)
    if FORMAT == Q8_0:
        codes = (word >> (8 * (P % 4))) & 255  # one instruction converts a byte
    elif FORMAT == IQ4_NL or FORMAT == IQ4_XS:  # noqa: SIM109
        codes = _looked_up((word >> (4 * P)) & 15)
    elif BITS[FORMAT] > 4:
        codes = word & (63 << (8 * (P // 2)))
        d *= 1.0 / (1 << (8 * (P // 2)))
    else:
        codes = word & (15 << (4 * P))
        d *= 1.0 / (1 << (4 * P))
    if FORMAT == Q6_K:
        halves = tl.reshape(codes.to(tl.float32), (2, PIECE // 2, out.shape[0]))
        elements = tl.reshape(tl.fma(halves, d[:, None, :], m[:, None, :]), (PIECE, out.shape[0]))
    else:
        elements = tl.fma(codes.to(tl.float32), d[None, :], m[None, :])
    return elements.to(kind)
