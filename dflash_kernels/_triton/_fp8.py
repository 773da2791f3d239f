"""float8_e4m3fn, which kernels see as its bytes (uint8), to and from the types that they compute in.

In integers, so that every backend stores the same byte: Triton refuses fp8e4nv below sm_89, and its interpreter (3.7)
reads 0x7f as 480, rounds 31.7 to 16 because the carry out of the mantissa is lost, and cuts subnormals off. Reading has
one answer for each byte, so NATIVE, the conversion that sm_89 and later have, differs in speed alone.
"""

import functools

import torch
import triton
import triton.language as tl


@triton.jit
def to_fp8(x):
    """float32 -> uint8: to nearest, ties to even; beyond 448, 448; NaN is 0x7f. As csrc/cpu/fp8.h."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    a = tl.minimum(magnitude, 0x43E00000)
    normal = ((a + 0x7FFFF + ((a >> 20) & 1)) >> 20) - 960
    # Added to 2^14, what is below the normal numbers is rounded to multiples of the smallest.
    small = (a.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(a < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)
    return tl.where(magnitude > 0x7F800000, 0x7F, code).to(tl.uint8)


@triton.jit
def of_fp8(x, kind: tl.constexpr, NATIVE: tl.constexpr):
    """uint8 -> kind, exactly. The bits stand for less in a type with a larger bias, by a power of two."""
    if NATIVE:
        wide = x.to(tl.float8e4nv, bitcast=True).to(kind)
    else:
        code = x.to(tl.int32)
        sign, magnitude = code & 0x80, code & 0x7F
        if kind == tl.float32:
            wide = ((sign << 24) | (magnitude << 20)).to(tl.float32, bitcast=True) * 1.329227995784916e36
        elif kind == tl.bfloat16:
            wide = ((sign << 24) | (magnitude << 20)).to(tl.float32, bitcast=True) * 1.329227995784916e36
            wide = wide.to(tl.bfloat16)
        else:
            wide = ((sign << 8) | (magnitude << 7)).to(tl.int16).to(tl.float16, bitcast=True) * 256.0
        wide = tl.where(magnitude == 0x7F, float("nan"), wide).to(kind)
    return wide


@triton.jit
def stored(x, scale, head, keep, SCALE: tl.constexpr):
    """Heads as an fp8 cache takes them. SCALE: 0 for none, 1 for one of the tensor, 2 for one of each head."""
    x = x.to(tl.float32)
    if SCALE > 0:
        x = tl.div_rn(x, tl.load(scale + head * (SCALE - 1), keep, 1.0))
    return to_fp8(x)


def as_bytes(cache: torch.Tensor) -> torch.Tensor:
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


def scale_kind(scale: torch.Tensor | None) -> int:
    """SCALE of `stored`."""
    return 0 if scale is None else 1 if scale.numel() == 1 else 2


@functools.cache
def native_fp8(device: torch.device) -> bool:
    """NATIVE of `of_fp8`."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
