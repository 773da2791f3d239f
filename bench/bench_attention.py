"""block_attention at SmolLM2's and Qwen3-8B's geometry, against torch's SDPA, which is given K/V already
gathered and contiguous."""

import torch
import torch.nn.functional as F
from cases import Case, copies_of

import dflash_kernels as dk
from dflash_kernels.ops import attention as op

GEOMETRIES = {"smollm2": (9, 3, 64), "qwen3-8b": (32, 8, 128)}
ON_GPU = {"qwen3-8b": (32, 8, 128), "minimax-m2.7": (48, 8, 128)}
PAGE = 16


def cases(device):
    if device == "cpu":
        shapes, contexts, widths, batches = GEOMETRIES, (512, 4096), (1, 8), (1,)
    else:
        shapes, contexts, widths, batches = ON_GPU, (1024, 8192, 32768), (8,), (1, 8, 64)
    for name, (heads, kv_heads, dim) in shapes.items():
        for context in contexts:
            for width in widths:
                for batch in batches:
                    if batch * context <= 1 << 20:
                        yield case(name, heads, kv_heads, dim, context, width, batch, headline=(
                            context == 512 and name == "smollm2" or context == 8192 and name == "qwen3-8b"))


def case(name, heads, kv_heads, dim, context, width, batch, headline):
    pages = -(-context // PAGE)
    lens = torch.full((batch,), context, dtype=torch.int32)
    table = torch.randperm(batch * pages).to(torch.int32).view(batch, pages)
    inputs, peers = [], []
    moved = batch * op.bytes(context, width, heads, kv_heads, dim, 2)
    copies = copies_of(moved)
    for _ in range(copies):
        qkv = torch.randn(batch, width, heads + 2 * kv_heads, dim).bfloat16()
        q, k, v = qkv.split((heads, kv_heads, kv_heads), 2)
        stored = [torch.randn(batch * pages, kv_heads, PAGE, dim).bfloat16().transpose(1, 2) for _ in range(2)]
        inputs.append((q, k, v, dk.PagedKV(*stored)))
        whole = [torch.cat((s[table.long()].reshape(batch, -1, kv_heads, dim)[:, :context], own), 1).transpose(1, 2)
                 .contiguous() for s, own in zip(stored, (k, v), strict=True)]
        peers.append((q.transpose(1, 2).contiguous(), *whole))
    mask = torch.ones(width, context + width, dtype=torch.bool).tril(context)
    out = torch.empty(batch, width, heads, dim, dtype=torch.bfloat16)

    def run(i):
        q, k, v, cache = inputs[i]
        return dk.block_attention(q, k, v, cache, table, lens, causal=True, out=out)

    def sdpa(i):
        return F.scaled_dot_product_attention(*peers[i], attn_mask=mask, enable_gqa=True)

    def check():
        torch.testing.assert_close(run(0), sdpa(0).transpose(1, 2), rtol=2e-2, atol=2e-2)

    pairs = batch * sum(context + i + 1 for i in range(width))
    requests = "" if batch == 1 else f", {batch} requests"
    return Case("block_attention", f"{name} context {context}, Q {width}{requests}", run, moved, copies,
                op.flops(pairs, heads, dim), {"torch": sdpa}, check, headline)
