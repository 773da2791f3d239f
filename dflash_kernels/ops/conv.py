"""DFlash2's convolution over a drafted block, alone or fused with the residual addition and RMSNorm that follow it.

    conv(x)[i, c] = sum over t < min(taps, i + 1) of (base[t, c] + delta[i, t, c // (H / G)]) * x[i - t, c]

Row i is a token of its own block: nothing comes from the block before it, nor from the context. Each tap has a fixed
coefficient for every channel, and one for every group of H / G channels that the row itself asks for. A projection of
the sublayer's normed input gives delta, for the convolution before the sublayer and for the one after it.

Published implementations round in three ways, which `rounding` names. A checkpoint is drafted best with the one that it
was trained with; the default is the most exact.

    "end"        sums are float32; the result is rounded once, when it is stored
    "reference"  as in the dflash package: base * x, its sum, and the sum with delta * x are each rounded to x's dtype
    "engine"     as in SGLang, and vLLM on a CPU: base + delta, its product with x, and each sum are rounded

A product of two bfloat16 or float16 numbers is exact in float32. In these dtypes every instruction set and every GPU
therefore gives the same bits.
"""

import torch

from .. import reference
from .._library import define
from ._checks import Checker, describe

ROUNDINGS = ("end", "reference", "engine")  # by their numbers in the schemas

_grouped_conv_check = Checker("grouped_conv")
_grouped_conv_add_rms_norm_check = Checker("grouped_conv_add_rms_norm")


def grouped_conv(x: torch.Tensor, delta: torch.Tensor, base: torch.Tensor, *, rounding: str = "end",
                 out: torch.Tensor | None = None) -> torch.Tensor:
    """Causal depthwise convolution inside each block, with coefficients that follow the row.

    Parameters
    ----------
    x : (B, Q, H) float32, bfloat16 or float16
        Blocks of any width Q. Last dimension contiguous, all rows at one stride.
    delta : (B, Q, t, G) dtype of x
        Coefficients of each row for t taps and G groups; G divides H. Tap 0 is the row itself. Last dimension
        contiguous, taps at any stride, all rows at one stride: one half of a projection's (B, Q, 2, t, G) fits.
    base : (t, H) dtype of x
        Coefficients of each channel. Contiguous.
    rounding : {"end", "reference", "engine"}
        Where values are rounded to x's dtype, as in ops/conv.py.
    out : (B, Q, H) dtype of x, optional
        Written. It must not overlap x.

    Returns
    -------
    out : (B, Q, H) dtype of x

    Raises
    ------
    TypeError
        Wrong dtype.
    ValueError
        Wrong shape, layout, device or rounding.

    Notes
    -----
    Graph-safe. Source: DFlash2DraftModel of the dflash package; reference/conv.py.

    Cost: `e * (2 * T * H + t * (T * G + H))` bytes. Launches on a GPU: 1.

    Replaces `dflash2_grouped_conv_impl` of vLLM and `DFlashGroupedConv._convolve` of SGLang.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels import grouped_conv
    >>> x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    >>> delta = torch.zeros(1, 2, 2, 1)
    >>> delta[0, 1, 1] = 10.0
    >>> grouped_conv(x, delta, torch.tensor([[1.0, 1.0], [0.0, 0.5]])).tolist()
    [[[1.0, 2.0], [13.0, 25.0]]]
    """
    check = _grouped_conv_check
    number = _check_conv(check, x, delta, base, rounding)
    out = check.output_beside("out", out, x, x.shape)
    _grouped_conv(check.as_rows("x", x), _delta_rows(check, delta), base, max(x.shape[1], 1), number,
                  check.as_rows("out", out))
    return out


def grouped_conv_add_rms_norm(x: torch.Tensor, delta: torch.Tensor, base: torch.Tensor, residual: torch.Tensor,
                              weight: torch.Tensor, eps: float = 1e-6, *, rounding: str = "end",
                              out: torch.Tensor | None = None, residual_out: torch.Tensor | None = None,
                              ) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolution, residual addition and root-mean-square norm, with the bits of `grouped_conv` and `add_rms_norm`.

    Parameters
    ----------
    x, delta, base, rounding
        As for `grouped_conv`.
    residual : (B, Q, H) dtype of x
        Layout as for x. Overwritten with h = round(grouped_conv(x) + residual), unless residual_out is given; it must
        not overlap x then.
    weight : (H,) dtype of x
        Contiguous.
    eps : float
        Added to the mean of squares.
    out : (B, Q, H) dtype of x, optional
        Written: the normed rows. It must not overlap x or the others.
    residual_out : (B, Q, H) dtype of x, optional
        Takes h in place of residual, which stays as it was.

    Returns
    -------
    out : (B, Q, H) dtype of x
        rms_norm(h).
    residual : (B, Q, H) dtype of x
        h: residual_out if it is given, otherwise residual.

    Raises
    ------
    TypeError
        Wrong dtype.
    ValueError
        Wrong shape, layout, device or rounding; x given as the tensor to be written.

    Notes
    -----
    Graph-safe. Source: DFlash2DraftModel of the dflash package; reference/conv.py.

    Cost: `e * (4 * T * H + H + t * (T * G + H))` bytes. Launches on a GPU: 1 or 2.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels import grouped_conv_add_rms_norm
    >>> x, residual = torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[1.0, -3.0]]])
    >>> delta, base = torch.zeros(1, 1, 1, 1), torch.ones(1, 2)
    >>> normed, hidden = grouped_conv_add_rms_norm(x, delta, base, residual, torch.ones(2), eps=0.0)
    >>> normed.tolist(), hidden.tolist(), hidden is residual
    ([[[1.0, -1.0]]], [[[2.0, -2.0]]], True)
    """
    check = _grouped_conv_add_rms_norm_check
    number = _check_conv(check, x, delta, base, rounding)
    check.tensor("residual", residual, x.dtype, "(B, Q, H)", tuple(x.shape), x.device)
    check.contiguous("weight", weight, x.dtype, "(H,)", (x.shape[2],), x.device)
    out = check.output_beside("out", out, x, x.shape)
    if residual_out is None:
        check.other("residual", residual, "x", x)
        check.apart("residual", residual)
        check.other("out", out, "residual", residual)
    else:
        check.output_beside("residual_out", residual_out, x, x.shape)
        check.other("out", out, "residual_out", residual_out)
    _grouped_conv_add_rms_norm(
        check.as_rows("x", x), _delta_rows(check, delta), base, max(x.shape[1], 1), number,
        check.as_rows("residual", residual), weight, check.number("eps", eps), check.as_rows("out", out),
        None if residual_out is None else check.as_rows("residual_out", residual_out))
    return out, residual if residual_out is None else residual_out


def _check_conv(check, x, delta, base, rounding):
    """The number of the rounding."""
    check.floats("x", x, "(B, Q, H)")
    if x.dim() != 3:
        raise ValueError(f"{check.op}: x must have shape (B, Q, H); got {describe(x)}")
    b, q, h = x.shape
    check.dense("delta", delta, x.dtype, "(B, Q, t, G)", (b, q, None, None), x.device)
    taps, groups = delta.shape[2:]
    if taps < 1 or groups < 1 or h % groups:
        raise ValueError(f"{check.op}: delta must have at least one tap, and groups that divide H = {h}; "
                         f"got {describe(delta)}")
    check.contiguous("base", base, x.dtype, "(t, H)", (taps, h), x.device)
    if not isinstance(rounding, str) or rounding not in ROUNDINGS:
        raise ValueError(f"{check.op}: rounding must be one of {', '.join(map(repr, ROUNDINGS))}; got {rounding!r}")
    return ROUNDINGS.index(rounding)


def _delta_rows(check, delta):
    """(B, Q, t, G) as (T, t, G) without a copy."""
    b, q, taps, groups = delta.shape
    if not delta.numel():
        return delta.new_empty((0, taps, groups))
    try:
        return delta.view(b * q, taps, groups)
    except RuntimeError:
        raise ValueError(f"{check.op}: delta must have all rows at one stride; got {describe(delta)} with strides "
                         f"{delta.stride()}") from None


_grouped_conv = define(
    "grouped_conv(Tensor x, Tensor delta, Tensor base, int block, int rounding, Tensor(a!) out) -> ()",
    reference.conv.grouped_conv,
)
_grouped_conv_add_rms_norm = define(
    "grouped_conv_add_rms_norm(Tensor x, Tensor delta, Tensor base, int block, int rounding, Tensor(a!) residual,"
    " Tensor weight, float eps, Tensor(b!) out, Tensor(c!)? residual_out) -> ()",
    reference.conv.grouped_conv_add_rms_norm,
)
