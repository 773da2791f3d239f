"""The MLPs of a mixture of experts: each row through the experts that its router chose, and their weighted sum.

    hidden = act(x gate_up[e]^T + gate_up_bias[e])                  float32 sums, rounded once to x's dtype
    out = sum over slots s of weights[s] * (hidden down[e]^T + down_bias[e]),   e = ids[s]
                                                                    float32, slot 0 first, rounded once

    act "silu":      silu(gate) * up
    act "clamped":   gate = min(gate, 7), up = clamp(up, -7, 7);  gate * sigmoid(1.702 * gate) * (up + 1)

The weights of each chosen expert are read once for all rows that chose it, and those of the others are not read. A
row's bits depend on that row alone: not on the rows beside it, their number or the experts that those chose.

Experts and columns can be shared out over ranks. A rank with experts [first_expert, first_expert + E) leaves out all
others, and one with some of the I columns of every expert has these columns' part of `down`. Either way its result is
a part of the sum, which an all-reduce completes; down_bias then belongs to one rank with columns.
"""

from collections.abc import Sequence

import torch

from .. import reference
from .._library import define
from .._memory import room
from ..limits import check_packed_dtype
from ..storage import PackedExperts
from ._checks import FLOATS, Checker, describe, values_checked

_pack_check, _check = Checker("pack_experts"), Checker("expert_mlp")
ACTIVATIONS = {"silu": 0, "clamped": 1}


def pack_experts(weights: torch.Tensor | Sequence[torch.Tensor], scales: torch.Tensor | None = None) -> PackedExperts:
    """Lays out the weights of a layer's experts once, when they are loaded, in the order in which `expert_mlp` reads.

    Parameters
    ----------
    weights : (E, N, K), or a sequence of E tensors (N, K), float32, bfloat16 or float16, or int8 with scales
        Any strides. A sequence is read one expert after another and may load each when it is asked for it.
    scales : (E, N) float32, optional
        Factor of each row of int8 weights, as `quantize_weight` returns it.

    Returns
    -------
    packed : PackedExperts
        On a CPU a copy in blocks, in huge pages, and the originals can be freed. N is rounded up to 16, and K to 32 for
        bfloat16 and int8. On CUDA a contiguous (E, N, K) is not copied.

    Raises
    ------
    TypeError
        Wrong dtype.
    ValueError
        Wrong shape or device, experts that differ, or none.

    Notes
    -----
    Not graph-safe: it allocates. Source: reference/linear.py, function pack.

    Examples
    --------
    Gate and up in one weight, from a checkpoint that has them apart:

    >>> import torch
    >>> from dflash_kernels import pack_experts
    >>> gate, up = torch.randn(4, 32, 16), torch.randn(4, 32, 16)
    >>> pack_experts(torch.cat((gate, up), 1)).shape
    (4, 64, 16)
    """
    check = _pack_check
    dtypes = FLOATS if scales is None else (torch.int8,)
    if isinstance(weights, torch.Tensor):
        check.tensor("weights", weights, dtypes, "(E, N, K)", (None, None, None))
        weights = weights.detach()
    elif not isinstance(weights, Sequence):
        raise TypeError(f"{check.op}: weights must be a tensor or a sequence of tensors; got {describe(weights)}")
    if len(weights) == 0:
        raise ValueError(f"{check.op}: weights must be of at least one expert; got none")
    if isinstance(weights, torch.Tensor) and weights.device.type == "cuda":
        data, (experts, n, k) = weights.contiguous(), weights.shape
        if data.numel() == 0:
            raise ValueError(f"{check.op}: weights must not be empty; got {describe(weights)}")
        return PackedExperts(data, n, k, _scales_of(check, scales, experts, n, data.device))
    first = check.tensor("weights[0]", weights[0], dtypes, "(N, K)", (None, None))
    if first.numel() == 0:
        raise ValueError(f"{check.op}: weights[0] must not be empty; got {describe(first)}")
    (n, k), experts, device = first.shape, len(weights), first.device
    scales = _scales_of(check, scales, experts, n, device)

    def packed(weight: torch.Tensor) -> torch.Tensor:
        return weight.detach() if device.type == "cuda" else reference.linear.pack(weight.detach())

    one = packed(first)
    shape = (experts, *one.shape)
    data = room(shape, one.dtype) if device.type == "cpu" else one.new_empty(shape)
    data[0].copy_(one)
    for e in range(1, experts):
        data[e].copy_(packed(check.tensor(f"weights[{e}]", weights[e], first.dtype, "(N, K)", (n, k), device)))
    return PackedExperts(data, n, k, scales)


def _scales_of(check: Checker, scales: torch.Tensor | None, experts: int, n: int,
               device: torch.device) -> torch.Tensor | None:
    if scales is None:
        return None
    return check.tensor("scales", scales, torch.float32, "(E, N)", (experts, n), device).detach().contiguous()


def expert_mlp(x: torch.Tensor, gate_up: torch.Tensor | PackedExperts, down: torch.Tensor | PackedExperts,
               ids: torch.Tensor, weights: torch.Tensor, *, gate_up_bias: torch.Tensor | None = None,
               down_bias: torch.Tensor | None = None, activation: str = "silu", first_expert: int = 0,
               num_experts: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
    """The weighted sum of each row's experts.

    Parameters
    ----------
    x : (T, H) float32, bfloat16 or float16
        Last dimension contiguous.
    gate_up : PackedExperts, or (E, 2I, H) dtype of x
        The gate's I rows, then those of up. Of interleaved rows, as gpt-oss has them,
        torch.cat((w[:, ::2], w[:, 1::2]), 1). PackedExperts have x's dtype or 8 bits. A tensor is contiguous,
        and packed in each call on a CPU: the same bits, slower.
    down : PackedExperts, or (E, H, I) dtype of x
        As gate_up.
    ids : (T, k) int32
        The experts of each row, as `route_experts` returns them. One outside [first_expert, first_expert + E), such as
        -1, adds nothing. Contiguous.
    weights : (T, k) float32
        Factors of their results. Contiguous.
    gate_up_bias : (E, 2I) dtype of x, optional
        Ordered as gate_up. Contiguous.
    down_bias : (E, H) dtype of x, optional
        Contiguous.
    activation : {"silu", "clamped"}
        "clamped" is that of gpt-oss.
    first_expert : int
        Id of the first of the E experts that are here.
    num_experts : int, optional
        Of the model, where a rank has some of them. None: first_expert + E.
    out : (T, H) dtype of x, optional
        Written. It must not overlap x.

    Returns
    -------
    out : (T, H) dtype of x

    Raises
    ------
    TypeError
        Wrong dtype.
    ValueError
        Wrong shape, layout or device. With DFLASH_CHECK=1 also an id below -1 or from num_experts on.

    Notes
    -----
    Graph-safe. Source: Shazeer et al. 2017, arXiv 1701.06538, section 2; reference/experts.py. Between its products it
    has memory of its own, for 2,048 pairs of a row and an expert at a time on a CPU and 32,768 on a GPU; more rows read
    the weights again. On a GPU a launch of its own sorts more than 2,048 pairs.

    Cost: `3 * w * X * H * I + T * (2 * e * H + 8 * k)` bytes. Launches on a GPU: 2 or 3.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels import expert_mlp
    >>> gate_up, down = torch.tensor([[[100.0], [2.0]], [[100.0], [3.0]]]), torch.ones(2, 1, 1)
    >>> ids, weights = torch.tensor([[1, 0]], dtype=torch.int32), torch.tensor([[0.5, 0.25]])
    >>> expert_mlp(torch.tensor([[1.0]]), gate_up, down, ids, weights).tolist()
    [[200.0]]
    """
    check = _check
    check.dense("x", x, FLOATS, "(T, H)", (None, None))
    (rows, hidden), device = x.shape, x.device
    wide, wide_scales, experts, double = _weight_of(check, "gate_up", gate_up, x, hidden)
    if double % 2:
        raise ValueError(f"{check.op}: gate_up must have 2I rows, an even number; got {double}")
    inner = double // 2
    narrow, narrow_scales, down_experts, outputs = _weight_of(check, "down", down, x, inner)
    if (down_experts, outputs) != (experts, hidden):
        raise ValueError(f"{check.op}: down must be (E, H, I) = ({experts}, {hidden}, {inner}); got ({down_experts}, "
                         f"{outputs}, {inner})")
    check.contiguous("ids", ids, torch.int32, "(T, k)", (rows, None), device)
    check.contiguous("weights", weights, torch.float32, "(T, k)", ids.shape, device)
    if gate_up_bias is not None:
        check.contiguous("gate_up_bias", gate_up_bias, x.dtype, "(E, 2I)", (experts, double), device)
    if down_bias is not None:
        check.contiguous("down_bias", down_bias, x.dtype, "(E, H)", (experts, hidden), device)
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"{check.op}: activation must be silu or clamped; got {activation!r}")
    first_expert = check.integer("first_expert", first_expert, 0)
    total = first_expert + experts if num_experts is None else check.integer("num_experts", num_experts, 1)
    if first_expert + experts > total:
        raise ValueError(f"{check.op}: num_experts must be at least {first_expert + experts} = first_expert + E; got "
                         f"{total}")
    if values_checked(ids):
        _check_ids(ids, total)
    out = check.output("out", out, x, (rows, hidden))
    _expert_mlp(x, wide, narrow, wide_scales, narrow_scales, ids, weights, gate_up_bias, down_bias, inner,
                ACTIVATIONS[activation], first_expert, out)
    return out


def _weight_of(check: Checker, name: str, weight: torch.Tensor | PackedExperts, x: torch.Tensor, k: int,
               ) -> tuple[torch.Tensor, torch.Tensor | None, int, int]:
    """The experts' memory, their scales, and their sizes E and N."""
    if isinstance(weight, PackedExperts):
        data, scales, (experts, n, own) = weight.data, weight.scales, weight.shape
        if scales is None:
            check_packed_dtype(check.op, x.dtype, data.dtype, name)
        if data.device != x.device:
            raise ValueError(f"{check.op}: {name} must be on {x.device}; got {data.device}")
    else:
        shape = "(E, 2I, H)" if name == "gate_up" else "(E, H, I)"
        data, scales = check.contiguous(name, weight, x.dtype, shape, (None,) * 3, x.device), None
        experts, n, own = data.shape
        if data.numel() == 0:
            raise ValueError(f"{check.op}: {name} must not be empty; got {describe(data)}")
    if own != k:
        size, of = ("H", "x") if name == "gate_up" else ("I", "gate_up")
        raise ValueError(f"{check.op}: {name} must have {k} = {of}'s {size} columns; got {own}")
    return data, scales, experts, n


def _check_ids(ids: torch.Tensor, total: int) -> None:
    wrong = ids[(ids < -1) | (ids >= total)]
    if wrong.numel():
        raise ValueError(f"{_check.op}: ids must be between -1 and {total - 1}, of {total} experts; got "
                         f"{int(wrong[0])}")


_expert_mlp = define(
    "expert_mlp(Tensor x, Tensor gate_up, Tensor down, Tensor? gate_up_scales, Tensor? down_scales, Tensor ids,"
    " Tensor weights, Tensor? gate_up_bias, Tensor? down_bias, int inner, int activation, int first_expert,"
    " Tensor(a!) out) -> ()",
    reference.experts.expert_mlp)
