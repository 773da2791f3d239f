"""Per-head RMSNorm and rotary embedding of q and k, in place on packed qkv rows.

    h        = x * rsqrt(mean(x^2) + eps) * weight         over one head's D elements; h = x without a weight
    (a', b') = (a cos - b sin, b cos + a sin)              for each pair (a, b) of the first R elements of h

R is the rotary dimension, at most D. Pair i is (i, i + R/2), or (2i, 2i + 1) when interleaved. cos and sin are entry i
of the table's row for the token's position.

Rounding "each" rounds h to qkv's dtype before the rotation, as vLLM and the Hugging Face models do. Rounding "end"
stays in float32 from norm through rotation, as SGLang does. Products and sums of the rotation are separate float32
operations, so without a norm the result equals the same torch expression's bit for bit.
"""

import torch

from .. import reference
from .._library import define
from ..limits import FP8, check_head_dim
from ..paged_kv import PagedKV
from ._checks import Checker, describe, values_checked

_check = Checker("qk_norm_rope")


def qk_norm_rope(qkv: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor | None, *, num_heads: int,
                 num_kv_heads: int, head_dim: int, q_weight: torch.Tensor | None = None,
                 k_weight: torch.Tensor | None = None, eps: float = 1e-6, interleaved: bool = False,
                 cache: PagedKV | None = None, slots: torch.Tensor | None = None,
                 rounding: str = "each") -> torch.Tensor:
    """Norms and rotates the q and k heads of packed rows [q | k | v], and can store K and V in a cache.

    Parameters
    ----------
    qkv : (T, (Hq + 2 Hkv) * D) float32, bfloat16 or float16
        q and k are overwritten; v is not. Last dimension contiguous, rows at any one stride that keeps them apart.
    positions : (T,) int64
        Absolute token positions. Contiguous. A position outside the table fills that row's q and k with NaN and stores
        nothing.
    cos_sin : (max_pos, R) float32 or dtype of qkv, or None
        Rows [cos (R/2) | sin (R/2)], contiguous. None: no rotation (NoPE).
    num_heads, num_kv_heads : int
        Hq and Hkv.
    head_dim : int
        D, at most 1024.
    q_weight, k_weight : (D,) dtype of qkv, optional
        Norm weights. Contiguous. None: that part is not normed.
    eps : float
        Added to the mean of squares.
    interleaved : bool
        Pairs neighbours instead of halves.
    cache : PagedKV of qkv's dtype or float8_e4m3fn, optional
        Pages with Hkv heads of D. The finished K row and the V row of token t are copied to slots[t], or quantized as
        PagedKV describes.
    slots : (T,) int64, optional
        page * P + row. Contiguous. A slot outside [0, num_pages * P) stores nothing. Two tokens must not share a slot.
        Given exactly when cache is.
    rounding : {"each", "end"}
        "each" rounds to qkv's dtype between norm and rotation. "end" does not.

    Returns
    -------
    qkv : (T, (Hq + 2 Hkv) * D)

    Raises
    ------
    TypeError
        Wrong dtype.
    ValueError
        Wrong shape, layout, device or rounding. With DFLASH_CHECK=1 also a position outside the table.
    NotImplementedError
        head_dim above 1024.

    Notes
    -----
    Graph-safe. Source: Su et al. 2021, arXiv 2104.09864, eq. 34; reference/rope.py.

    Cost: `T * (2 * e * D * (Hq + Hkv) + 4 * R + 8)` bytes, with a cache `T * (D * Hkv * (e + 2 * c) + 8)` more.
    Launches on a GPU: 1.

    Examples
    --------
    One head each. The table's row 1 is a quarter turn, which turns [1, 0] into [0, 1].

    >>> import torch
    >>> from dflash_kernels import qk_norm_rope
    >>> qkv = torch.tensor([[1.0, 0.0, 3.0, 0.0, 5.0, 6.0]])
    >>> cos_sin = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> qk_norm_rope(qkv, torch.tensor([1]), cos_sin, num_heads=1, num_kv_heads=1, head_dim=2).tolist()
    [[0.0, 1.0, 0.0, 3.0, 5.0, 6.0]]
    """
    _check.floats("qkv", qkv, "(T, (Hq + 2 Hkv) * D)")
    for name, heads in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
        _check.integer(name, heads, 0)
    _check.integer("head_dim", head_dim, 1)
    eps = _check.number("eps", eps)
    width = (num_heads + 2 * num_kv_heads) * head_dim
    _check.dense("qkv", qkv, qkv.dtype, "(T, (Hq + 2 Hkv) * D)", (None, width))
    tokens = qkv.shape[0]
    if tokens > 1 and qkv.stride(0) < width:
        raise ValueError(f"{_check.op}: qkv must have rows that do not overlap; got strides {qkv.stride()}")
    check_rotation(_check, positions, cos_sin, qkv, tokens, head_dim)
    for name, w in (("q_weight", q_weight), ("k_weight", k_weight)):
        if w is not None:
            _check.contiguous(name, w, qkv.dtype, "(D,)", (head_dim,), qkv.device)
    if (cache is None) != (slots is None):
        raise ValueError(f"{_check.op}: cache and slots must be given together; got "
                         f"{'slots' if cache is None else 'cache'} alone")
    if cache is not None:
        check_cache(_check, "cache", cache, qkv, num_kv_heads, head_dim)
        _check.contiguous("slots", slots, torch.int64, "(T,)", (tokens,), qkv.device)
    each = check_rounding(_check, rounding)
    if values_checked(qkv):
        check_positions(_check, positions, cos_sin)
    k_cache, v_cache, k_scale, v_scale = (None,) * 4 if cache is None else (
        cache.k, cache.v, cache.k_scale, cache.v_scale)
    _qk_norm_rope(qkv, positions, cos_sin, q_weight, k_weight, k_cache, v_cache, k_scale, v_scale, slots, num_heads,
                  num_kv_heads, head_dim, eps, bool(interleaved), each)
    return qkv


def check_rotation(check: Checker, positions: torch.Tensor, cos_sin: torch.Tensor | None, rows: torch.Tensor,
                   tokens: int, head_dim: int) -> None:
    check_head_dim(check.op, head_dim)
    check.contiguous("positions", positions, torch.int64, "(T,)", (tokens,), rows.device)
    if cos_sin is None:
        return
    check.contiguous("cos_sin", cos_sin, {torch.float32, rows.dtype}, "(max_pos, R)", (None, None), rows.device)
    if cos_sin.numel() == 0 or cos_sin.shape[1] % 2 or cos_sin.shape[1] > head_dim:
        raise ValueError(f"{check.op}: cos_sin must have shape (max_pos, R), max_pos > 0 and R > 0, even and <= "
                         f"{head_dim}; got {describe(cos_sin)}")


def check_cache(check: Checker, name: str, cache: PagedKV, rows: torch.Tensor, num_kv_heads: int | None,
                head_dim: int | None) -> None:
    if not isinstance(cache, PagedKV):
        raise TypeError(f"{check.op}: {name} must be a PagedKV; got {describe(cache)}")
    check.tensor(f"{name}.k", cache.k, (rows.dtype, FP8), "(num_pages, P, Hkv, D)",
                 (None, None, num_kv_heads, head_dim), rows.device)
    if cache.k.shape[1] == 0 and cache.k.shape[0] > 0:
        raise ValueError(f"{check.op}: {name}.k must have pages of at least 1 token; got {describe(cache.k)}")
    check.apart(f"{name}.k", cache.k)
    check.apart(f"{name}.v", cache.v)
    if values_checked(rows):
        check.scales(name, cache)


def check_rounding(check: Checker, rounding: str) -> bool:
    if not isinstance(rounding, str) or rounding not in ("each", "end"):
        raise ValueError(f"{check.op}: rounding must be 'each' or 'end'; got {rounding!r}")
    return rounding == "each"


def check_positions(check: Checker, positions: torch.Tensor, cos_sin: torch.Tensor | None) -> None:
    """Reads the device: only under DFLASH_CHECK=1."""
    bad = ~reference.rope.in_table(positions, cos_sin)
    if cos_sin is not None and bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(f"{check.op}: positions must be in [0, {cos_sin.shape[0]}), the rows of cos_sin; "
                         f"got {int(positions[first])} at row {first}")


_qk_norm_rope = define(
    "qk_norm_rope(Tensor(a!) qkv, Tensor positions, Tensor? cos_sin, Tensor? q_weight, Tensor? k_weight, "
    "Tensor(b!)? k_cache, Tensor(c!)? v_cache, Tensor? k_scale, Tensor? v_scale, Tensor? slots, int num_heads, "
    "int num_kv_heads, int head_dim, float eps, bool interleaved, bool round_each) -> ()",
    reference.rope.qk_norm_rope,
)
