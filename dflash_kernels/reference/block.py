"""The block a draft pass starts from: ids, positions, cache slots, embedded rows."""

import torch

from . import quant


def prepare_block(anchor_ids, context_lens, mask_token_id, page_table, page_size, block_lens, embedding, format, ids,
                  positions, slots, rows):
    q = ids.shape[1]
    i = torch.arange(q, device=ids.device)
    live = torch.ones_like(ids, dtype=torch.bool) if block_lens is None else i < block_lens[:, None]
    new_ids = torch.where((i == 0) & live, anchor_ids[:, None], mask_token_id)
    new_positions = torch.where(live, context_lens[:, None].long() + i, 0)
    if slots is not None:
        slots.copy_(_slots(new_positions, live, page_table, page_size))
    if rows is not None:
        embed_tokens(torch.where(live, new_ids, -1), embedding, format, rows)
    ids.copy_(new_ids)
    positions.copy_(new_positions)


def embed_tokens(ids, table, format, out):
    if format:
        rows = table.shape[1] if table.dim() == 3 else table.shape[0] * quant.OUTPUTS
        table = quant.widen(table, quant.name_of(format), rows, out.shape[-1]).to(out.dtype)
    known = (ids >= 0) & (ids < table.shape[0])
    if table.shape[0] == 0:
        out.zero_()
        return
    out.copy_(torch.where(known[..., None], table[torch.where(known, ids, 0)], 0))


def _slots(positions, live, page_table, page_size):
    max_pages = page_table.shape[1]
    page_index = positions // page_size
    live = live & (positions >= 0) & (page_index < max_pages)
    if max_pages == 0:
        return torch.full_like(positions, -1)
    page = page_table.long().gather(1, torch.where(live, page_index, 0))
    return torch.where(live & (page >= 0), page * page_size + positions % page_size, -1)
