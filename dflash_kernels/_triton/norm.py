"""rms_norm and add_rms_norm: 2 and 4 * rows * width * itemsize bytes move, and the weight once; the floor is that over
the copy bandwidth, or the launch where rows are few.

A program has one row, in registers from load to store; rows over the widest configuration are read twice, the second
time from the cache. Which configuration runs depends on the width alone, so that a row's bits do too.
Configurations are compiled without a GPU as tools/aot/launched.py launches them.
"""

import triton
import triton.language as tl

from ._math import PLAIN, inverse_rms, tree_sum

CONFIGS = {1024: 4, 4096: 8, 8192: 16}  # widest row: warps. Estimated: 8 to 16 elements a thread.


@triton.jit
def norm_kernel(x, residual, weight, out, residual_out, x_stride, residual_stride, out_stride, residual_out_stride,
                width, count, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)[None, :]
    mask = at < width
    h = tl.load(x + row * x_stride + at, mask, 0.0).to(tl.float32)
    # The sum is rounded to the residual's dtype before it is normed.
    if ADD:
        total = h + tl.load(residual + row * residual_stride + at, mask, 0.0).to(tl.float32)
        total = total.to(x.dtype.element_ty)
        tl.store(residual_out + row * residual_out_stride + at, total, mask)
        h = total.to(tl.float32)
    scale = inverse_rms(tree_sum(h * h), count, eps)
    y = h * scale * tl.load(weight + at, mask, 0.0).to(tl.float32)
    tl.store(out + row * out_stride + at, y.to(out.dtype.element_ty), mask)


@triton.jit
def wide_norm_kernel(x, residual, weight, out, residual_out, x_stride, residual_stride, out_stride,
                     residual_out_stride, width, count, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    again = x + row * x_stride  # where the second pass finds h
    if ADD:
        again = residual_out + row * residual_out_stride
    # First pass: the sum, and its squares by lane.
    squares = tl.zeros((1, BLOCK), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        mask = at < width
        h = tl.load(x + row * x_stride + at, mask, 0.0).to(tl.float32)
        if ADD:
            total = h + tl.load(residual + row * residual_stride + at, mask, 0.0).to(tl.float32)
            total = total.to(x.dtype.element_ty)
            tl.store(again + at, total, mask)
            h = total.to(tl.float32)
        squares += h * h
    scale = inverse_rms(tree_sum(squares), count, eps)
    if ADD:
        tl.debug_barrier()  # a sum may be read back by another thread than wrote it
    # Second pass: the row again, out of the cache.
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        mask = at < width
        h = tl.load(again + at, mask, 0.0).to(tl.float32)
        y = h * scale * tl.load(weight + at, mask, 0.0).to(tl.float32)
        tl.store(out + row * out_stride + at, y.to(out.dtype.element_ty), mask)


def _config(width: int):
    """Kernel, block, warps."""
    widest = max(CONFIGS)
    block = next((b for b in CONFIGS if width <= b), widest)
    return (wide_norm_kernel if width > widest else norm_kernel), block, CONFIGS[block]


def _launch(x, residual, weight, eps, out, residual_out, add):
    rows, width = x.shape
    if not x.numel():
        return
    kernel, block, warps = _config(width)
    kernel[rows,](x, residual, weight, out, residual_out, x.stride(0), residual.stride(0), out.stride(0),
                  residual_out.stride(0), width, float(width), eps, ADD=add, BLOCK=block, num_warps=warps,
                  **PLAIN)


def rms_norm(x, weight, eps, out):
    _launch(x, x, weight, eps, out, out, False)


def add_rms_norm(x, residual, weight, eps, out, residual_out):
    _launch(x, residual, weight, eps, out, residual if residual_out is None else residual_out, True)
