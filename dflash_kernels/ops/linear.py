"""Linear layers for few rows, as in decoding, drafting and verifying: the time is that of reading the weight.

    linear(x) = x W^T + bias,  float32 sums over k in one fixed order, one rounding at the end

    W in 8 bits is scales[:, None] * int8:  linear(x) = scales * (x int8^T) + bias, at half of the bytes

A row of the result has the same bits whatever other rows are computed beside it. That is what makes a verify pass of Q
rows agree bit for bit with Q passes of one row, which library GEMMs do not (they choose another kernel for another
number of rows).
"""

import torch

from .. import reference
from .._library import define
from .._memory import place
from ..types import PackedWeight
from ._checks import FLOATS, Checker, describe

_pack_weight_check = Checker("pack_weight")
_quantize_weight_check = Checker("quantize_weight")
_linear_check = Checker("linear")


def pack_weight(weight: torch.Tensor, scales: torch.Tensor | None = None) -> PackedWeight:
    """Lays a weight out in the order in which `linear` and `lm_head_argmax` read it. Do it once, when loading.

    weight (N, K): float32, bfloat16 or float16, or int8 with scales, any strides.
    scales (N,): float32, what each row of an int8 weight is multiplied by; see quantize_weight.

    Returns a PackedWeight with as many bytes. On a CPU it is a copy in blocks (N rounded up to 16, K to 32 for
    bfloat16 and int8), in huge pages that weights share, and the original can be freed. On CUDA rows stream as they
    are: it is the weight itself where that is contiguous, not a copy.
    Raises TypeError for a dtype, ValueError for a shape. Allocates: call it outside graphs.
    Graph-safe: no. Source: reference/linear.py, `pack`.
    """
    check = _pack_weight_check
    check.tensor("weight", weight, FLOATS if scales is None else torch.int8, "(N, K)", (None, None))
    if weight.numel() == 0:
        raise ValueError(f"{check.op}: weight must not be empty; got {describe(weight)}")
    if scales is not None:
        check.tensor("scales", scales, torch.float32, "(N,)", weight.shape[:1], weight.device)
        scales = _without_graph(scales).contiguous()
    weight = _without_graph(weight)
    data = weight.contiguous() if weight.device.type == "cuda" else place(reference.linear.pack(weight))
    return PackedWeight(data, *weight.shape, scales)


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in 8 bits, symmetric, with one scale a row, for pack_weight.

    weight (N, K): float32, bfloat16 or float16, finite, any strides. Left as it is.

    Returns (int8 (N, K), scales (N,) float32). A row's largest magnitude becomes 127, so each element is off by at most
    that magnitude / 254; a row of zeros has the scale 1. It is meant for drafters: what they draft may change, the text
    that the target accepts does not.
    Raises TypeError for a dtype, ValueError for a shape or a weight that is not finite. Allocates: call it outside
    graphs. Graph-safe: no. Source: reference/linear.py, `quantize`.
    """
    check = _quantize_weight_check
    check.tensor("weight", weight, FLOATS, "(N, K)", (None, None))
    if weight.numel() == 0 or weight.device.type != "meta" and not bool(weight.isfinite().all()):
        raise ValueError(f"{check.op}: weight must be finite and not empty; got {describe(weight)}")
    return reference.linear.quantize(_without_graph(weight))


def _without_graph(parameter: torch.Tensor) -> torch.Tensor:
    """What is made of it is for inference; a graph would keep the parameter alive."""
    return parameter.detach() if parameter.requires_grad else parameter


def linear(x: torch.Tensor, weight: torch.Tensor | PackedWeight, bias: torch.Tensor | None = None, *,
           out: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + bias, bit-identical per row whatever the number of rows.

    x (..., K): float32, bfloat16 or float16, last dimension contiguous, rows at any one stride.
    weight: a PackedWeight (fast), of x's dtype or in 8 bits, or (N, K) of x's dtype with a contiguous last dimension
        (packed on the fly: same bits, slower).
    bias (N,): dtype of x, contiguous, or None.
    out (..., N): written; must not overlap x. Allocated when None.

    Returns out. Raises TypeError for a dtype, ValueError for a shape, layout or device. Graph-safe.
    Source: reference/linear.py.
    """
    check = _linear_check
    data, scales, n = weight_of(check, x, weight, bias)
    out = check.output("out", out, x, (*x.shape[:-1], n))
    _linear(check.as_rows("x", x), data, scales, bias, n, check.as_rows("out", out))
    return out


def weight_of(check: Checker, x: torch.Tensor, weight: torch.Tensor | PackedWeight,
              bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """The weight's memory, its scales and its number of outputs, after checking x, weight and bias against each
    other."""
    scales = None
    check.floats("x", x, "(..., K)")
    if x.dim() < 1:
        raise ValueError(f"{check.op}: x must have shape (..., K); got {describe(x)}")
    if isinstance(weight, PackedWeight):
        data, scales, n, k = weight.data, weight.scales, weight.out_features, weight.in_features
        if scales is None and data.dtype != x.dtype:
            raise TypeError(f"{check.op}: weight must be {x.dtype}, as x is; got packed {data.dtype}")
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
    return data, scales, n


_linear = define(
    "linear(Tensor x, Tensor weight, Tensor? scales, Tensor? bias, int out_features, Tensor(a!) out) -> ()",
    reference.linear.linear)
