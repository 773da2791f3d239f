"""grouped_conv: itemsize * (2 T H + taps (T G + H)) bytes move for T rows of H elements and G groups; with the addition
and the norm, itemsize * (2 T H + H) more. The floor is that over the copy bandwidth, or the launch where rows are few.

A row's taps are read by other programs too, at about the same time, and come from the second-level cache. Alone, a
program has a row's tile of columns; with the norm it has the whole row, in registers from load to store. Rows over the
widest configuration take two launches.
Products of 16-bit numbers are exact in float32, so that a row's bits are the CPU's too.
Configurations are compiled without a GPU as tools/aot/launched.py launches them.
"""

import triton
import triton.language as tl

from ._math import PLAIN, inverse_rms, tree_sum
from .norm import add_rms_norm

COLUMNS, COLUMN_WARPS = 1024, 4  # of a program without the norm. Estimated.
CONFIGS = {1024: 4, 4096: 8, 8192: 16}  # with the norm: widest row: warps. Estimated: 8 to 16 elements a thread.
END, REFERENCE = tl.constexpr(0), tl.constexpr(1)  # roundings, by their numbers in the schemas


@triton.jit
def convolved(x, delta, base, row, at, inside, x_stride, delta_row, delta_tap, width, group, block, TAPS: tl.constexpr,
              ROUNDING: tl.constexpr):
    """The columns `at` of a row of the convolution, (1, BLOCK) of x's dtype."""
    place = row % block
    dtype: tl.constexpr = x.dtype.element_ty
    total = tl.zeros(at.shape, tl.float32)
    for tap in tl.static_range(TAPS):
        if place >= tap:
            earlier = tl.load(x + (row - tap) * x_stride + at, inside, 0.0).to(tl.float32)
            fixed = tl.load(base + tap * width + at, inside, 0.0).to(tl.float32)
            own = tl.load(delta + row * delta_row + tap * delta_tap + at // group, inside, 0.0).to(tl.float32)
            if ROUNDING == END:
                total = (total + fixed * earlier) + own * earlier
            elif ROUNDING == REFERENCE:
                total = (total + (fixed * earlier).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
                total = (total + own * earlier).to(dtype).to(tl.float32)
            else:
                coefficient = (fixed + own).to(dtype).to(tl.float32)
                total = (total + (coefficient * earlier).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    return total.to(dtype)


@triton.jit(do_not_specialize=["block"])
def conv_kernel(x, delta, base, out, x_stride, delta_row, delta_tap, out_stride, width, group, block,
                TAPS: tl.constexpr, ROUNDING: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    y = convolved(x, delta, base, row, at, at < width, x_stride, delta_row, delta_tap, width, group, block, TAPS,
                  ROUNDING)
    tl.store(out + row * out_stride + at, y, at < width)


@triton.jit(do_not_specialize=["block"])
def conv_norm_kernel(x, delta, base, residual, weight, out, residual_out, x_stride, delta_row, delta_tap,
                     residual_stride, out_stride, residual_out_stride, width, group, block, count, eps,
                     TAPS: tl.constexpr, ROUNDING: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)[None, :]
    inside = at < width
    y = convolved(x, delta, base, row, at, inside, x_stride, delta_row, delta_tap, width, group, block, TAPS,
                  ROUNDING).to(tl.float32)
    # The sum is rounded to the residual's dtype before it is normed.
    total = y + tl.load(residual + row * residual_stride + at, inside, 0.0).to(tl.float32)
    total = total.to(x.dtype.element_ty)
    tl.store(residual_out + row * residual_out_stride + at, total, inside)
    h = total.to(tl.float32)
    scale = inverse_rms(tree_sum(h * h), count, eps)
    normed = h * scale * tl.load(weight + at, inside, 0.0).to(tl.float32)
    tl.store(out + row * out_stride + at, normed.to(out.dtype.element_ty), inside)


def grouped_conv(x, delta, base, block, rounding, out):
    (rows, width), (_, taps, groups) = x.shape, delta.shape
    if not x.numel():
        return
    conv_kernel[rows, triton.cdiv(width, COLUMNS)](
        x, delta, base, out, x.stride(0), *delta.stride()[:2], out.stride(0), width, width // groups, block, TAPS=taps,
        ROUNDING=rounding, BLOCK=COLUMNS, num_warps=COLUMN_WARPS, **PLAIN)


def grouped_conv_add_rms_norm(x, delta, base, block, rounding, residual, weight, eps, out, residual_out):
    (rows, width), (_, taps, groups) = x.shape, delta.shape
    if not x.numel():
        return
    if width > max(CONFIGS):
        grouped_conv(x, delta, base, block, rounding, out)
        return add_rms_norm(out, residual, weight, eps, out, residual_out)
    widest = next(b for b in CONFIGS if width <= b)
    sums = residual if residual_out is None else residual_out
    conv_norm_kernel[rows,](
        x, delta, base, residual, weight, out, sums, x.stride(0), *delta.stride()[:2], residual.stride(0),
        out.stride(0), sums.stride(0), width, width // groups, block, float(width), eps, TAPS=taps, ROUNDING=rounding,
        BLOCK=widest, num_warps=CONFIGS[widest], **PLAIN)
