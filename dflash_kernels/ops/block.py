"""The block that a draft pass starts from: B requests in one launch.

    ids[b]       = [anchor[b], MASK, MASK, ...]
    positions[b] = context_lens[b] + (0, 1, 2, ...)
    slots[b, i]  = page_table[b, p // P] * P + p % P   with p = positions[b, i]
    rows[b, i]   = embedding[ids[b, i]]

A token has slot -1 if it lies past its request's length or if the request does not own its page. Nothing is ever
written into another request's page. The ops copy integers and rows, so results are exact.
"""

import torch

from .. import reference
from .._library import define
from ..formats import EVERY
from ..storage import PackedWeight
from ..types import PreparedBlock
from ._checks import FLOATS, Checker, describe, named, values_checked

_prepare_block_check = Checker("prepare_block")
_embed_tokens_check = Checker("embed_tokens")


def prepare_block(anchor_ids: torch.Tensor, context_lens: torch.Tensor, block_size: int, mask_token_id: int, *,
                  page_table: torch.Tensor | None = None, page_size: int | None = None,
                  block_lens: torch.Tensor | None = None, embedding: torch.Tensor | PackedWeight | None = None,
                  out: PreparedBlock | None = None) -> PreparedBlock:
    """Ids, positions, cache slots and embedded rows of each request's block.

    Parameters
    ----------
    anchor_ids : (B,) int64
        Last committed token of each request. Any stride.
    context_lens : (B,) int32
        Tokens before the anchor, which is also the anchor's position. Contiguous.
    block_size : int
        Q, at least 1. It can be smaller than the checkpoint's.
    mask_token_id : int
        Id that fills the block. It must be a row of embedding, if that is given.
    page_table : (B, max_pages) int32, optional
        Page of tokens [j * P, (j + 1) * P) of each request, rows at any stride. A negative entry is a page that the
        request does not own. Entries that no live token needs are not read.
    page_size : int, optional
        P, tokens per page. Given exactly when page_table is.
    block_lens : (B,) int32, optional
        Live tokens of each block, clamped to [0, Q]. Contiguous. None: Q. Past a block's length ids are MASK, positions
        0, slots -1 and rows zero.
    embedding : (V, H) float32, bfloat16 or float16, or a PackedWeight in blocks, optional
        Rows at any stride. Blocks become elements of out.rows' dtype, bfloat16 without out. An id outside [0, V) gives
        a zero row.
    out : PreparedBlock, optional
        Written. It has slots exactly when page_table is given, and rows exactly when embedding is.

    Returns
    -------
    out : PreparedBlock

    Raises
    ------
    TypeError
        Wrong dtype.
    ValueError
        Wrong shape, layout, device or number. With DFLASH_CHECK=1 also anchors or lengths out of range.

    Notes
    -----
    Graph-safe. Source: DFlash, arXiv 2602.06036, section 4; reference/block.py.

    Cost: `B * (12 + 24 * Q) + e * H * (B * Q + B + 1)` bytes with a page table and an embedding. Launches on a GPU: 1.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels import prepare_block
    >>> context_lens, page_table = torch.tensor([6], dtype=torch.int32), torch.tensor([[5, 2, 0]], dtype=torch.int32)
    >>> block = prepare_block(torch.tensor([7]), context_lens, 4, 99, page_table=page_table, page_size=4)
    >>> block.ids.tolist(), block.positions.tolist(), block.slots.tolist()
    ([[7, 99, 99, 99]], [[6, 7, 8, 9]], [[10, 11, 0, 1]])
    """
    check = _prepare_block_check
    q, mask_token_id, page_size = _check_inputs(check, anchor_ids, context_lens, block_size, mask_token_id, page_table,
                                                page_size, block_lens, embedding)
    out = _check_out(check, anchor_ids, q, page_table, embedding, out)
    if values_checked(anchor_ids):
        _check_values(check, anchor_ids, context_lens, q, block_lens, embedding)
    table, number = _table_of(check, "embedding", embedding)
    _prepare_block(anchor_ids, context_lens, mask_token_id, page_table, page_size, block_lens, table, number, out.ids,
                    out.positions, out.slots, out.rows)
    return out


def embed_tokens(ids: torch.Tensor, table: torch.Tensor | PackedWeight, *,
                 out: torch.Tensor | None = None) -> torch.Tensor:
    """Rows of a table, looked up by id.

    Parameters
    ----------
    ids : (...) int64
        Last dimension contiguous, rows at any one stride. An id outside [0, V) gives a zero row.
    table : (V, H) float32, bfloat16, float16 or int64, or a PackedWeight in blocks
        Last dimension contiguous, rows at any stride. An int64 table maps ids to ids.
    out : (..., H) dtype of table, optional
        Written. Last dimension contiguous. It must not overlap table. Blocks become elements of out's dtype, which is
        any float, and bfloat16 without out.

    Returns
    -------
    out : (..., H) dtype of table

    Raises
    ------
    TypeError
        Wrong dtype.
    ValueError
        Wrong shape, layout or device.

    Notes
    -----
    Graph-safe. Source: reference/block.py.

    Cost: `T * (8 + 2 * e * H)` bytes. Launches on a GPU: 1.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels import embed_tokens
    >>> table = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> embed_tokens(torch.tensor([1, 0, -1]), table).tolist()
    [[3.0, 4.0], [1.0, 2.0], [0.0, 0.0]]
    """
    check = _embed_tokens_check
    if not isinstance(ids, torch.Tensor) or ids.dtype != torch.int64:
        raise TypeError(f"{check.op}: ids must be int64 (...); got {describe(ids)}")
    width, dtype = _check_table(check, "table", table, (*FLOATS, torch.int64), ids.device, out)
    out = check.output("out", out, ids, (*ids.shape, width), dtype)
    ids_rows = check.as_rows("ids", ids if ids.dim() else ids[None])
    _embed_tokens(ids_rows, *_table_of(check, "table", table), _as_matrix_of_rows(check, out, ids_rows.shape))
    return out


def _check_table(check, name, table, dtypes, device, out):
    """The table's width, and the dtype of its rows as they are written."""
    if not isinstance(table, PackedWeight):
        check.dense(name, table, dtypes, "(V, H)", (None, None), device)
        return table.shape[1], table.dtype
    _table_of(check, name, table)
    if table.data.device != device:
        raise ValueError(f"{check.op}: {name} must be on {device}; got {table.data.device}")
    return table.in_features, out.dtype if isinstance(out, torch.Tensor) and out.dtype in FLOATS else torch.bfloat16


def _table_of(check, name, table):
    """The table's memory and its format's number."""
    if not isinstance(table, PackedWeight):
        return table, 0
    if table.format is None:
        raise TypeError(f"{check.op}: {name} must be a tensor or a PackedWeight in blocks; got one of "
                        f"{named(table.dtype)}")
    return table.data, EVERY[table.format].number


def _check_inputs(check, anchor_ids, context_lens, block_size, mask_token_id, page_table, page_size, block_lens,
                  embedding):
    check.tensor("anchor_ids", anchor_ids, torch.int64, "(B,)", (None,))
    b, device = anchor_ids.shape[0], anchor_ids.device
    check.contiguous("context_lens", context_lens, torch.int32, "(B,)", (b,), device)
    if block_lens is not None:
        check.contiguous("block_lens", block_lens, torch.int32, "(B,)", (b,), device)
    q = check.integer("block_size", block_size, 1)
    mask_token_id = check.integer("mask_token_id", mask_token_id, 0)
    if (page_table is None) != (page_size is None):
        raise ValueError(f"{check.op}: page_table and page_size must be given together; got "
                         f"{describe(page_table)} and {page_size}")
    if page_table is not None:
        check.dense("page_table", page_table, torch.int32, "(B, max_pages)", (b, None), device)
        page_size = check.integer("page_size", page_size, 1)
    if embedding is not None:
        _check_table(check, "embedding", embedding, FLOATS, device, None)
        if mask_token_id >= _rows_of(embedding):
            raise ValueError(f"{check.op}: mask_token_id must be a row of embedding, below {_rows_of(embedding)}; "
                             f"got {mask_token_id}")
    return q, mask_token_id, 1 if page_size is None else page_size


def _check_out(check, anchor_ids, q, page_table, embedding, out):
    if out is not None and not isinstance(out, PreparedBlock):
        raise TypeError(f"{check.op}: out must be a PreparedBlock; got {describe(out)}")
    shape = (anchor_ids.shape[0], q)
    needed = {"ids": True, "positions": True, "slots": page_table is not None, "rows": embedding is not None}
    made = {}
    for name, wanted in needed.items():
        given = None if out is None else getattr(out, name)
        if out is not None and (given is not None) != wanted:
            source = {"slots": "; page_table decides", "rows": "; embedding decides"}.get(name, "")
            raise ValueError(f"{check.op}: out.{name} must be {'a tensor' if wanted else 'None'}{source}; "
                             f"got {describe(given)}")
        if wanted and name == "rows":
            width, dtype = _check_table(check, "embedding", embedding, FLOATS, anchor_ids.device, given)
            made[name] = check.output("out.rows", given, anchor_ids, (*shape, width), dtype)
        elif wanted:
            made[name] = check.output(f"out.{name}", given, anchor_ids, shape, torch.int64)
    return PreparedBlock(**made) if out is None else out


def _check_values(check, anchor_ids, context_lens, q, block_lens, embedding):
    live = None if block_lens is None else block_lens > 0
    if bool((context_lens < 0).any()):
        raise ValueError(f"{check.op}: context_lens must be at least 0; got {int(context_lens.min())}")
    if block_lens is not None and bool(((block_lens < 0) | (block_lens > q)).any()):
        raise ValueError(f"{check.op}: block_lens must be in [0, {q}]; got {block_lens.tolist()}")
    if embedding is not None:
        anchors = anchor_ids if live is None else anchor_ids[live]
        if bool(((anchors < 0) | (anchors >= _rows_of(embedding))).any()):
            raise ValueError(f"{check.op}: anchor_ids must be in [0, {_rows_of(embedding)}); got {anchors.tolist()}")


def _rows_of(table):
    return table.out_features if isinstance(table, PackedWeight) else table.shape[0]


def _as_matrix_of_rows(check, out, shape):
    """out (..., H) as (R, n, H) for ids (R, n)."""
    if out.dim() == 3 and out.shape[:2] == shape:
        return out
    try:
        return out.view(*shape, out.shape[-1]) if out.numel() else out.new_empty((*shape, out.shape[-1]))
    except RuntimeError:
        raise ValueError(f"{check.op}: out must flatten to rows without a copy; got {describe(out)} with strides "
                         f"{out.stride()}") from None


_prepare_block = define(
    "prepare_block(Tensor anchor_ids, Tensor context_lens, int mask_token_id, Tensor? page_table, int page_size,"
    " Tensor? block_lens, Tensor? embedding, int format, Tensor(a!) ids, Tensor(b!) positions, Tensor(c!)? slots,"
    " Tensor(d!)? rows) -> ()",
    reference.block.prepare_block,
)
_embed_tokens = define("embed_tokens(Tensor ids, Tensor table, int format, Tensor(a!) out) -> ()",
                       reference.block.embed_tokens)
