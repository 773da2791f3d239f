"""linear and the heads for the few rows of decoding, against torch's library GEMM."""

import torch
import torch.nn.functional as F
from cases import Case, copies_of

import dflash_kernels as dk
from dflash_kernels.ops import head as head_op
from dflash_kernels.ops import linear as linear_op

SHAPES = {"smollm2 head": (49152, 576), "smollm2 gate_up": (3072, 576), "smollm2 down": (576, 1536),
          "qwen3-8b o": (4096, 4096)}
ON_GPU = {"qwen3-8b gate_up": (24576, 4096), "qwen3-8b down": (4096, 12288), "qwen3-8b head": (151936, 4096),
          "minimax-m2.7 fc": (3072, 15360), "minimax-m2.7 head": (200064, 3072)}
ROWS = (1, 4, 8, 16)
ROWS_ON_GPU = (8, 64, 128)
TOPK_SHAPES = {"smollm2 head": (49152, 576), "qwen3-0.6b head": (151936, 1024)}
TOPK_ON_GPU = {"smollm2 head": (49152, 576), "qwen3-8b head": (151936, 4096)}
TOPK_ROWS, TOPK = (7, 56), 16  # the drafted rows of one request of block 8, and of eight


def cases(device):
    shapes, row_counts = (SHAPES, ROWS) if device == "cpu" else (ON_GPU, ROWS_ON_GPU)
    for name, (n, k) in shapes.items():
        plain, packed = weights(n, k)
        for rows in row_counts:
            yield linear_case(name, rows, plain, packed)
            if name.endswith("head"):
                yield head_case(name, rows, plain, packed)
    for name, (n, k) in (TOPK_SHAPES if device == "cpu" else TOPK_ON_GPU).items():
        plain, packed = weights(n, k)
        for rows in TOPK_ROWS:
            yield topk_case(name, rows, plain, packed)


def weights(n, k):
    """As many copies as no cache keeps, plain and packed."""
    plain = [(torch.randn(n, k) / k**0.5).bfloat16() for _ in range(copies_of(n * k * 2))]
    return plain, [dk.pack_weight(w) for w in plain]


def linear_case(name, rows, plain, packed):
    n, k = plain[0].shape
    x, out = torch.randn(rows, k).bfloat16(), torch.empty(rows, n, dtype=torch.bfloat16)

    def check():
        torch.testing.assert_close(dk.linear(x, packed[0]), F.linear(x, plain[0]), rtol=2e-2, atol=2e-2)

    return Case("linear", f"{name} {n}x{k}, {rows} rows", lambda i: dk.linear(x, packed[i], out=out),
                linear_op.bytes(rows, n, k, 2), len(packed), linear_op.flops(rows, n, k),
                {"torch": lambda i: F.linear(x, plain[i])}, check, headline=rows in (1, 8) and "gate_up" in name)


def head_case(name, rows, plain, packed):
    n, k = plain[0].shape
    x, ids, values = torch.randn(rows, k).bfloat16(), torch.empty(rows, dtype=torch.int64), torch.empty(rows)

    def check():
        assert torch.equal(dk.lm_head_argmax(x, packed[0])[0], dk.linear(x, packed[0]).argmax(-1))

    return Case("lm_head_argmax", f"{name} {n}x{k}, {rows} rows",
                lambda i: dk.lm_head_argmax(x, packed[i], out_ids=ids, out_values=values),
                head_op.bytes(rows, n, k, 2), len(packed), head_op.flops(rows, n, k),
                {"torch": lambda i: F.linear(x, plain[i]).argmax(-1)}, check, headline=rows in (1, 8, 16, 128))


def topk_case(name, rows, plain, packed):
    n, k = plain[0].shape
    x, best, value = torch.randn(rows, k).bfloat16(), torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    ids, values, lse = torch.empty(rows, TOPK, dtype=torch.int64), torch.empty(rows, TOPK), torch.empty(rows)

    def check():
        dk.lm_head_topk(x, packed[0], TOPK, out_ids=ids, out_values=values, out_lse=lse)
        logits = dk.linear(x, packed[0]).float()
        torch.testing.assert_close(values, logits.topk(TOPK).values, rtol=0, atol=0)
        torch.testing.assert_close(logits.gather(1, ids), values, rtol=0, atol=0)
        torch.testing.assert_close(lse, logits.logsumexp(-1))

    def in_torch(i):
        logits = F.linear(x, plain[i])
        return logits.topk(TOPK), logits.float().logsumexp(-1)

    return Case("lm_head_topk", f"{name} {n}x{k}, {rows} rows, K {TOPK}",
                lambda i: dk.lm_head_topk(x, packed[i], TOPK, out_ids=ids, out_values=values, out_lse=lse),
                head_op.bytes(rows, n, k, 2, k=TOPK), len(packed), head_op.flops(rows, n, k),
                {"lm_head_argmax": lambda i: dk.lm_head_argmax(x, packed[i], out_ids=best, out_values=value),
                 "torch": in_torch}, check)
