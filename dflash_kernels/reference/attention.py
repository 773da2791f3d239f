"""Attention of a block of queries over paged context and the block's own keys."""

import torch

from ._fp8 import dequantised
from ._wide import wide


def block_attention(q, k, v, k_cache, v_cache, k_scale, v_scale, page_table, context_lens, block_lens, context_starts,
                    block_starts, max_block, scale, causal, left, right, sinks, softcap, out):
    group = q.shape[2] // k.shape[2]
    for b in range(len(context_lens)):
        context = max(int(context_lens[b]), 0)
        rows = max_block if block_lens is None else min(max(int(block_lens[b]), 0), max_block)
        block = b, slice(0, rows)
        if block_starts is not None:
            first = min(max(int(block_starts[b]), 0), q.shape[1])
            rows = min(rows, q.shape[1] - first)
            block = 0, slice(first, first + rows)
        if rows == 0:
            continue
        start = 0 if context_starts is None else min(max(int(context_starts[b]), 0), context)
        keys, values = wide(k[block]), wide(v[block])
        if k_cache is None:
            start = context
        else:
            if start < context and context > page_table.shape[1] * k_cache.shape[1]:
                start = context - 1  # without a page, and whoever sees any of the context sees it: nothing is walked
            keys = torch.cat([_context_rows(k_cache, k_scale, page_table[b], start, context), keys])
            values = torch.cat([_context_rows(v_cache, v_scale, page_table[b], start, context), values])
        key_at = torch.arange(start, context + rows, device=q.device)
        query_at = torch.arange(context, context + rows, device=q.device)[:, None]
        visible = torch.ones((rows, len(key_at)), dtype=torch.bool, device=q.device)
        if causal:
            visible &= key_at <= query_at
        if left >= 0:
            visible &= key_at >= query_at - left
        if right >= 0:
            visible &= key_at <= query_at + right
        score = torch.einsum("qhd,khd->hqk", wide(q[block]), keys.repeat_interleave(group, 1)) * scale
        if softcap > 0:
            score = softcap * torch.tanh(score / softcap)
        sink = None if sinks is None else wide(sinks)[:, None, None]
        out[block] = _attend(score, visible, values.repeat_interleave(group, 1), sink).to(out.dtype)


def _context_rows(cache, scale, pages, start, stop):
    """Rows of positions [start, stop), float32. A page that does not exist gives NaN: loud, and nothing is read."""
    at = torch.arange(start, stop, device=cache.device)
    index = at // cache.shape[1]
    page = pages[index.clamp(max=len(pages) - 1)].long() if len(pages) else torch.full_like(index, -1)
    exists = (index < len(pages)) & (page >= 0) & (page < cache.shape[0])
    found = cache[page[exists], at[exists] % cache.shape[1]]
    found = dequantised(found, scale) if cache.dtype == torch.float8_e4m3fn else wide(found)
    rows = found.new_full((len(at), *cache.shape[2:]), float("nan"))
    rows[exists] = found
    return rows


def _attend(score, visible, values, sink):
    """score (Hq, rows, S), visible (rows, S), values (S, Hq, D), sink (Hq, 1, 1) -> (rows, Hq, D)."""
    score = score.masked_fill(~visible, -torch.inf)
    top = score.amax(-1, keepdim=True)
    if sink is not None:
        top = torch.maximum(top, sink)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weight = torch.exp(score - top)
    total = weight.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - top)
    # A value that is not finite may reach only the rows that see it, and 0 * NaN is NaN: such keys are added apart.
    finite = torch.isfinite(values).flatten(1).all(1)
    result = torch.einsum("hqk,khd->hqd", weight, values.masked_fill(~finite[:, None, None], 0.0))
    for j in (~finite).nonzero().flatten().tolist():
        term = weight[:, :, j, None] * values[j][:, None]
        result = torch.where(visible[:, j, None], result + term, result)
    return (result / total.masked_fill(total == 0, 1.0)).transpose(0, 1)
