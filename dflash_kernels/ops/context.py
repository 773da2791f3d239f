"""Context K/V: the target's hidden states as every draft layer sees them, written to all layers' caches in one launch.

For token t and layer l, from one row [K_0 | V_0 | K_1 | V_1 | ...] of the all-layer K/V projection:

    k_caches[l][slot] = rope(rms_norm(K_l, k_weights[l]), positions[t])          per head, as in qk_norm_rope
    v_caches[l][slot] = v_scale * V_l

K has the bits that `qk_norm_rope` gives the same row, so a key is the same whether it comes from the cache or from the
block. A float8_e4m3fn cache gets these rows, already rounded to kv's dtype, divided by its scales and rounded as
PagedKV describes: the bytes of an engine that writes K and V first and quantizes them into the cache. A bias of the
projection belongs to the GEMM before this op.
"""

from collections.abc import Sequence

import torch

from .. import reference
from .._library import define
from ..limits import check_layers
from ..paged_kv import PagedKV
from ._checks import Checker, describe, values_checked
from .rope import check_cache, check_positions, check_rotation, check_rounding

_check = Checker("write_context_kv")


def write_context_kv(kv: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, caches: Sequence[PagedKV], *,
                     k_weights: torch.Tensor | None = None, cos_sin: torch.Tensor | None, eps: float = 1e-6,
                     interleaved: bool = False, commit_lens: torch.Tensor | None = None, v_scale: float = 1.0,
                     rounding: str = "each") -> None:
    """Norms, rotates and scatters the context K/V rows of all L draft layers.

    Parameters
    ----------
    kv : (T, L * 2 * Hkv * D) float32, bfloat16 or float16
        Per layer K, then V. Last dimension contiguous, rows at any one stride.
    positions : (T,) int64
        Absolute token positions. Contiguous. A row with a position outside the table writes nothing.
    slots : (T,) or (L, T) int64
        page * P + row, for all layers or for each. Last dimension contiguous. A slot outside [0, num_pages * P) writes
        nothing. Two rows of a layer must not share a slot.
    caches : sequence of L PagedKV
        Written at the given slots only. At most 64 layers, all of kv's dtype or all float8_e4m3fn, with equal shapes
        and strides. All or none have a k_scale, of one shape; the same holds for v_scale.
    k_weights : (L, D) dtype of kv, optional
        K norm weights. Contiguous. None: K is not normed.
    cos_sin : (max_pos, R) float32 or dtype of kv, or None
        Rows [cos (R/2) | sin (R/2)], contiguous, R <= D <= 1024. None: no rotation (NoPE).
    eps : float
        Added to the mean of squares.
    interleaved : bool
        RoPE pairs neighbours instead of halves.
    commit_lens : (B,) int32, optional
        Contiguous. The T = B * Q rows are grouped by request, and row i of request b is written only if
        i < commit_lens[b]. None: all rows.
    v_scale : float
        Factor of V (a checkpoint's attention_value_scale), rounded once; at 1 the bits are copied. A cache's own
        v_scale divides V afterwards.
    rounding : {"each", "end"}
        "each" rounds to kv's dtype between K norm and RoPE (vLLM, Hugging Face). "end" does not (SGLang).

    Raises
    ------
    TypeError
        Wrong dtype.
    ValueError
        Wrong shape, layout, device or rounding. With DFLASH_CHECK=1 also a position outside the table.
    NotImplementedError
        More than 64 layers, or D above 1024.

    Notes
    -----
    Graph-safe. Source: DFlash, arXiv 2602.06036, section 4 (KV injection); reference/context.py.

    Cost: `T * (2 * L * D * Hkv * (e + c) + 4 * R + 16) + e * L * D` bytes. Launches on a GPU: 1 for all draft layers.

    Replaces `precompute_and_store_context_kv` of vLLM's DFlash drafter and SGLang's `_append_target_hidden_fused`.

    Examples
    --------
    One layer without norm and rotation; the second row's slot is -1.

    >>> import torch
    >>> from dflash_kernels import PagedKV, write_context_kv
    >>> cache = PagedKV(torch.zeros(2, 2, 1, 2), torch.zeros(2, 2, 1, 2))
    >>> kv = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    >>> write_context_kv(kv, torch.tensor([10, 11]), torch.tensor([3, -1]), [cache], cos_sin=None)
    >>> cache.k[1, 1, 0].tolist(), cache.v[1, 1, 0].tolist(), int(cache.k.count_nonzero())
    ([1.0, 2.0], [3.0, 4.0], 2)
    """
    _check.floats("kv", kv, "(T, L * 2 * Hkv * D)")
    if not isinstance(caches, (list, tuple)):
        raise TypeError(f"{_check.op}: caches must be a list of PagedKV; got {describe(caches)}")
    eps, v_scale = _check.number("eps", eps), _check.number("v_scale", v_scale)
    num_layers, first = len(caches), _check_caches(caches, kv)
    width = num_layers * 2 * first.num_kv_heads * first.head_dim
    _check.dense("kv", kv, kv.dtype, "(T, L * 2 * Hkv * D)", (None, width))
    tokens = kv.shape[0]
    check_rotation(_check, positions, cos_sin, kv, tokens, first.head_dim)
    per_layer = isinstance(slots, torch.Tensor) and slots.dim() == 2
    _check.dense("slots", slots, torch.int64, "(L, T)" if per_layer else "(T,)",
                 (num_layers, tokens) if per_layer else (tokens,), kv.device)
    if k_weights is not None:
        _check.contiguous("k_weights", k_weights, kv.dtype, "(L, D)", (num_layers, first.head_dim), kv.device)
    if commit_lens is not None:
        _check.contiguous("commit_lens", commit_lens, torch.int32, "(B,)", (None,), kv.device)
        if tokens % commit_lens.shape[0] if commit_lens.shape[0] else tokens:
            raise ValueError(f"{_check.op}: commit_lens must have a length B that divides T = {tokens}; "
                             f"got {describe(commit_lens)}")
    each = check_rounding(_check, rounding)
    if values_checked(kv):
        _check_written_positions(positions, slots, cos_sin, commit_lens, first)
    _write_context_kv(kv, positions, slots, [c.k for c in caches], [c.v for c in caches],
                      [c.k_scale for c in caches if c.k_scale is not None],
                      [c.v_scale for c in caches if c.v_scale is not None], k_weights, cos_sin, commit_lens, eps,
                      v_scale, bool(interleaved), each)


def _check_caches(caches: Sequence[PagedKV], kv: torch.Tensor) -> PagedKV:
    if not caches:
        raise ValueError(f"{_check.op}: caches must be L >= 1 PagedKV; got none")
    check_layers(_check.op, len(caches))
    first = caches[0]
    check_cache(_check, "caches[0]", first, kv, None, None)
    wanted = None if values_checked(kv) else _layout(first)
    for layer, cache in enumerate(caches[1:], 1):
        if type(cache) is PagedKV and _layout(cache) == wanted:  # what costs a call of few rows its time is this loop
            continue
        name = f"caches[{layer}]"
        check_cache(_check, name, cache, kv, None, None)
        if cache.k.shape != first.k.shape:
            raise ValueError(f"{_check.op}: {name} must have the shape of caches[0], {tuple(first.k.shape)}; "
                             f"got {tuple(cache.k.shape)}")
        if cache.k.stride() != first.k.stride() or cache.v.stride() != first.v.stride():
            raise ValueError(f"{_check.op}: {name} must have the strides of caches[0], k {first.k.stride()} and "
                             f"v {first.v.stride()}; got {cache.k.stride()} and {cache.v.stride()}")
        if cache.k.dtype != first.k.dtype:
            raise TypeError(f"{_check.op}: {name} must have the dtype of caches[0], {first.k.dtype}; "
                            f"got {cache.k.dtype}")
        for which in ("k_scale", "v_scale"):
            have, want = (None if (t := getattr(c, which)) is None else t.numel() for c in (cache, first))
            if have != want:
                raise ValueError(f"{_check.op}: {name}.{which} must be as large as that of caches[0], "
                                 f"{'none' if want is None else want}; got {'none' if have is None else have}")
    return first


def _layout(cache: PagedKV) -> tuple:
    """What all layers' caches must agree in; of v, what PagedKV leaves open."""
    k, k_scale, v_scale = cache.k, cache.k_scale, cache.v_scale
    return (k.shape, k.stride(), cache.v.stride(), k.dtype, k.device, None if k_scale is None else k_scale.numel(),
            None if v_scale is None else v_scale.numel())


def _check_written_positions(positions, slots, cos_sin, commit_lens, cache):
    """Rows that write nothing may hold any position."""
    written = (slots >= 0) & (slots < cache.num_pages * cache.page_size)
    written = written.any(0) if slots.dim() == 2 else written
    if commit_lens is not None and commit_lens.shape[0]:
        block = torch.arange(positions.shape[0] // commit_lens.shape[0], device=positions.device)
        written = written & (block < commit_lens[:, None]).flatten()
    check_positions(_check, positions.where(written, 0), cos_sin)


_write_context_kv = define(
    "write_context_kv(Tensor kv, Tensor positions, Tensor slots, Tensor(a!)[] k_caches, Tensor(b!)[] v_caches, "
    "Tensor[] k_scales, Tensor[] v_scales, Tensor? k_weights, Tensor? cos_sin, Tensor? commit_lens, float eps, "
    "float v_scale, bool interleaved, bool round_each) -> ()",
    reference.context.write_context_kv,
)
