"""Functions of numbers that several kernels use. libdevice has no interpreter, so they are written out."""

import triton
import triton.language as tl


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
