"""Linear layers for few rows, as in decoding, drafting and verifying: the time is that of reading the weight.

    linear(x) = x W^T + bias,  float32 sums over k in one fixed order, one rounding at the end

A row of the result has the same bits whatever other rows are computed beside it. That is what makes a verify pass of Q
rows agree bit for bit with Q passes of one row, which library GEMMs do not (they choose another kernel for another
number of rows).
"""

import torch

from .. import reference
from .._library import define
from .._memory import place
from ..types import PackedWeight
from . import _checks as check


def pack_weight(weight: torch.Tensor) -> PackedWeight:
    """Lays a weight out in the order in which `linear` and `lm_head_argmax` read it. Do it once, when loading.

    weight (N, K): float32, bfloat16 or float16, any strides.

    Returns a PackedWeight with as many bytes. On a CPU it is a copy in blocks (N rounded up to 16, K to 32 for
    bfloat16), in huge pages that weights share, and the original can be freed. On CUDA rows stream as they are: it is
    the weight itself where that is contiguous, not a copy.
    Raises TypeError for a dtype, ValueError for a shape. Allocates: call it outside graphs.
    Graph-safe: no. Source: reference/linear.py, `pack`.
    """
    check.tensor("pack_weight", "weight", weight, check.FLOATS, "(N, K)", (None, None))
    if weight.numel() == 0:
        raise ValueError(f"pack_weight: weight must not be empty; got {check.describe(weight)}")
    if weight.device.type == "cuda":
        return PackedWeight(weight.contiguous(), *weight.shape)
    return PackedWeight(place(reference.linear.pack(weight)), *weight.shape)


def linear(x: torch.Tensor, weight: torch.Tensor | PackedWeight, bias: torch.Tensor | None = None, *,
           out: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + bias, bit-identical per row whatever the number of rows.

    x (..., K): float32, bfloat16 or float16, last dimension contiguous, rows at any one stride.
    weight: a PackedWeight (fast), or (N, K) with a contiguous last dimension (packed on the fly: same bits, slower).
        dtype of x.
    bias (N,): dtype of x, contiguous, or None.
    out (..., N): written; must not overlap x. Allocated when None.

    Returns out. Raises TypeError for a dtype, ValueError for a shape, layout or device. Graph-safe.
    Source: reference/linear.py.
    """
    op = "linear"
    data, n = weight_of(op, x, weight, bias)
    out = check.output(op, "out", out, x, (*x.shape[:-1], n))
    _linear(check.as_rows(op, "x", x), data, bias, n, check.as_rows(op, "out", out))
    return out


def weight_of(op: str, x: torch.Tensor, weight: torch.Tensor | PackedWeight,
              bias: torch.Tensor | None) -> tuple[torch.Tensor, int]:
    """The weight's memory and its number of outputs, after checking x, weight and bias against each other."""
    if not isinstance(x, torch.Tensor) or x.dtype not in check.FLOATS:
        raise TypeError(f"{op}: x must be float32, bfloat16 or float16 (..., K); got {check.describe(x)}")
    if x.dim() < 1:
        raise ValueError(f"{op}: x must have shape (..., K); got {check.describe(x)}")
    if isinstance(weight, PackedWeight):
        data, n, k = weight.data, weight.out_features, weight.in_features
        if data.dtype != x.dtype:
            raise TypeError(f"{op}: weight must be {x.dtype}, as x is; got packed {data.dtype}")
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
    return data, n


_linear = define(
    "linear(Tensor x, Tensor weight, Tensor? bias, int out_features, Tensor(a!) out) -> ()", reference.linear.linear)


def bytes(rows: int, n: int, k: int, itemsize: int) -> int:
    """Bytes that must move: the weight once, and the rows."""
    return itemsize * (n * k + rows * (n + k))


def flops(rows: int, n: int, k: int) -> int:
    return 2 * rows * n * k
