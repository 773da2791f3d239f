"""Attention of a block's queries over paged context K/V and the block's own K/V, read where the projection left it.

Request b has c = context_lens[b] committed tokens. Query i of the block has position c + i. The keys are

    context key j, context_starts[b] <= j < c:  cache row page_table[b, j // P] * P + j % P, at position j
    block key j,   0 <= j < block_lens[b]:      k[b, j], v[b, j], at position c + j (never written to the cache here)

Query i, at position qp = c + i, sees a key at position kp if qp - left <= kp <= qp + right (-1: unlimited) and, when
causal, kp <= qp. With s = scale * q.k, and s <- softcap * tanh(s / softcap) if softcap > 0:

    out = sum_visible exp(s) v / (exp(sink) + sum_visible exp(s)),    zeros where no key is visible

Scores, weights and sums are float32, with one rounding at the end. Where bfloat16 runs on AMX tiles, or on AVX-512 BF16
with D a multiple of 32, a weight is also rounded to bfloat16 before it meets its value. A row's bits depend on its own
query, position and visible keys alone: not on B, Q, its neighbours, threads or page size, nor on whether a key lies in
the cache or in the block.

A float8_e4m3fn cache holds keys and values divided by its scales, as PagedKV describes. Scores and sums take the
scales, so no key is rounded again. The block's own keys and values keep their dtype. The cache has fewer bits of a key
than the block, so a row's bits then also depend on where the context ends.
"""

import math

import torch

from .. import reference
from .._library import define
from ..limits import FLOAT32_MAX, FP8
from ..paged_kv import PagedKV
from ._checks import Checker, describe, values_checked

_check = Checker("block_attention")


def block_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: PagedKV | None,
                    page_table: torch.Tensor | None, context_lens: torch.Tensor, *,
                    block_lens: torch.Tensor | None = None, context_starts: torch.Tensor | None = None,
                    block_starts: torch.Tensor | None = None, max_block: int | None = None,
                    scale: float | None = None, causal: bool = False, window: tuple[int, int] = (-1, -1),
                    sinks: torch.Tensor | None = None, softcap: float = 0.0,
                    out: torch.Tensor | None = None) -> torch.Tensor:
    """Attention of a block's queries over the paged context and the block itself.

    Parameters
    ----------
    q : (B, Q, Hq, D) float32, bfloat16 or float16
        Last dimension contiguous, others at any stride: a view of qkv rows fits.
    k, v : (B, Q, Hkv, D) dtype of q
        Layout as for q. Hkv divides Hq, and query head h reads key head h // (Hq // Hkv).
    cache : PagedKV of q's dtype or float8_e4m3fn, or None
        Pages with Hkv heads of D. None: no context keys.
    page_table : (B, max_pages) int32, or None
        Page ids in position order, last dimension contiguous. None exactly when cache is. Entries outside a request's
        visible context are never read. A visible key on a page that does not exist counts as NaN.
    context_lens : (B,) int32
        Committed tokens of each request, and the position of its first query. Contiguous. Negative counts as 0. Context
        beyond max_pages * P is not read: rows that see any of it are NaN, and other rows are unaffected.
    block_lens : (B,) int32, optional
        Valid rows of each block, clamped to [0, Q]. Contiguous. None: Q. Rows past it are invisible and not written.
    context_starts : (B,) int32, optional
        First context position that holds data, clamped to [0, context_lens]. Contiguous. None: 0.
    block_starts : (B,) int32, optional
        Packed blocks: q and out are (T, Hq, D), k and v (T, Hkv, D), and request b has the rows block_starts[b] + i,
        i < block_lens[b], which is given then. Contiguous. Clamped to [0, T], and blocks end at T. Rows of no request
        are neither read nor written.
    max_block : int, optional
        Q of packed blocks, the most rows of one. Given exactly when block_starts is.
    scale : float, optional
        Factor of q.k. None: 1 / sqrt(D).
    causal : bool
        Hides keys at later positions than the query's. Off by default, because a draft block is bidirectional.
    window : (int, int)
        (left, right) distances in tokens, both inclusive; -1 is unlimited. A checkpoint's sliding_window w counts the
        token itself: left = w - 1.
    sinks : (Hq,) float32 or dtype of q, optional
        Logit of an extra key without a value. Contiguous.
    softcap : float
        Bound of the scores. 0: none.
    out : (B, Q, Hq, D) dtype of q, optional
        Written. Last dimension contiguous. It must not overlap q, k, v or the cache.

    Returns
    -------
    out : like q

    Raises
    ------
    TypeError
        Wrong dtype.
    ValueError
        Wrong shape, layout, device or option. With DFLASH_CHECK=1 also lengths or page ids out of range.
    NotImplementedError
        On a GPU: D above 256, or above 64 for float32 queries over a float8_e4m3fn cache.

    Notes
    -----
    Graph-safe. Source: DFlash, arXiv 2602.06036, section 4; online softmax, arXiv 1805.02867; reference/attention.py.

    Cost: `2 * D * (c * C * Hkv + e * B * Q * (Hq + Hkv))` bytes. Launches on a GPU: 1; 2 for few requests.

    Replaces the drafter's attention backend in vLLM's V1 runner.

    Examples
    --------
    Zero queries weigh all visible keys equally. The context's one token has the value 6, the block's two have 2 and 1.

    >>> import torch
    >>> from dflash_kernels import PagedKV, block_attention
    >>> zeros = torch.zeros(1, 2, 1, 1)
    >>> values = torch.tensor([2.0, 1.0]).view(1, 2, 1, 1)
    >>> cache = PagedKV(torch.zeros(4, 2, 1, 1), torch.full((4, 2, 1, 1), 6.0))
    >>> tables = torch.tensor([[3]], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    >>> block_attention(zeros, zeros, values, cache, *tables).flatten().tolist()
    [3.0, 3.0]
    >>> block_attention(zeros, zeros, values, cache, *tables, causal=True).flatten().tolist()
    [4.0, 3.0]
    """
    if (block_starts is None) != (max_block is None):
        raise ValueError(f"{_check.op}: block_starts and max_block must be given together; got "
                         f"{describe(block_starts)} and {max_block!r}")
    layout = "(B, Q, Hq, D)" if block_starts is None else "(T, Hq, D)"
    _check.floats("q", q, layout)
    if q.dim() != layout.count(",") + 1 or 0 in q.shape[-2:]:
        raise ValueError(f"{_check.op}: q must have shape {layout}, Hq and D > 0; got {describe(q)}")
    _check.dense_last("q", q)
    kv_heads = _check_keys(q, k, v)
    batch, width = _blocks(q, context_lens, block_lens, block_starts, max_block)
    _check_cache(q, batch, kv_heads, cache, page_table)
    _check.contiguous("context_lens", context_lens, torch.int32, "(B,)", (batch,), q.device)
    for name, t in (("block_lens", block_lens), ("context_starts", context_starts), ("block_starts", block_starts)):
        if t is not None:
            _check.contiguous(name, t, torch.int32, "(B,)", (batch,), q.device)
    softcap = _check.number("softcap", softcap)
    left, right = _check_options(q, window, sinks, softcap)
    if values_checked(q):
        _check_values(width, cache, page_table, context_lens, block_lens, context_starts)
        _check_starts(len(q), block_lens, block_starts)
    out = _check.output("out", out, q, q.shape)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else _check.number("scale", scale)
    k_cache, v_cache, k_scale, v_scale = (None,) * 4 if cache is None else (
        cache.k, cache.v, cache.k_scale, cache.v_scale)
    rows = (q, k, v, out) if block_starts is None else (t.unsqueeze(0) for t in (q, k, v, out))
    q4, k4, v4, out4 = rows
    _block_attention(q4, k4, v4, k_cache, v_cache, k_scale, v_scale, page_table, context_lens, block_lens,
                     context_starts, block_starts, width, scale, bool(causal), left, right, sinks, softcap, out4)
    return out


def _blocks(q, context_lens, block_lens, block_starts, max_block):
    """(B, Q), of packed blocks too."""
    if block_starts is None:
        return q.shape[:2]
    _check.tensor("context_lens", context_lens, torch.int32, "(B,)", (None,), q.device)
    if block_lens is None:
        raise ValueError(f"{_check.op}: block_lens must be given with block_starts; got None")
    return len(context_lens), min(_check.integer("max_block", max_block, 1), max(len(q), 1))  # no block is longer


def _check_keys(q, k, v):
    *rows, heads, head_dim = q.shape
    kv_heads = k.shape[-2] if isinstance(k, torch.Tensor) and k.dim() == q.dim() else None
    layout = "(B, Q, Hkv, D)" if q.dim() == 4 else "(T, Hkv, D)"
    for name, t in (("k", k), ("v", v)):
        _check.dense(name, t, q.dtype, layout, (*rows, kv_heads, head_dim), q.device)
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{_check.op}: Hkv must divide Hq = {heads}; got Hkv = {kv_heads}")
    return kv_heads


def _check_cache(q, batch, kv_heads, cache, page_table):
    if cache is None:
        if page_table is not None:
            raise ValueError(f"{_check.op}: page_table must be None when cache is None; got {describe(page_table)}")
        return
    if not isinstance(cache, PagedKV):
        raise TypeError(f"{_check.op}: cache must be a PagedKV or None; got {type(cache).__name__}")
    sizes = (None, None, kv_heads, q.shape[-1])
    _check.tensor("cache.k", cache.k, (q.dtype, FP8), "(num_pages, P, Hkv, D)", sizes, q.device)
    if cache.page_size == 0:
        raise ValueError(f"{_check.op}: cache must have a page size P > 0; got {describe(cache.k)}")
    _check.dense("page_table", page_table, torch.int32, "(B, max_pages)", (batch, None), q.device)


def _check_options(q, window, sinks, softcap):
    if sinks is not None:
        _check.contiguous("sinks", sinks, {torch.float32, q.dtype}, "(Hq,)", (q.shape[-2],), q.device)
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"{_check.op}: window must be (left, right); got {window!r}")
    left, right = (_check.integer("window", x, -1) for x in window)
    if not 0 <= softcap <= FLOAT32_MAX:
        raise ValueError(f"{_check.op}: softcap must be finite and >= 0; got {softcap!r}")
    return left, right


def _check_values(width, cache, page_table, context_lens, block_lens, context_starts):
    """Reads the device. A context longer than the page table can hold is an error here, not a truncated answer."""
    contexts = context_lens.tolist()
    starts = [0] * len(contexts) if context_starts is None else context_starts.tolist()
    if cache is not None:
        _check.scales("cache", cache)
    for b, n in enumerate([] if block_lens is None else block_lens.tolist()):
        if not 0 <= n <= width:
            raise ValueError(f"{_check.op}: block_lens must be in [0, Q = {width}]; got {n} for request {b}")
    for b, (start, context) in enumerate(zip(starts, contexts, strict=True)):
        if context < 0 or not 0 <= start <= context:
            raise ValueError(f"{_check.op}: 0 <= context_starts <= context_lens must hold; got {start} and {context} "
                             f"for request {b}")
        if cache is None or start == context:
            continue
        page = cache.page_size
        if context > page_table.shape[1] * page:
            raise ValueError(f"{_check.op}: context_lens must fit page_table's {page_table.shape[1]} pages of {page}; "
                             f"got {context} for request {b}")
        used = page_table[b, start // page:(context + page - 1) // page]
        if ((used < 0) | (used >= cache.num_pages)).any():
            raise ValueError(f"{_check.op}: page_table must hold ids in [0, num_pages = {cache.num_pages}); "
                             f"got {used.tolist()} for request {b}")


def _check_starts(rows, block_lens, block_starts):
    """Reads the device."""
    if block_starts is None:
        return
    end = 0
    for start, n in sorted(zip(block_starts.tolist(), block_lens.tolist(), strict=True)):
        if n and not end <= start <= rows - n:
            raise ValueError(f"{_check.op}: block_starts must give each block rows of its own in [0, T = {rows}); got "
                             f"{block_starts.tolist()} with block_lens {block_lens.tolist()}")
        end = start + n if n else end


_block_attention = define(
    "block_attention(Tensor q, Tensor k, Tensor v, Tensor? k_cache, Tensor? v_cache, Tensor? k_scale, Tensor? v_scale, "
    "Tensor? page_table, Tensor context_lens, Tensor? block_lens, Tensor? context_starts, Tensor? block_starts, "
    "int max_block, float scale, bool causal, int left, int right, Tensor? sinks, float softcap, Tensor(a!) out) -> ()",
    reference.attention.block_attention,
)
