"""The ops whose limit is memory: norms, activation, RoPE, context K/V, blocks, verification; against torch where it has
an expression for them. Geometries of the drafters of Qwen3-8B and MiniMax-M2.7, few rows and many."""

import torch
import torch.nn.functional as F
from cases import Case, copies_of

import dflash_kernels as dk
from dflash_kernels.ops import activation, block, context, norm, rope, verify

PAGE = 64


def cases(device):
    many = device != "cpu"
    for rows in (64, 8192) if many else (8, 64):
        yield from row_cases(rows)
    yield rope_case(64, 32, 8, 128)
    for tokens in (64, 4096) if many else (64,):
        yield context_case(tokens, 5, 8, 128)
    yield block_case(8, 16, 4096)
    yield verify_case(8, 8, 151936)


def row_cases(rows, width=4096, inner=12288):
    copies = copies_of(norm.bytes(rows, width, 2, add=True))
    xs, residuals = ([torch.randn(rows, width).bfloat16() for _ in range(copies)] for _ in range(2))
    weight, out, sums = torch.rand(width).bfloat16(), *(torch.empty(rows, width, dtype=torch.bfloat16) for _ in "12")

    def run(i):
        return dk.add_rms_norm(xs[i], residuals[i], weight, out=out, residual_out=sums)

    def plain(i):
        h = xs[i] + residuals[i]
        return F.rms_norm(h, (width,), weight, 1e-6), h

    yield Case("add_rms_norm", f"{rows} x {width}", run, norm.bytes(rows, width, 2, add=True), copies,
               norm.flops(rows, width, add=True), {"torch": plain},
               lambda: torch.testing.assert_close(run(0), plain(0), rtol=2e-2, atol=2e-2), headline=rows == 8192)
    copies = copies_of(activation.bytes(rows, inner, 2))
    gates = [torch.randn(rows, 2 * inner).bfloat16() for _ in range(copies)]
    product = torch.empty(rows, inner, dtype=torch.bfloat16)

    def swiglu(i):
        gate, up = gates[i].chunk(2, -1)
        return F.silu(gate) * up

    yield Case("silu_and_mul", f"{rows} x {inner}", lambda i: dk.silu_and_mul(gates[i], out=product),
               activation.bytes(rows, inner, 2), copies, activation.flops(rows, inner), {"torch": swiglu},
               lambda: torch.testing.assert_close(dk.silu_and_mul(gates[0]), swiglu(0), rtol=2e-2, atol=2e-2))


def rope_case(tokens, heads, kv_heads, dim):
    copies = copies_of(rope.bytes(tokens, heads, kv_heads, dim, dim, 2))
    rows = [torch.randn(tokens, (heads + 2 * kv_heads) * dim).bfloat16() for _ in range(copies)]
    positions, table = torch.arange(tokens), torch.randn(tokens, dim)
    weights = [torch.rand(dim).bfloat16() for _ in range(2)]
    return Case("qk_norm_rope", f"{tokens} tokens, {heads}/{kv_heads} heads of {dim}",
                lambda i: dk.qk_norm_rope(rows[i], positions, table, num_heads=heads, num_kv_heads=kv_heads,
                                          head_dim=dim, q_weight=weights[0], k_weight=weights[1]),
                rope.bytes(tokens, heads, kv_heads, dim, dim, 2), copies, rope.flops(tokens, heads, kv_heads, dim, dim))


def context_case(tokens, layers, kv_heads, dim):
    moved = context.bytes(tokens, layers, kv_heads, dim, dim, 2)
    copies = copies_of(moved)
    kv = [torch.randn(tokens, layers * 2 * kv_heads * dim).bfloat16() for _ in range(copies)]
    pages = -(-tokens // PAGE)
    caches = [[dk.PagedKV(*(torch.empty(pages, kv_heads, PAGE, dim, dtype=torch.bfloat16).transpose(1, 2)
                            for _ in "kv")) for _ in range(layers)] for _ in range(copies)]
    positions, slots = torch.arange(tokens), torch.randperm(pages * PAGE)[:tokens]
    table, weights = torch.randn(tokens, dim), torch.rand(layers, dim).bfloat16()
    return Case("write_context_kv", f"{tokens} tokens, {layers} layers, {kv_heads} heads of {dim}",
                lambda i: dk.write_context_kv(kv[i], positions, slots, caches[i], k_weights=weights, cos_sin=table),
                moved, copies, context.flops(tokens, layers, kv_heads, dim, dim), headline=tokens == 4096)


def block_case(requests, width, hidden):
    embedding = torch.randn(151936, hidden).bfloat16()
    anchors, lens = torch.arange(requests), torch.full((requests,), 100, dtype=torch.int32)
    table = torch.arange(requests * 4, dtype=torch.int32).view(requests, 4)
    prepared = dk.prepare_block(anchors, lens, width, 7, page_table=table, page_size=PAGE, embedding=embedding)
    return Case("prepare_block", f"{requests} blocks of {width}, hidden {hidden}",
                lambda i: dk.prepare_block(anchors, lens, width, 7, page_table=table, page_size=PAGE,
                                           embedding=embedding, out=prepared),
                block.bytes(requests, width, hidden=hidden, itemsize=2), 8)


def verify_case(requests, width, vocab):
    moved = verify.bytes(requests, width, vocab=vocab, itemsize=2)
    copies = copies_of(moved)
    logits = [torch.randn(requests, width, vocab).bfloat16() for _ in range(copies)]
    drafts = torch.randint(0, vocab, (requests, width))
    lens = torch.full((requests,), 100, dtype=torch.int32)
    made = dk.verify_greedy(drafts, None, lens, logits=logits[0])

    def check():
        assert torch.equal(made.commit_lens, dk.verify_greedy(drafts, logits[0].argmax(-1), lens).commit_lens)

    return Case("verify_greedy", f"{requests} x {width} x {vocab} logits",
                lambda i: dk.verify_greedy(drafts, None, lens, logits=logits[i], out=made), moved, copies,
                verify.flops(requests, width, vocab=vocab), {"torch argmax alone": lambda i: logits[i].argmax(-1)},
                check, headline=True)
