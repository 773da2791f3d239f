"""RMSNorm, alone and fused with the residual addition before it.

    rms_norm(x)         = x * rsqrt(mean(x^2) + eps) * weight
    add_rms_norm(x, r)  = rms_norm(h), r <- h,  with h = round(x + r)

Sums and products are float32, with one rounding when a result is stored; h is rounded to the model dtype before the
norm, as it is when the residual stream lives in memory. A row's bits depend on that row alone.
"""

import torch

from .. import reference
from .._library import define
from ._checks import Checker, describe

_rms_norm_check = Checker("rms_norm")
_add_rms_norm_check = Checker("add_rms_norm")


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *,
             out: torch.Tensor | None = None) -> torch.Tensor:
    """Root-mean-square norm over the last dimension.

    x (..., H): float32, bfloat16 or float16, last dimension contiguous, rows at any one stride.
    weight (H,): dtype of x, contiguous.
    eps: added to the mean of squares.
    out (..., H): written; may be x itself. Allocated when None.

    Returns out. Raises TypeError for a dtype, ValueError for a shape, layout or device. Graph-safe.
    Source: Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4; reference/norm.py.
    """
    check = _rms_norm_check
    out, rows, out_rows = _rows(check, x, weight, out)
    _rms_norm(rows, weight, check.number("eps", eps), out_rows)
    return out


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *,
                 out: torch.Tensor | None = None, residual_out: torch.Tensor | None = None,
                 ) -> tuple[torch.Tensor, torch.Tensor]:
    """h = round(x + residual); returns (rms_norm(h), h).

    x (..., H): float32, bfloat16 or float16, last dimension contiguous, rows at any one stride.
    residual (..., H): like x. Overwritten with h unless residual_out is given.
    weight (H,): dtype of x, contiguous.
    eps: added to the mean of squares.
    out (..., H): the normed rows; may be x itself. Allocated when None.
    residual_out (..., H): takes h in place of `residual`, which then stays as it was. With it a layer's output lands
        where a drafter's target features are collected, with no copy.

    Returns (out, where h was written). Raises TypeError for a dtype, ValueError for a shape, layout or device.
    Graph-safe. Source: reference/norm.py; DFlash draft and target layers (arXiv 2602.06036, section 4).
    """
    check = _add_rms_norm_check
    out, rows, out_rows = _rows(check, x, weight, out)
    check.tensor("residual", residual, x.dtype, "(..., H)", tuple(x.shape), x.device)
    if residual_out is None:
        check.apart("residual", residual)
    else:
        check.output("residual_out", residual_out, x, x.shape)
    _add_rms_norm(rows, check.as_rows("residual", residual), weight, check.number("eps", eps), out_rows,
                  None if residual_out is None else check.as_rows("residual_out", residual_out))
    return out, residual if residual_out is None else residual_out


def _rows(check, x, weight, out):
    check.floats("x", x, "(..., H)")
    if x.dim() < 1:
        raise ValueError(f"{check.op}: x must have shape (..., H); got {describe(x)}")
    check.contiguous("weight", weight, x.dtype, "(H,)", (x.shape[-1],), x.device)
    out = check.output("out", out, x, x.shape)
    return out, check.as_rows("x", x), check.as_rows("out", out)


_rms_norm = define("rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!) out) -> ()", reference.norm.rms_norm)
_add_rms_norm = define(
    "add_rms_norm(Tensor x, Tensor(a!) residual, Tensor weight, float eps, Tensor(b!) out, Tensor(c!)? residual_out)"
    " -> ()",
    reference.norm.add_rms_norm,
)
