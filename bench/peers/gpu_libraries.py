"""Peers from PyTorch, FlashInfer and flash-attn for our ops on a GPU."""

import importlib
from types import ModuleType

import torch

from bench.peers.gpu_peers import Absent, peer

COMPILED = ("add_rms_norm", "silu_and_mul", "qk_norm_rope", "prepare_block", "verify_greedy")
WORKSPACE = 128 << 20


def imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # what a broken installation raises is its own
        raise Absent(f"{name} does not import ({type(error).__name__})") from error


def compiled(p):
    """torch.compile of the problem's expression."""
    function = torch.compile(p.expression, fullgraph=True, dynamic=False)
    return lambda i: function(*p.args(i))


for _op in COMPILED:
    peer(_op, "torch.compile")(compiled)


@peer("block_attention", "flex attention")
def flex(p):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    context, width = p.context, p.width
    if not p.headline:
        raise Absent("it compiles for every shape, so it is timed only in the headline cases")
    mask = create_block_mask(lambda b, h, q, k: k <= q + context, None, None, width, context + width,
                             device=p.gathered[0][0].device)
    attend = torch.compile(flex_attention, dynamic=False)
    return lambda i: (attend(*p.gathered[i], block_mask=mask, enable_gqa=True).transpose(1, 2),)


@peer("block_attention", "flash-attn")
def flash_attention(p):
    """Over the gathered K/V. Its causal mask ends at the last key, as the block's does."""
    attend = imported("flash_attn").flash_attn_func
    rows = [tuple(t.transpose(1, 2) for t in copy) for copy in p.gathered]
    return lambda i: (attend(*rows[i], causal=True),)


@peer("block_attention", "flashinfer")
def flashinfer_attention(p):
    """Over pages that also hold the block's own K/V, which its engines write there first."""
    library, (batch, heads, width, dim) = imported("flashinfer"), p.gathered[0][0].shape
    kv_heads, pages = p.gathered[0][1].shape[1], -(-(p.context + p.width) // p.page)
    q, paged = [], []
    for query, *kv in p.gathered:
        q.append(query.transpose(1, 2).reshape(-1, heads, dim))
        padded = [torch.zeros(batch, pages * p.page, kv_heads, dim, dtype=query.dtype) for _ in kv]
        for whole, part in zip(padded, kv, strict=True):
            whole[:, :part.shape[2]] = part.transpose(1, 2)
        paged.append(tuple(t.view(-1, p.page, kv_heads, dim) for t in padded))
    run = library.BatchPrefillWithPagedKVCacheWrapper(torch.zeros(WORKSPACE, dtype=torch.uint8), "NHD")
    each = torch.arange(batch + 1).int()
    last = torch.full((batch,), (p.context + p.width - 1) % p.page + 1).int()
    run.plan(each * width, each * pages, torch.arange(batch * pages).int(), last, heads, kv_heads, dim, p.page,
             causal=True, q_data_type=q[0].dtype, kv_data_type=q[0].dtype)
    return lambda i: (run.run(q[i], paged[i]).view(batch, width, heads, dim),)


@peer("add_rms_norm", "flashinfer")
def flashinfer_norm(p):
    """In place: adds x to the residual, and writes the norm into x."""
    norm = imported("flashinfer").fused_add_rmsnorm
    copies = [tuple(t.clone() for t in p.args(i)[:2]) for i in range(p.copies)]

    def call(i):
        norm(*copies[i], p.weight, 1e-6)
        return copies[i]

    return call


@peer("silu_and_mul", "flashinfer")
def flashinfer_silu(p):
    activate = imported("flashinfer").silu_and_mul
    return lambda i: (activate(*p.args(i)),)
