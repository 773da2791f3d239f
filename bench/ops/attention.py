"""block_attention at several models' geometries.

Its peers attend over K/V that are already gathered and contiguous: torch's SDPA, and on a GPU flex attention,
flash-attn and FlashInfer (which has pages of its own).
"""

from itertools import product
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import dflash_kernels as dk
from bench import cost
from bench.case import Case, Sizes, agreeing

# query heads, key/value heads, head dim
GEOMETRIES = {"cpu": {"smollm2": (9, 3, 64), "qwen3-8b": (32, 8, 128)},
              "cuda": {"qwen3-8b": (32, 8, 128), "minimax-m2.7": (48, 8, 128)},
              "tiny": {"tiny": (4, 2, 64)}}
CONTEXTS = {"cpu": (512, 1024, 4096), "cuda": (1024, 8192, 32768), "tiny": (40,)}
WIDTHS = {"cpu": (1, 8), "cuda": (8,), "tiny": (3,)}
BATCHES = {"cpu": (1,), "cuda": (1, 8, 64), "tiny": (1, 2)}
PAGES = {"cpu": (16, 64), "cuda": (16,), "tiny": (16,)}  # engines', and our loop's
HEADLINES = {("smollm2", 512), ("qwen3-8b", 8192), ("tiny", 40)}


def cases(sizes: Sizes):
    found = GEOMETRIES[sizes.name]
    more = (table[sizes.name] for table in (CONTEXTS, WIDTHS, BATCHES, PAGES))
    for name, context, width, batch, page in product(found, *more):
        if batch * context <= 1 << 20:
            yield case(sizes, name, *found[name], context, width, batch, page)


def case(sizes, name, heads, kv_heads, dim, context, width, batch, page):
    pages = -(-context // page)
    lens = torch.full((batch,), context, dtype=torch.int32)
    table = torch.randperm(batch * pages).to(torch.int32).view(batch, pages)
    inputs, gathered = [], []
    moved = batch * cost.attention_bytes(context, width, heads, kv_heads, dim, 2)
    copies = sizes.copies_of(moved)
    for _ in range(copies):
        qkv = sizes.random(batch, width, heads + 2 * kv_heads, dim)
        q, k, v = qkv.split((heads, kv_heads, kv_heads), 2)
        stored = [sizes.random(batch * pages, kv_heads, page, dim).transpose(1, 2) for _ in range(2)]
        inputs.append((q, k, v, dk.PagedKV(*stored)))
        whole = [torch.cat((s[table.long()].reshape(batch, -1, kv_heads, dim)[:, :context], own), 1).transpose(1, 2)
                 .contiguous() for s, own in zip(stored, (k, v), strict=True)]
        gathered.append((q.transpose(1, 2).contiguous(), *whole))
    mask = torch.ones(width, context + width, dtype=torch.bool).tril(context)
    out = torch.empty(batch, width, heads, dim, dtype=sizes.dtype)

    def run(i):
        q, k, v, cache = inputs[i]
        return dk.block_attention(q, k, v, cache, table, lens, causal=True, out=out)

    def expression(q, k, v):
        return (F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2),)

    # Of the first and the last request: float32 copies of all of them may not fit.
    ends = [0, batch - 1]
    some = [t[ends] for t in gathered[0]]
    agrees = agreeing(lambda: expression(*(t.float() for t in some)), lambda: expression(*some))
    problem = SimpleNamespace(
        expression=expression,
        args=lambda i: gathered[i],
        gathered=gathered,
        context=context,
        width=width,
        page=page,
        headline=width > 1 and page == 16 and (name, context) in HEADLINES,
    )
    pairs = batch * sum(context + i + 1 for i in range(width))
    more = (f", {batch} requests" if batch > 1 else "") + (f", pages of {page}" if page != 16 else "")
    return Case("block_attention", f"{name} context {context}, Q {width}{more}", run, moved, copies,
                cost.attention_flops(pairs, heads, dim), sizes.peers_of("block_attention", problem),
                lambda got: agrees((got[0][ends],)), headline=problem.headline)
