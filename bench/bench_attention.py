"""block_attention at SmolLM2's and Qwen3-8B's geometry, against torch's SDPA, which is given K/V already
gathered and contiguous."""

import torch
import torch.nn.functional as F
from cases import Case, copies_of

import dflash_kernels as dk
from dflash_kernels.ops import attention as op

GEOMETRIES = {"smollm2": (9, 3, 64), "qwen3-8b": (32, 8, 128)}
PAGE = 16


def cases():
    for name, (heads, kv_heads, dim) in GEOMETRIES.items():
        for context in (512, 4096):
            for width in (1, 8):
                yield case(name, heads, kv_heads, dim, context, width)


def case(name, heads, kv_heads, dim, context, width):
    pages = -(-context // PAGE)
    lens = torch.tensor([context], dtype=torch.int32)
    table = torch.randperm(pages).to(torch.int32)[None]
    inputs, peers = [], []
    copies = copies_of(op.bytes(context, width, heads, kv_heads, dim, 2))
    for _ in range(copies):
        qkv = torch.randn(1, width, heads + 2 * kv_heads, dim).bfloat16()
        q, k, v = qkv.split((heads, kv_heads, kv_heads), 2)
        stored = [torch.randn(pages, kv_heads, PAGE, dim).bfloat16().transpose(1, 2) for _ in range(2)]
        inputs.append((q, k, v, dk.PagedKV(*stored)))
        whole = [torch.cat((s[table[0].long()].reshape(1, -1, kv_heads, dim)[:, :context], own), 1).transpose(1, 2)
                 .contiguous() for s, own in zip(stored, (k, v), strict=True)]
        peers.append((q.transpose(1, 2).contiguous(), *whole))
    mask = torch.ones(width, context + width, dtype=torch.bool).tril(context)
    out = torch.empty(1, width, heads, dim, dtype=torch.bfloat16)

    def run(i):
        q, k, v, cache = inputs[i]
        return dk.block_attention(q, k, v, cache, table, lens, causal=True, out=out)

    def sdpa(i):
        return F.scaled_dot_product_attention(*peers[i], attn_mask=mask, enable_gqa=True)

    def check():
        torch.testing.assert_close(run(0), sdpa(0).transpose(1, 2), rtol=2e-2, atol=2e-2)

    pairs = sum(context + i + 1 for i in range(width))
    return Case("block_attention", f"{name} context {context}, Q {width}", run,
                op.bytes(context, width, heads, kv_heads, dim, 2), copies, op.flops(pairs, heads, dim),
                {"torch": sdpa}, check, headline=context == 512 and name == "smollm2")
