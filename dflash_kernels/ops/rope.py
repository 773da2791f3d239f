"""Per-head q/k RMSNorm and rotary embedding, in place on a packed qkv row.

    h        = x * rsqrt(mean(x^2) + eps) * weight                    over one head's D elements; h = x without weight
    (a', b') = (a cos - b sin, b cos + a sin)                         for each pair (a, b) of the first R elements of h

R = rotary_dim <= D; pair i is (i, i + R/2), or (2i, 2i + 1) when interleaved; cos and sin are entry i of the table's
row for the token's position. rounding="each" rounds h to the model dtype before it is rotated, as vLLM and the Hugging
Face models do; rounding="end" stays in float32 from norm through rotation, as SGLang does. Products and sums of the
rotation are separate float32 operations, so without a norm the result equals the same torch expression's bit for bit.
"""

import torch

from .. import reference
from .._library import define
from ..types import FP8, PagedKV
from ._checks import Checker, describe, values_checked

_check = Checker("qk_norm_rope")

MAX_HEAD_DIM = 1024  # kMaxHeadDim in csrc/cpu/rope_head.h


def qk_norm_rope(qkv: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor | None, *, num_heads: int,
                 num_kv_heads: int, head_dim: int, q_weight: torch.Tensor | None = None,
                 k_weight: torch.Tensor | None = None, eps: float = 1e-6, interleaved: bool = False,
                 cache: PagedKV | None = None, slots: torch.Tensor | None = None,
                 rounding: str = "each") -> torch.Tensor:
    """Norms and rotates the q and k heads of packed rows [q | k | v]; with a cache also stores K and V there.

    qkv (T, (Hq + 2 Hkv) * D): float32, bfloat16 or float16, last dimension contiguous, rows at any one stride that
        keeps them apart. The q and k parts are overwritten, v is left alone.
    positions (T,): int64, contiguous, absolute token positions. A row whose position is outside the table gets NaN in
        all of its q and k, so that the mistake shows, and stores nothing (DFLASH_CHECK=1: ValueError).
    cos_sin (max_pos, R): float32 or dtype of qkv, contiguous, [cos (R/2) | sin (R/2)]; None: no rotation (NoPE).
    num_heads, num_kv_heads, head_dim: Hq, Hkv and D <= 1024.
    q_weight, k_weight (D,): dtype of qkv, contiguous; None: that part is not normed.
    eps: added to the mean of squares.
    interleaved: pairs of neighbours instead of halves.
    cache: pages of dtype of qkv, or float8_e4m3fn, with Hkv heads of D; the finished K row and the V row of token t are
        copied, or quantised as PagedKV says, to slots[t]. Two tokens must not name one slot.
    slots (T,): int64, contiguous, page * P + row; below 0 or at num_pages * P and above, nothing is stored.
        Given exactly when cache is.
    rounding: "each" or "end", see the module's text.

    Returns qkv. Raises TypeError for a dtype, ValueError for a shape, layout, device or rounding, NotImplementedError
    for a larger D. Graph-safe.
    Source: Su et al. 2021, arXiv 2104.09864, eq. 34; reference/rope.py.
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
    if values_checked():
        check_positions(_check, positions, cos_sin)
    k_cache, v_cache, k_scale, v_scale = (None,) * 4 if cache is None else (
        cache.k, cache.v, cache.k_scale, cache.v_scale)
    _qk_norm_rope(qkv, positions, cos_sin, q_weight, k_weight, k_cache, v_cache, k_scale, v_scale, slots, num_heads,
                  num_kv_heads, head_dim, eps, bool(interleaved), each)
    return qkv


def check_rotation(check: Checker, positions: torch.Tensor, cos_sin: torch.Tensor | None, rows: torch.Tensor,
                   tokens: int, head_dim: int) -> None:
    if head_dim > MAX_HEAD_DIM:
        raise NotImplementedError(f"{check.op}: head_dim must be <= {MAX_HEAD_DIM}; got {head_dim}")
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
    check.apart(f"{name}.k", cache.k)
    check.apart(f"{name}.v", cache.v)
    if values_checked():
        check.scales(name, cache)


def check_rounding(check: Checker, rounding: str) -> bool:
    if not isinstance(rounding, str) or rounding not in ("each", "end"):
        raise ValueError(f"{check.op}: rounding must be 'each' or 'end'; got {rounding!r}")
    return rounding == "each"


def check_positions(check: Checker, positions: torch.Tensor, cos_sin: torch.Tensor | None) -> None:
    """Reads the device: only under DFLASH_CHECK=1."""
    bad = ~reference.rope.in_table(positions, cos_sin)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(f"{check.op}: positions must be in [0, {cos_sin.shape[0]}), the rows of cos_sin; "
                         f"got {int(positions[first])} at row {first}")


_qk_norm_rope = define(
    "qk_norm_rope(Tensor(a!) qkv, Tensor positions, Tensor? cos_sin, Tensor? q_weight, Tensor? k_weight, "
    "Tensor(b!)? k_cache, Tensor(c!)? v_cache, Tensor? k_scale, Tensor? v_scale, Tensor? slots, int num_heads, "
    "int num_kv_heads, int head_dim, float eps, bool interleaved, bool round_each) -> ()",
    reference.rope.qk_norm_rope,
)
