"""RMSNorm, alone or fused with the residual addition before it.

    rms_norm(x)         = x * rsqrt(mean(x^2) + eps) * weight
    add_rms_norm(x, r)  = rms_norm(h), r <- h,  with h = round(x + r)

Sums and products are float32. A result is rounded once, when it is stored. h is rounded to x's dtype before the
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

    Parameters
    ----------
    x : (..., H) float32, bfloat16 or float16
        Last dimension contiguous, rows at any one stride.
    weight : (H,) dtype of x
        Contiguous.
    eps : float
        Added to the mean of squares.
    out : (..., H) dtype of x, optional
        Written. It can be x itself.

    Returns
    -------
    out : (..., H) dtype of x

    Raises
    ------
    TypeError
        Wrong dtype.
    ValueError
        Wrong shape, layout or device.

    Notes
    -----
    Graph-safe. Source: Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4; reference/norm.py.

    Cost: `e * H * (2 * T + 1)` bytes. Launches on a GPU: 1.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels import rms_norm
    >>> rms_norm(torch.tensor([[2.0, -2.0]]), torch.tensor([1.0, 3.0]), eps=0.0).tolist()
    [[1.0, -3.0]]
    """
    check = _rms_norm_check
    out, rows, out_rows = _rows(check, x, weight, out)
    _rms_norm(rows, weight, check.number("eps", eps), out_rows)
    return out


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *,
                 out: torch.Tensor | None = None, residual_out: torch.Tensor | None = None,
                 ) -> tuple[torch.Tensor, torch.Tensor]:
    """Residual addition, then the root-mean-square norm of the sum.

    Parameters
    ----------
    x : (..., H) float32, bfloat16 or float16
        Last dimension contiguous, rows at any one stride.
    residual : (..., H) dtype of x
        Layout as for x. Overwritten with h = round(x + residual), unless residual_out is given.
    weight : (H,) dtype of x
        Contiguous.
    eps : float
        Added to the mean of squares.
    out : (..., H) dtype of x, optional
        Written: the normed rows. It can be x itself.
    residual_out : (..., H) dtype of x, optional
        Takes h in place of residual, which stays as it was. A layer's output then needs no copy to be among the
        drafter's aux hidden states.

    Returns
    -------
    out : (..., H) dtype of x
        rms_norm(h).
    residual : (..., H) dtype of x
        h: residual_out if it is given, otherwise residual.

    Raises
    ------
    TypeError
        Wrong dtype.
    ValueError
        Wrong shape, layout or device.

    Notes
    -----
    Graph-safe. Source: the draft and target layers of DFlash, arXiv 2602.06036, section 4; reference/norm.py.

    Cost: `e * H * (4 * T + 1)` bytes. Launches on a GPU: 1.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels import add_rms_norm
    >>> x, residual = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, -3.0]])
    >>> normed, hidden = add_rms_norm(x, residual, torch.ones(2), eps=0.0)
    >>> normed.tolist(), hidden.tolist(), hidden is residual
    ([[1.0, -1.0]], [[2.0, -2.0]], True)
    """
    check = _add_rms_norm_check
    out, rows, out_rows = _rows(check, x, weight, out)
    check.tensor("residual", residual, x.dtype, "(..., H)", tuple(x.shape), x.device)
    if residual_out is None:
        check.apart("residual", residual)
        check.other("out", out, "residual", residual)
    else:
        check.output("residual_out", residual_out, x, x.shape)
        check.other("out", out, "residual_out", residual_out)
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
