"""Linear layers for few rows, as in decoding, drafting and verifying. Reading the weight takes most of the time.

    linear(x) = x W^T + bias                               float32 sums over k in one fixed order, one rounding
    linear(x) = scales * (x int8^T) + bias                 W in 8 bits: W = scales[:, None] * int8, half of the bytes
    linear(x) = sum over pieces of 32 k of 2^e (d q + m) xq + bias         W in blocks, on a CPU: integer dot products
    linear(x) = x (d q + m)^T + bias                       W in blocks, exact or on a GPU: d q + m in x's dtype

A row of the result has the same bits however many rows are computed with it. So a verify pass of Q rows agrees bit for
bit with Q passes of one row. Library GEMMs do not promise this, because they choose another kernel for another number
of rows.

Beside a weight in blocks, on a CPU, a row of x is rounded to int8, 32 elements at a time, with a power of two as their
scale: the smallest that leaves the largest magnitude below 127.5. `exact` weights become elements of x's dtype instead,
on a GPU in registers, and rows of x are not rounded.
"""

import torch

from .. import reference
from .._library import define
from .._memory import place
from ..formats import EVERY
from ..limits import check_format, check_packed_dtype
from ..storage import PackedWeight
from ._checks import FLOATS, Checker, describe

_pack_weight_check = Checker("pack_weight")
_quantize_weight_check = Checker("quantize_weight")
_quantize_blocks_check = Checker("quantize_blocks")
_linear_check = Checker("linear")


def pack_weight(weight: torch.Tensor, scales: torch.Tensor | None = None, *, format: str | None = None,
                exact: bool = False) -> PackedWeight:
    """Lays out a weight once, when it is loaded, in the order in which `linear` and the LM heads read it.

    Parameters
    ----------
    weight : (N, K) float32, bfloat16 or float16, or int8 with scales, or (N, bytes of a row) uint8 with a format
        Any strides.
    scales : (N,) float32, optional
        Factor of each row of an int8 weight, as `quantize_weight` returns it.
    format : str, optional
        Of a weight whose rows are blocks. As GGUF files have them: "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k",
        "q5_k", "q6_k", "iq4_nl" or "iq4_xs". As `awq_blocks` and `gptq_blocks` make them, on a GPU only: "int4_g128" or
        "uint4_g128".
    exact : bool
        Of blocks on a CPU: whether a product has the bits of one with the elements that they stand for, rounded to x's
        dtype. False: rows of x are rounded to int8, which is faster. On a GPU blocks always become elements, and
        packed.exact is True.

    Returns
    -------
    packed : PackedWeight
        On a CPU it is a copy in blocks, in huge pages that weights share, and the original can be freed. N is rounded
        up to 16, and K to 32 for bfloat16 and int8. Blocks keep the file's bytes, to within 3 %.
        On CUDA rows stream as they are: a contiguous weight is not copied. Blocks are copied in another order there,
        with K rounded up to 256, in the file's bytes to within 3 %.

    Raises
    ------
    TypeError
        Wrong dtype.
    ValueError
        Wrong shape, an unknown format, or an empty weight.
    NotImplementedError
        int4_g128 or uint4_g128 elsewhere than on a GPU.

    Notes
    -----
    Not graph-safe: it allocates. Source: functions pack of reference/linear.py, quant.py and quant_gpu.py.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels import linear, pack_weight
    >>> packed = pack_weight(torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
    >>> linear(torch.tensor([[1.0, 2.0]]), packed).tolist()
    [[11.0, 17.0]]
    """
    check = _pack_weight_check
    if format is not None:
        return _pack_blocks(check, weight, scales, format, exact)
    if exact is not False:
        raise ValueError(f"{check.op}: exact must be False for a weight without a format; got {exact!r}")
    if scales is None and isinstance(weight, torch.Tensor) and weight.dtype == torch.int8:
        raise TypeError(f"{check.op}: scales must be given for an int8 weight; got None")
    check.tensor("weight", weight, FLOATS if scales is None else torch.int8, "(N, K)", (None, None))
    if weight.numel() == 0:
        raise ValueError(f"{check.op}: weight must not be empty; got {describe(weight)}")
    if scales is not None:
        check.tensor("scales", scales, torch.float32, "(N,)", weight.shape[:1], weight.device)
        scales = _without_graph(scales).contiguous()
    weight = _without_graph(weight)
    data = weight.contiguous() if weight.device.type == "cuda" else place(reference.linear.pack(weight))
    return PackedWeight(data, weight.shape[0], weight.shape[1], scales)


def _pack_blocks(check: Checker, weight: torch.Tensor, scales: torch.Tensor | None, format: str,
                 exact: bool) -> PackedWeight:
    if scales is not None:
        raise ValueError(f"{check.op}: scales must be None for blocks, which have their own; got {describe(scales)}")
    check_format(check.op, format, weight.device.type if isinstance(weight, torch.Tensor) else None)
    check.tensor("weight", weight, torch.uint8, "(N, bytes of a row)", (None, None))
    f, (n, nbytes) = EVERY[format], weight.shape
    if n == 0 or nbytes == 0 or nbytes % f.bytes:
        raise ValueError(f"{check.op}: weight must have rows of whole blocks of {f.bytes} bytes, as {format} has; got "
                         f"{describe(weight)}")
    if not isinstance(exact, bool):
        raise TypeError(f"{check.op}: exact must be a bool; got {exact!r}")
    on_gpu = weight.device.type == "cuda"
    data = reference.quant_gpu.pack(weight, format) if on_gpu else place(reference.quant.pack(weight, format))
    return PackedWeight(data, n, nbytes // f.bytes * f.block, format=format, exact=exact or on_gpu)


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
    check = _quantize_weight_check
    check.tensor("weight", weight, FLOATS, "(N, K)", (None, None))
    if weight.numel() == 0 or weight.device.type != "meta" and not bool(weight.isfinite().all()):
        raise ValueError(f"{check.op}: weight must be finite and not empty; got {describe(weight)}")
    return reference.linear.quantize(_without_graph(weight))


def quantize_blocks(weight: torch.Tensor, format: str) -> torch.Tensor:
    """Rounds a weight to blocks of 32 with one scale each, as llama.cpp does.

    Parameters
    ----------
    weight : (N, K) float32, bfloat16 or float16
        Finite, any strides, K a multiple of 32. Scales are float16: at most 65,504 * 127 (q8_0) or * 8 (q4_0).
    format : {"q8_0", "q4_0"}
        8 bits, or 4.

    Returns
    -------
    rows : (N, bytes of a row) uint8
        For `pack_weight`, with this format.

    Raises
    ------
    TypeError
        Wrong dtype.
    ValueError
        Wrong shape, an unknown format, or a weight that is empty or not finite.

    Notes
    -----
    Beside such a weight the rows of a product on a CPU are rounded to int8, which is faster than `quantize_weight` from
    some four rows on. Not graph-safe: it allocates. Source: reference/quant.py, function quantize.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels import pack_weight, quantize_blocks
    >>> rows = quantize_blocks(torch.arange(64.0).view(2, 32) / 64, "q8_0")
    >>> rows.shape, pack_weight(rows, format="q8_0").shape
    (torch.Size([2, 34]), (2, 32))
    """
    check = _quantize_blocks_check
    check.tensor("weight", weight, FLOATS, "(N, K)", (None, None))
    if format not in ("q8_0", "q4_0"):
        raise ValueError(f"{check.op}: format must be q8_0 or q4_0; got {format!r}")
    if weight.numel() == 0 or weight.shape[1] % 32:
        raise ValueError(f"{check.op}: weight must have K, a multiple of 32, columns; got {describe(weight)}")
    largest = torch.finfo(torch.float16).max * (127 if format == "q8_0" else 8)
    if weight.device.type != "meta" and not bool(weight.abs().amax().float() <= largest):  # nor NaN
        raise ValueError(f"{check.op}: weight must be finite, and at most {largest:,.0f}, for scales in float16; got "
                         f"{describe(weight)}")
    return reference.quant.quantize(_without_graph(weight), format)


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
        A PackedWeight has x's dtype, 8 bits or blocks. A tensor needs a contiguous last dimension and is packed in each
        call: the same bits, slower.
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

    Cost: `w * N * K + e * T * (N + K)` bytes; a second launch adds `8 * T * N * ceil(K / 1024)`. Launches on a
    GPU: 1; 2 for few rows.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels import linear
    >>> weight = torch.tensor([[3.0, 4.0], [5.0, 6.0]])
    >>> linear(torch.tensor([[1.0, 2.0]]), weight, torch.tensor([0.5, 0.0])).tolist()
    [[11.5, 17.0]]
    """
    check = _linear_check
    data, scales, number, n = weight_of(check, x, weight, bias)
    out = check.output_beside("out", out, x, (*x.shape[:-1], n))
    _linear(check.as_rows("x", x), data, scales, number, bias, n, check.as_rows("out", out))
    return out


def weight_of(check: Checker, x: torch.Tensor, weight: torch.Tensor | PackedWeight,
              bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None, int, int]:
    """The weight's memory, its scales, its format's number and its number of outputs, after checking x, weight and bias
    against each other."""
    scales, number = None, 0
    check.floats("x", x, "(..., K)")
    if x.dim() < 1:
        raise ValueError(f"{check.op}: x must have shape (..., K); got {describe(x)}")
    if isinstance(weight, PackedWeight):
        data, scales, n, k = weight.data, weight.scales, weight.out_features, weight.in_features
        number = weight.format_number
        if scales is None and not number:
            check_packed_dtype(check.op, x.dtype, data.dtype)
        if k != x.shape[-1]:
            raise ValueError(f"{check.op}: x must have {k} = weight's K columns; got {describe(x)}")
        if data.device != x.device:
            raise ValueError(f"{check.op}: weight must be on {x.device}; got {data.device}")
    else:
        data = check.dense("weight", weight, x.dtype, "(N, K)", (None, x.shape[-1]), x.device)
        n = data.shape[0]
        if n > 1 and data.stride(0) == 0:
            raise ValueError(f"{check.op}: weight must not be an expanded view; got strides {data.stride()}")
        if data.numel() == 0:
            raise ValueError(f"{check.op}: weight must not be empty; got {describe(data)}")
    if bias is not None:
        check.contiguous("bias", bias, x.dtype, "(N,)", (n,), x.device)
    return data, scales, number, n


_linear = define(
    "linear(Tensor x, Tensor weight, Tensor? scales, int format, Tensor? bias, int out_features, Tensor(a!) out) -> ()",
    reference.linear.linear)
