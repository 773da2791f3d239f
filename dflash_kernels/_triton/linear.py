"""linear: the weight streams through once; itemsize * (N K + rows (N + K)) bytes and 2 rows N K operations.

On an H100 (3.35 TB/s, some 600 TFLOP/s of 16-bit mma.sync) the bytes decide up to about 180 rows. Programs read their
rows of x again from the second-level cache, (ROWS * TILES + BLOCK_N) / BLOCK_N of the weight's bytes in all, which is
why more rows take more of the weight each. float32 has no tensor core that rounds as float32 does and runs on
multiply-adds: at its floor up to some 8 rows.

A row's bits do not depend on the rows beside it, because every configuration computes an output by the same additions:

- In 16 bits a tile has 16 or 32 rows, which every architecture runs as mma.sync.m16n8k16: a tile of 64 would become
  wgmma or tcgen05 on some. That instruction treats its 16 rows alike, and a tile's products are chained along k, 16 at
  a time, from one end to the other. In float32 an output is one chain of multiply-adds along k.
- K is cut into chunks of CHUNK, whatever N and the number of rows. A chunk starts from zero; chunks are added in order.
  So it is the same whether one program adds them or each has its own program and a second launch adds (`shared`), and
  lm_head_argmax, which never does, sees the bits that linear writes. Which of the two is faster is for `shared` to say.
- Rows and columns past the end are zeros in a tile of the same size.

A weight in 8 bits is half of the bytes. It becomes x's type in registers, exactly, and its scales multiply the sums.
One in blocks (_quant.py) becomes it too, 32 k at a time, and is added in the same order.
Configurations are compiled without a GPU as tools/aot/products.py launches them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..formats import EXACT
from ._chip import multiprocessors
from ._math import NO_SPILLS, PLAIN
from ._quant import IQ4_NL, IQ4_XS, PIECE, Q5_0, Q5_1, RECORD, bytes_per_weight, outputs_of, widened

CHUNK = 1024  # of K, per chain of additions; a multiple of every BLOCK_K


class Config(NamedTuple):
    """ROWS * TILES rows of x and BLOCK_N rows of the weight a program, BLOCK_K of both at a time. fill: programs on a
    multiprocessor that keep its memory busy."""

    ROWS: int
    TILES: int
    BLOCK_N: int
    BLOCK_K: int
    warps: int
    stages: int
    fill: int


# (bytes of an element, rows at most); more rows are more programs. All estimated: 60 to 96 KB in flight a block, which
# the smallest chips can hold, at most 128 sums a thread, and as many programs as sm_90 holds at once.
CONFIGS = {
    (2, 16): Config(16, 1, 64, 128, 4, 4, 3),
    (2, 32): Config(32, 1, 64, 128, 4, 4, 3),
    (2, 64): Config(32, 2, 64, 64, 4, 4, 2),
    (2, 128): Config(32, 4, 64, 64, 8, 3, 2),
    (4, 16): Config(16, 1, 32, 32, 4, 4, 8),
    (4, 64): Config(16, 4, 32, 32, 4, 4, 4),
}
# The same of weights in blocks, which are read by pieces. Several tiles of rows a program spill on some architectures,
# so more rows widen the weight more often. All estimated.
BLOCK_CONFIGS = {
    (2, 16): Config(16, 1, 64, 32, 4, 3, 3),
    (2, 32): Config(32, 1, 64, 32, 4, 3, 3),
    (4, 16): Config(16, 1, 32, 32, 4, 3, 2),
}


def configs(itemsize: int, format: int = 0) -> dict[int, Config]:
    """By the most rows, ascending."""
    return {rows: c for (width, rows), c in (BLOCK_CONFIGS if format else CONFIGS).items() if width == itemsize}


def config(rows: int, itemsize: int, format: int = 0) -> Config:
    found = configs(itemsize, format)
    return found[next((size for size in found if rows <= size), max(found))]


def options(c: Config, scales, format: int, head: bool = False) -> dict:
    """Two tiles, and a weight in 8 bits, are where ptxas spills if it may; with most blocks, if it may not; with some
    for one more block of threads on a multiprocessor than the three that 168 registers leave room for."""
    looked_up = format in (IQ4_NL.value, IQ4_XS.value)
    if looked_up and c.ROWS > 16:
        return NO_SPILLS if head else PLAIN
    if looked_up or format in (Q5_0.value, Q5_1.value):
        return PLAIN | {"maxnreg": 168}
    return PLAIN if format or scales is None and c.TILES != 2 else NO_SPILLS


@triton.jit
def rows_of(x, row0, at, rows, end, stride, ROWS: tl.constexpr):
    """Rows [row0, row0 + ROWS) of x at columns `at`; zeros past the last row and from column `end` on."""
    row = row0 + tl.arange(0, ROWS)
    mask = (row < rows)[:, None] & (at < end)[None, :]
    return tl.load(x + row.to(tl.int64)[:, None] * stride + at[None, :], mask, 0.0)


@triton.jit
def product(x, weight, row0, n0, begin, end, rows, n, x_stride, w_stride, ROWS: tl.constexpr, TILES: tl.constexpr,
            BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, FORMAT: tl.constexpr):
    """TILES (up to four) sums over k in [begin, end), each (ROWS, BLOCK_N) float32; begin is a multiple of CHUNK.
    FORMAT: 0, or the number of the weight's blocks, whose records are w_stride bytes apart."""
    # The finished chunks' sums of each tile, and the chunk's under way.
    zero = tl.zeros((ROWS, BLOCK_N), tl.float32)
    sum0, sum1, sum2, sum3 = zero, zero, zero, zero
    part0, part1, part2, part3 = zero, zero, zero, zero
    out = n0 + tl.arange(0, BLOCK_N)
    STEP: tl.constexpr = RECORD if FORMAT else BLOCK_K
    tl.static_assert(BLOCK_K == PIECE or not FORMAT)
    for k in range(begin, end, STEP):
        for i in tl.static_range(STEP // BLOCK_K):
            # BLOCK_K of the weight, once for all tiles; an int8 or a code of a block becomes x's type here.
            at = k + i * BLOCK_K + tl.arange(0, BLOCK_K)
            if FORMAT:
                record = weight + tl.cast(k // RECORD, tl.int64) * w_stride
                w = widened(record, i, out, outputs_of(w_stride, FORMAT), FORMAT, x.dtype.element_ty)
            else:
                w = tl.load(weight + out.to(tl.int64)[None, :] * w_stride + at[:, None],
                            (out < n)[None, :] & (at < end)[:, None], 0).to(x.dtype.element_ty)
            part0 = tl.dot(rows_of(x, row0, at, rows, end, x_stride, ROWS), w, part0, input_precision="ieee")
            if TILES > 1:
                part1 = tl.dot(rows_of(x, row0 + ROWS, at, rows, end, x_stride, ROWS), w, part1,
                               input_precision="ieee")
            if TILES > 2:
                part2 = tl.dot(rows_of(x, row0 + 2 * ROWS, at, rows, end, x_stride, ROWS), w, part2,
                               input_precision="ieee")
                part3 = tl.dot(rows_of(x, row0 + 3 * ROWS, at, rows, end, x_stride, ROWS), w, part3,
                               input_precision="ieee")
        # The end of a chunk: its sums are added, and the next one starts from zero.
        if (k + STEP) % CHUNK == 0:
            sum0, part0 = sum0 + part0, zero
            sum1, part1 = sum1 + part1, zero
            sum2, part2 = sum2 + part2, zero
            sum3, part3 = sum3 + part3, zero
    return sum0 + part0, sum1 + part1, sum2 + part2, sum3 + part3


@triton.jit
def _store(total, scales, bias, out, row0, n0, rows, n, out_stride, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    row, at = row0 + tl.arange(0, ROWS), n0 + tl.arange(0, BLOCK_N)
    # The epilogue: scales of an int8 weight, then the bias, in float32.
    if scales is not None:
        total *= tl.load(scales + at, at < n, 0.0)[None, :]
    if bias is not None:
        total += tl.load(bias + at, at < n, 0.0).to(tl.float32)[None, :]
    to = out + row.to(tl.int64)[:, None] * out_stride + at[None, :]
    tl.store(to, total.to(out.dtype.element_ty), (row < rows)[:, None] & (at < n)[None, :])


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(x, weight, scales, bias, out, rows, n, k, x_stride, w_stride, out_stride, chunk_stride, chunk_size,
                  ROWS: tl.constexpr, TILES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                  CHUNK: tl.constexpr, FORMAT: tl.constexpr):
    """chunk_size: of K for a program; all of it, or CHUNK, whose sums then lie chunk_stride apart in out."""
    row0, n0, chunk = tl.program_id(0) * ROWS * TILES, tl.program_id(1) * BLOCK_N, tl.program_id(2)
    begin = chunk * chunk_size
    out += chunk.to(tl.int64) * chunk_stride
    sum0, sum1, sum2, sum3 = product(x, weight, row0, n0, begin, tl.minimum(begin + chunk_size, k), rows, n, x_stride,
                                     w_stride, ROWS, TILES, BLOCK_N, BLOCK_K, CHUNK, FORMAT)
    _store(sum0, scales, bias, out, row0, n0, rows, n, out_stride, ROWS, BLOCK_N)
    if TILES > 1:
        _store(sum1, scales, bias, out, row0 + ROWS, n0, rows, n, out_stride, ROWS, BLOCK_N)
    if TILES > 2:
        _store(sum2, scales, bias, out, row0 + 2 * ROWS, n0, rows, n, out_stride, ROWS, BLOCK_N)
        _store(sum3, scales, bias, out, row0 + 3 * ROWS, n0, rows, n, out_stride, ROWS, BLOCK_N)


@triton.jit
def add_chunks_kernel(part, scales, bias, out, n, chunks, chunk_stride, out_stride, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # Chunks in order, as one program would add them.
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(chunks):
        total += tl.load(part + row * n + at, at < n, 0.0)
        part += chunk_stride
    if scales is not None:
        total *= tl.load(scales + at, at < n, 0.0)
    if bias is not None:
        total += tl.load(bias + at, at < n, 0.0).to(tl.float32)
    tl.store(out + row * out_stride + at, total.to(out.dtype.element_ty), at < n)


ADD_BLOCK, ADD_WARPS = 512, 4  # estimated: 16-byte accesses


SECOND_LAUNCH = 0.1  # of the time that the weight takes. Estimated: 2.5 us beside 8 to 64


def shared(rows: int, n: int, k: int, itemsize: int, weight_itemsize: float, device: torch.device,
           format: int = 0) -> int:
    """How many chunks of K have programs of their own, and their sums a second launch; 0 where a program does all.

    With too few programs to fill the chip the weight takes as many times longer. Shared out they are more, but each
    float32 sum is written and read: bytes that grow with the rows, while the weight's do not."""
    c, chunks = config(rows, itemsize, format), triton.cdiv(k, CHUNK)
    programs = triton.cdiv(rows, c.ROWS * c.TILES) * triton.cdiv(n, c.BLOCK_N)
    room, sums = c.fill * multiprocessors(device), 8 * rows * chunks / (weight_itemsize * k)
    apart = max(1.0, room / (programs * chunks)) + sums + SECOND_LAUNCH
    return chunks if apart < max(1.0, room / programs) else 0


def linear(x, weight, scales, format, bias, out_features, out):
    """Where K is shared out it allocates the chunks' float32 sums, as a graph may: they belong to its pool."""
    (rows, k), n, format = x.shape, out_features, format % EXACT
    if rows == 0:
        return
    c = config(rows, x.element_size(), format)
    width = bytes_per_weight(format) if format else weight.element_size()
    chunks = shared(rows, n, k, x.element_size(), width, x.device, format)
    split = chunks > 0
    # A multiple of 16 for any n and number of rows: what is none would be compiled anew.
    apart = triton.cdiv(rows * n, 16) * 16 if split else 0
    to = torch.empty(chunks * apart, dtype=torch.float32, device=x.device) if split else out
    linear_kernel[triton.cdiv(rows, c.ROWS * c.TILES), triton.cdiv(n, c.BLOCK_N), max(chunks, 1)](
        x, weight, None if split else scales, None if split else bias, to, rows, n, k, x.stride(0), weight.stride(0),
        n if split else out.stride(0), apart, CHUNK if split else k, c.ROWS, c.TILES, c.BLOCK_N, c.BLOCK_K, CHUNK,
        format, num_warps=c.warps, num_stages=c.stages, **options(c, scales, format))
    if split:
        add_chunks_kernel[rows, triton.cdiv(n, ADD_BLOCK)](to, scales, bias, out, n, chunks, apart, out.stride(0),
                                                           BLOCK=ADD_BLOCK, num_warps=ADD_WARPS, **PLAIN)
