"""The gated activation of a SwiGLU MLP.

    silu_and_mul(x) = silu(x[..., :I]) * x[..., I:],   silu(g) = g / (1 + exp(-g))

Arithmetic is float32. A result is rounded once, when it is stored. A row's bits depend on that row alone.
"""

import torch

from .. import reference
from .._library import define
from ._checks import Checker, describe

_check = Checker("silu_and_mul")


def silu_and_mul(x: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """SiLU of the first half of each row, times the second half.

    Parameters
    ----------
    x : (..., 2I) float32, bfloat16 or float16
        Packed output of the gate-and-up projection. Last dimension contiguous, rows at any one stride.
    out : (..., I) dtype of x, optional
        Written. It can be x[..., :I] itself.

    Returns
    -------
    out : (..., I) dtype of x

    Raises
    ------
    TypeError
        Wrong dtype.
    ValueError
        Wrong shape, layout or device.

    Notes
    -----
    Graph-safe. Source: Shazeer 2020, arXiv 2002.05202, section 2; reference/activation.py.

    Cost: `3 * e * T * I` bytes. Launches on a GPU: 1.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels import silu_and_mul
    >>> silu_and_mul(torch.tensor([[0.0, 100.0, 5.0, 2.0]])).tolist()
    [[0.0, 200.0]]
    """
    _check.floats("x", x, "(..., 2I)")
    if x.dim() < 1 or x.shape[-1] % 2:
        raise ValueError(f"{_check.op}: x must have shape (..., 2I); got {describe(x)}")
    out = _check.output("out", out, x, (*x.shape[:-1], x.shape[-1] // 2))
    _silu_and_mul(_check.as_rows("x", x), _check.as_rows("out", out))
    return out


_silu_and_mul = define("silu_and_mul(Tensor x, Tensor(a!) out) -> ()", reference.activation.silu_and_mul)
