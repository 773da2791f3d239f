"""silu_and_mul: 3 * rows * width * itemsize bytes move, and nothing else; the floor is that over the copy bandwidth.

About 25 instructions an output (an exponential and a division that round correctly), under the 50 that a multiprocessor
of an H100 can issue while six bytes of bfloat16 pass.
"""

import triton
import triton.language as tl

from ._aot import Case

# outputs a program takes: (BLOCK, warps). Estimated: 16-byte accesses, 4 elements a thread and more to keep in flight.
CONFIGS = {"narrow": (256, 2), "wide": (1024, 4)}


@triton.jit
def exp(x):
    """Within 2 units in the last place, which tl.exp is not for large arguments: x = n ln 2 + r, |r| <= ln 2 / 2."""
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = tl.fma(n, -0.693145751953125, x)
    r = tl.fma(n, -1.428606765330187e-06, r)
    # In two factors: 2^n alone overflows at n = 128 where the product would not.
    half = tl.floor(n * 0.5)
    return tl.exp2(r * 1.4426950408889634) * tl.exp2(half) * tl.exp2(n - half)


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
        block, warps = CONFIGS["narrow" if width <= 256 else "wide"]
        silu_and_mul_kernel[rows, triton.cdiv(width, block)](x, out, x.stride(0), out.stride(0), width, BLOCK=block,
                                                             num_warps=warps)


def cases():
    for shape, (block, warps) in CONFIGS.items():
        for dtype in ("fp32", "bf16", "fp16"):
            signature = {"x": "*" + dtype, "out": "*" + dtype, "x_stride": "i32:16", "out_stride": "i32:16",
                         "width": "i32:16", "BLOCK": "constexpr"}
            yield Case(f"silu_and_mul {shape} {dtype}", silu_and_mul_kernel, signature, {"BLOCK": block}, warps, 3)
