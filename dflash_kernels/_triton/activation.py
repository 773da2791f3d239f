"""silu_and_mul: 3 * rows * width * itemsize bytes move, and nothing else; the floor is that over the copy bandwidth.

About 25 instructions an output (an exponential and a division that round correctly), under the 50 that a multiprocessor
of an H100 can issue while six bytes of bfloat16 pass.
Configurations are compiled without a GPU as tools/aot/launched.py launches them.
"""

import triton
import triton.language as tl

from ._math import PLAIN, exp

# widest row: (outputs a program takes, warps). Estimated: 16-byte accesses, two a thread in flight.
CONFIGS = {256: (256, 2), 1 << 62: (1024, 4)}


@triton.jit
def silu_and_mul_kernel(x, out, x_stride, out_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width
    gate = tl.load(x + row * x_stride + at, mask, 0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + width + at, mask, 0.0).to(tl.float32)
    # Beyond these bounds the exponential is 0 or infinite anyway, and infinity - infinity would be NaN.
    e = exp(tl.minimum(tl.maximum(-gate, -200.0), 200.0))
    tl.store(out + row * out_stride + at, (tl.div_rn(gate, 1.0 + e) * up).to(out.dtype.element_ty), mask)


def silu_and_mul(x, out):
    rows, width = out.shape
    if rows and width:
        block, warps = next(config for widest, config in CONFIGS.items() if width <= widest)
        silu_and_mul_kernel[rows, triton.cdiv(width, block)](x, out, x.stride(0), out.stride(0), width, BLOCK=block,
                                                             num_warps=warps, **PLAIN)
