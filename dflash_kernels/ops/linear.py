"""Linear layers for few rows, as in decoding, drafting and verifying. Reading the weight takes most of the time.

    linear(x) = x W^T + bias                               float32 sums over k in one fixed order, one rounding
    linear(x) = scales * (x int8^T) + bias                 W in 8 bits: W = scales[:, None] * int8, half of the bytes

A row of the result has the same bits however many rows are computed with it. So a verify pass of Q rows agrees bit for
bit with Q passes of one row. Library GEMMs do not promise this, because they choose another kernel for another number
of rows.
"""

import torch

from .. import reference
from .._library import define
from .._memory import place
from ..limits import check_packed_dtype
from ..types import PackedWeight
from . import _checks as check


def pack_weight(weight: torch.Tensor, scales: torch.Tensor | None = None) -> PackedWeight:
    """Lays out a weight once, when it is loaded, in the order in which `linear` and the LM heads read it.

    Parameters
    ----------
    weight : (N, K) float32, bfloat16 or float16, or int8 with scales
        Any strides.
    scales : (N,) float32, optional
        Factor of each row of an int8 weight, as `quantize_weight` returns it.

    Returns
    -------
    packed : PackedWeight
        On a CPU it is a copy in blocks, in huge pages that weights share, and the original can be freed. N is rounded
        up to 16, and K to 32 for bfloat16 and int8. On CUDA rows stream as they are: a contiguous weight is not copied.

    Raises
    ------
    TypeError
        Wrong dtype.
    ValueError
        Wrong shape, or an empty weight.

    Notes
    -----
    Not graph-safe: it allocates. Source: reference/linear.py, function pack.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels import linear, pack_weight
    >>> packed = pack_weight(torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
    >>> linear(torch.tensor([[1.0, 2.0]]), packed).tolist()
    [[11.0, 17.0]]
    """
    op = "pack_weight"
    check.tensor(op, "weight", weight, check.FLOATS if scales is None else torch.int8, "(N, K)", (None, None))
    if weight.numel() == 0:
        raise ValueError(f"{op}: weight must not be empty; got {check.describe(weight)}")
    if scales is not None:
        check.tensor(op, "scales", scales, torch.float32, "(N,)", weight.shape[:1], weight.device)
        scales = _without_graph(scales).contiguous()
    weight = _without_graph(weight)
    data = weight.contiguous() if weight.device.type == "cuda" else place(reference.linear.pack(weight))
    return PackedWeight(data, weight.shape[0], weight.shape[1], scales)


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds a weight to 8 bits, symmetric, with one scale per row.

    Parameters
    ----------
    weight : (N, K) float32, bfloat16 or float16
        Finite, any strides.

    Returns
    -------
    quantized : (N, K) int8
        A row's largest magnitude becomes 127, so an element is off by at most that magnitude / 254.
    scales : (N,) float32
        For `pack_weight`. A row of zeros has scale 1.

    Raises
    ------
    TypeError
        Wrong dtype.
    ValueError
        Wrong shape, or a weight that is empty or not finite.

    Notes
    -----
    Meant for drafters: rounding can change the drafts, but not the text that the target accepts. Not graph-safe: it
    allocates. Source: reference/linear.py, function quantize.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels import pack_weight, quantize_weight
    >>> quantized, scales = quantize_weight(torch.tensor([[254.0, -128.0], [0.0, 0.0]]))
    >>> quantized.tolist(), scales.tolist()
    ([[127, -64], [0, 0]], [2.0, 1.0])
    >>> pack_weight(quantized, scales).dtype
    torch.int8
    """
    op = "quantize_weight"
    check.tensor(op, "weight", weight, check.FLOATS, "(N, K)", (None, None))
    if weight.numel() == 0 or weight.device.type != "meta" and not bool(weight.isfinite().all()):
        raise ValueError(f"{op}: weight must be finite and not empty; got {check.describe(weight)}")
    return reference.linear.quantize(_without_graph(weight))


def _without_graph(parameter: torch.Tensor) -> torch.Tensor:
    """What is made of it is for inference; a graph would keep the parameter alive."""
    return parameter.detach() if parameter.requires_grad else parameter


def linear(x: torch.Tensor, weight: torch.Tensor | PackedWeight, bias: torch.Tensor | None = None, *,
           out: torch.Tensor | None = None) -> torch.Tensor:
    """Product with a weight, plus a bias.

    Parameters
    ----------
    x : (..., K) float32, bfloat16 or float16
        Last dimension contiguous, rows at any one stride.
    weight : PackedWeight, or (N, K) dtype of x
        A PackedWeight has x's dtype or 8 bits. A tensor needs a contiguous last dimension and is packed in each call:
        the same bits, slower.
    bias : (N,) dtype of x, optional
        Contiguous.
    out : (..., N) dtype of x, optional
        Written. It must not overlap x.

    Returns
    -------
    out : (..., N) dtype of x

    Raises
    ------
    TypeError
        Wrong dtype.
    ValueError
        Wrong shape, layout or device.

    Notes
    -----
    Graph-safe. Source: reference/linear.py.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels import linear
    >>> weight = torch.tensor([[3.0, 4.0], [5.0, 6.0]])
    >>> linear(torch.tensor([[1.0, 2.0]]), weight, torch.tensor([0.5, 0.0])).tolist()
    [[11.5, 17.0]]
    """
    op = "linear"
    data, scales, n = weight_of(op, x, weight, bias)
    out = check.output(op, "out", out, x, (*x.shape[:-1], n))
    _linear(check.as_rows(op, "x", x), data, scales, bias, n, check.as_rows(op, "out", out))
    return out


def weight_of(op: str, x: torch.Tensor, weight: torch.Tensor | PackedWeight,
              bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """The weight's memory, its scales and its number of outputs, after checking x, weight and bias against each
    other."""
    scales = None
    if not isinstance(x, torch.Tensor) or x.dtype not in check.FLOATS:
        raise TypeError(f"{op}: x must be float32, bfloat16 or float16 (..., K); got {check.describe(x)}")
    if x.dim() < 1:
        raise ValueError(f"{op}: x must have shape (..., K); got {check.describe(x)}")
    if isinstance(weight, PackedWeight):
        data, scales, n, k = weight.data, weight.scales, weight.out_features, weight.in_features
        if scales is None:
            check_packed_dtype(op, x.dtype, data.dtype)
        if k != x.shape[-1]:
            raise ValueError(f"{op}: x must have {k} = weight's K columns; got {check.describe(x)}")
        if data.device != x.device:
            raise ValueError(f"{op}: weight must be on {x.device}; got {data.device}")
    else:
        data = check.tensor(op, "weight", weight, x.dtype, "(N, K)", (None, x.shape[-1]), x.device)
        check.dense_last(op, "weight", data)
        n = data.shape[0]
        if n > 1 and data.stride(0) == 0:
            raise ValueError(f"{op}: weight must not be an expanded view; got strides {data.stride()}")
        if data.numel() == 0:
            raise ValueError(f"{op}: weight must not be empty; got {check.describe(data)}")
    if bias is not None:
        check.contiguous(op, "bias", check.tensor(op, "bias", bias, x.dtype, "(N,)", (n,), x.device))
    return data, scales, n


_linear = define(
    "linear(Tensor x, Tensor weight, Tensor? scales, Tensor? bias, int out_features, Tensor(a!) out) -> ()",
    reference.linear.linear)


def bytes(rows: int, n: int, k: int, itemsize: int, weight_itemsize: int | None = None, chunks: int = 0) -> int:
    """Bytes that move: the weight once, and the rows. weight_itemsize: bytes of the weight's elements, if they are
    others. chunks: of K whose float32 sums go through memory, written and read (_triton/linear.py, `shared`)."""
    return (weight_itemsize or itemsize) * n * k + itemsize * rows * (n + k) + 8 * chunks * rows * n


def flops(rows: int, n: int, k: int) -> int:
    return 2 * rows * n * k
