"""prepare_block and embed_tokens: embedded rows are read and written once, and some 40 bytes a token beside them; the
floor is the launch, or for thousands of tokens those bytes over the copy bandwidth.

A program has a piece of one token's row; the one with the first piece also writes the token's id, position and slot. Of
a table in blocks a piece is a record (_quant.py): its codes lie side by side, and each word of scales is 32 bytes read.

Configurations are compiled without a GPU as tools/aot/launched.py launches them.
"""

import triton
import triton.language as tl

from ..formats import EXACT
from ._quant import PIECE, RECORD, outputs_of, widened

# widest row: (elements a program copies, warps). Estimated.
CONFIGS = {1024: (1024, 2), 1 << 62: (2048, 4)}


def _config(width: int, format: int) -> tuple[int, int]:
    return (RECORD.value, 1) if format else next(found for widest, found in CONFIGS.items() if width <= widest)


def _table(table, format):
    """(rows, stride) of a table, as the kernels take them; of blocks, the stride of records."""
    return (table.shape[1] if format else table.shape[0]), table.stride(0)


@triton.jit
def copy_row(table, rows, width, row_stride, out, token_id, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    """This program's piece of row `token_id` of the table, or zeros where there is none, to out."""
    known = (token_id >= 0) & (token_id < rows)
    if FORMAT:
        _widen_row(table, width, row_stride, out, token_id, known, FORMAT)
    else:
        _copy_row(table, width, row_stride, out, token_id, known, BLOCK)


@triton.jit
def _widen_row(table, width, record_stride, out, token_id, known, FORMAT: tl.constexpr):
    row = tl.where(known, token_id, 0).to(tl.int32) + tl.arange(0, 1)
    record, outputs = table + tl.program_id(1).to(tl.int64) * record_stride, outputs_of(record_stride, FORMAT)
    for i in tl.static_range(RECORD // PIECE):
        at = tl.program_id(1) * RECORD + i * PIECE + tl.arange(0, PIECE)
        elements = widened(record, i, row, outputs, FORMAT, out.dtype.element_ty)
        tl.store(out + at[:, None], tl.where(known, elements, 0.0), (at < width)[:, None])


@triton.jit
def _copy_row(table, width, row_stride, out, token_id, known, BLOCK: tl.constexpr):
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = table + tl.where(known, token_id, 0) * row_stride
    mask = tl.where(known, at < width, False)  # with &, Triton 3.9's interpreter has no mask but numbers
    tl.store(out + at, tl.load(source + at, mask, 0), at < width)


@triton.jit(do_not_specialize=["ids_stride", "positions_stride", "slots_stride", "table_stride", "max_pages", "block"])
def prepare_block_kernel(anchor_ids, context_lens, page_table, block_lens, embedding,
                         ids, positions, slots, rows,
                         anchor_stride, table_stride, embedding_stride, ids_stride, positions_stride, slots_stride,
                         rows_outer_stride, rows_stride, mask_token_id, page_size, max_pages, block, vocab, width,
                         PAGED: tl.constexpr, RAGGED: tl.constexpr, EMBEDDED: tl.constexpr, FORMAT: tl.constexpr,
                         BLOCK: tl.constexpr):
    # The anchor at position 0 of a block, masks after it and in rows past the block's length.
    token = tl.program_id(0).to(tl.int64)
    b, i = token // block, token % block
    live = i >= 0
    if RAGGED:
        live = i < tl.load(block_lens + b)
    token_id = tl.load(anchor_ids + b * anchor_stride)
    token_id = tl.where(live & (i == 0), token_id, mask_token_id)
    # Id, position and slot, by the program with the row's first piece.
    if tl.program_id(1) == 0:
        position = tl.where(live, tl.load(context_lens + b).to(tl.int64) + i, 0)
        tl.store(ids + b * ids_stride + i, token_id)
        tl.store(positions + b * positions_stride + i, position)
        if PAGED:
            index = position // page_size
            owned = live & (position >= 0) & (index < max_pages)
            page = tl.load(page_table + b * table_stride + index, owned, -1).to(tl.int64)
            tl.store(slots + b * slots_stride + i, tl.where(page >= 0, page * page_size + position % page_size, -1))
    if EMBEDDED:
        copy_row(embedding, vocab, width, embedding_stride, rows + b * rows_outer_stride + i * rows_stride,
                 tl.where(live, token_id, -1), FORMAT, BLOCK)


@triton.jit(do_not_specialize=["ids_stride", "inner"])
def embed_tokens_kernel(ids, table, out, ids_stride, table_stride, out_outer_stride, out_stride, inner, vocab, width,
                        FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    r, i = token // inner, token % inner
    copy_row(table, vocab, width, table_stride, out + r * out_outer_stride + i * out_stride,
             tl.load(ids + r * ids_stride + i), FORMAT, BLOCK)


def prepare_block(anchor_ids, context_lens, mask_token_id, page_table, page_size, block_lens, embedding, format, ids,
                  positions, slots, rows):
    paged, embedded = slots is not None, rows is not None
    table_stride, max_pages, slots_stride = 0, 0, 0
    if paged:
        table_stride, max_pages, slots_stride = page_table.stride(0), page_table.shape[1], slots.stride(0)
    vocab, width, embedding_stride, rows_strides, format = 0, 0, 0, (0, 0), format % EXACT
    if embedded:
        (vocab, embedding_stride), width, rows_strides = _table(embedding, format), rows.shape[2], rows.stride()[:2]
    if not ids.numel():
        return
    block, warps = _config(width, format)
    prepare_block_kernel[ids.numel(), max(triton.cdiv(width, block), 1)](
        anchor_ids, context_lens, page_table, block_lens, embedding, ids, positions, slots, rows, anchor_ids.stride(0),
        table_stride, embedding_stride, ids.stride(0), positions.stride(0), slots_stride, *rows_strides, mask_token_id,
        page_size, max_pages, ids.shape[1], vocab, width, PAGED=paged, RAGGED=block_lens is not None,
        EMBEDDED=embedded, FORMAT=format, BLOCK=block, num_warps=warps)


def embed_tokens(ids, table, format, out):
    if not out.numel():
        return
    width, format = out.shape[2], format % EXACT
    (vocab, stride), (block, warps) = _table(table, format), _config(width, format)
    embed_tokens_kernel[ids.numel(), triton.cdiv(width, block)](
        ids, table, out, ids.stride(0), stride, *out.stride()[:2], ids.shape[1], vocab, width, FORMAT=format,
        BLOCK=block, num_warps=warps)
