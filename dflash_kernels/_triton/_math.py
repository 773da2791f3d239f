"""Functions of numbers that several kernels use. libdevice has no interpreter, so they are written out.

Where a launch is PLAIN, the compiler may not fuse multiply-adds: where it may choose, the same row can get other bits
in another kernel, or at another alignment.
"""

import triton
import triton.language as tl

PLAIN = {"enable_fp_fusion": False}
NO_SPILLS = PLAIN | {"maxnreg": 255}  # left to itself, ptxas spills a few bytes for one more block; up to 8 warps


@triton.jit
def tree_sum(x):
    """(R, N) -> (R, 1), N a power of two: neighbours are added, then neighbours of those, and so on.

    The order of tl.sum follows the tile's layout, which follows the alignment of whatever pointer was loaded; a sum of
    two has one order only.
    """
    for _ in tl.static_range(16):
        if x.shape[1] > 1:
            x = tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)), axis=2)
    return x


@triton.jit
def inverse_rms(squares, count, eps):
    """1 / sqrt(sum of squares / count + eps), each operation rounded correctly, as on the CPU."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, count) + eps))


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
def tanh(x):
    """Within some 3e-7 of itself. Near zero 1 - exp(-2x) cancels, and a polynomial takes over."""
    magnitude = tl.abs(x)
    e = tl.exp2(magnitude * -2.8853900817779268)
    far = (1.0 - e) / (1.0 + e)
    square = x * x
    near = tl.fma(square, 0.021869488536155203, -0.05396825396825397)
    near = tl.fma(near, square, 0.13333333333333333)
    near = tl.fma(near, square, -0.3333333333333333)
    near = tl.fma(near * square, x, x)
    return tl.where(magnitude < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def order_key(value):
    """float32 -> int32 in the order of torch.argmax: NaN above everything, and both zeros equal."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(value != value, 0x7FFFFFFF, key)


@triton.jit
def of_order_key(key):
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)
