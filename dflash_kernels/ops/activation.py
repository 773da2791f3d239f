"""The gated activation of a SwiGLU MLP.

    silu_and_mul(x) = silu(x[..., :I]) * x[..., I:],   silu(g) = g / (1 + exp(-g))

Float32 inside, one rounding when the result is stored. A row's bits depend on that row alone.
"""

import torch

from .. import reference
from .._library import define
from ._checks import Checker, describe

_check = Checker("silu_and_mul")


def silu_and_mul(x: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """silu(x[..., :I]) * x[..., I:], for the packed output of a gate-and-up projection.

    x (..., 2I): float32, bfloat16 or float16, last dimension contiguous, rows at any one stride.
    out (..., I): written; may be x[..., :I] itself. Allocated when None.

    Returns out. Raises TypeError for a dtype, ValueError for a shape, layout or device. Graph-safe.
    Source: Shazeer 2020, arXiv 2002.05202, section 2; reference/activation.py.
    """
    _check.floats("x", x, "(..., 2I)")
    if x.dim() < 1 or x.shape[-1] % 2:
        raise ValueError(f"{_check.op}: x must have shape (..., 2I); got {describe(x)}")
    out = _check.output("out", out, x, (*x.shape[:-1], x.shape[-1] // 2))
    _silu_and_mul(_check.as_rows("x", x), _check.as_rows("out", out))
    return out


_silu_and_mul = define("silu_and_mul(Tensor x, Tensor(a!) out) -> ()", reference.activation.silu_and_mul)
