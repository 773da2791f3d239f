"""linear and the LM heads for the few rows of decoding, against torch's library GEMM."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

import dflash_kernels as dk
from bench import cost
from bench.case import Case, Sizes, agreeing

# outputs, inputs
GEOMETRIES = {"cpu": {"smollm2 head": (49152, 576), "smollm2 gate_up": (3072, 576), "smollm2 down": (576, 1536),
                  "qwen3-8b o": (4096, 4096)},
          "cuda": {"qwen3-8b gate_up": (24576, 4096), "qwen3-8b down": (4096, 12288), "qwen3-8b head": (151936, 4096),
                   "minimax-m2.7 fc": (3072, 15360), "minimax-m2.7 head": (200064, 3072)},
          "tiny": {"tiny gate_up": (96, 64), "tiny down": (20, 1100), "tiny head": (200, 64)}}
ROWS = {"cpu": (1, 4, 8, 16), "cuda": (8, 64, 128), "tiny": (3,)}
TOPK_GEOMETRIES = {"cpu": {"smollm2 head": (49152, 576), "qwen3-0.6b head": (151936, 1024)},
               "cuda": {"smollm2 head": (49152, 576), "qwen3-8b head": (151936, 4096)},
               "tiny": {"tiny head": (200, 64)}}
TOPK_ROWS, TOPK = {"cpu": (7, 56), "cuda": (7, 56), "tiny": (3,)}, 16  # drafted rows of one request of 8, and of eight


def cases(sizes: Sizes):
    for name, (n, k) in GEOMETRIES[sizes.name].items():
        unpacked, packed = weights_of(sizes, n, k)
        for rows in ROWS[sizes.name]:
            yield linear_case(sizes, name, rows, unpacked, packed)
            if name.endswith("head"):
                yield head_case(sizes, name, rows, unpacked, packed)
            yield int8_case(sizes, name, rows, unpacked)
    for name, (n, k) in TOPK_GEOMETRIES[sizes.name].items():
        unpacked, packed = weights_of(sizes, n, k)
        for rows in TOPK_ROWS[sizes.name]:
            yield topk_case(sizes, name, rows, unpacked, packed)


def weights_of(sizes, n, k):
    """Enough copies to exceed every cache, unpacked and packed."""
    unpacked = [(torch.randn(n, k) / k**0.5).to(sizes.dtype) for _ in range(sizes.copies_of(n * k * 2))]
    return unpacked, [dk.pack_weight(w) for w in unpacked]


def bytes_of(sizes, rows, n, k, weight_itemsize=2):
    """The bytes moved, including the partial sums that a GPU writes and reads when it splits K."""
    chunks = 0
    if sizes.device == "cuda":
        from dflash_kernels._triton.linear import shared

        chunks = shared(rows, n, k, 2, weight_itemsize, torch.device("cuda", torch.cuda.current_device()))
    return cost.linear_bytes(rows, n, k, 2, weight_itemsize, chunks)


def torch_packed(sizes, x, weights, then=lambda y: y):
    """torch's product with weights that oneDNN has laid out for it beforehand, as ours are."""
    if sizes.device != "cpu" or sizes.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return {}
    laid_out = [torch.ops.mkldnn._reorder_linear_weight(w, len(x)) for w in weights]
    product = torch.ops.mkldnn._linear_pointwise
    return {"torch, packed": lambda i: (then(product(x, laid_out[i], None, "none", [], "")),)}


def linear_case(sizes, name, rows, weights, packed):
    n, k = weights[0].shape
    x, out = sizes.random(rows, k), torch.empty(rows, n, dtype=sizes.dtype)
    problem = SimpleNamespace(expression=lambda x, w: (F.linear(x, w),), args=lambda i: (x, weights[i]))
    return Case("linear", f"{name} {n}x{k}, {rows} rows", lambda i: dk.linear(x, packed[i], out=out),
                bytes_of(sizes, rows, n, k), len(packed), cost.linear_flops(rows, n, k),
                sizes.peers_of("linear", problem) | torch_packed(sizes, x, weights),
                agreeing(lambda: F.linear(x.float(), weights[0].float()), lambda: F.linear(x, weights[0])),
                headline=rows == 8 and "gate_up" in name)


def int8_case(sizes, name, rows, weights):
    """An 8-bit weight, against torch converting it, and on a CPU against torch's own product for such weights."""
    n, k = weights[0].shape
    x, out = sizes.random(rows, k), torch.empty(rows, n, dtype=sizes.dtype)
    quantized = [dk.quantize_weight(w) for w in weights]
    packed, halves = [dk.pack_weight(*q) for q in quantized], [(q, scales.to(sizes.dtype)) for q, scales in quantized]
    problem = SimpleNamespace(
        expression=lambda x, q, s: (F.linear(x, q.to(x.dtype)) * s,), args=lambda i: (x, *halves[i])
    )
    peers = sizes.peers_of("linear", problem)
    if sizes.device == "cpu" and sizes.dtype == torch.bfloat16:
        peers["torch int8"] = lambda i: (torch.ops.aten._weight_int8pack_mm(x, *halves[i]),)
    q, scales = quantized[0]
    wide = q * scales[:, None]
    return Case("linear", f"{name} {n}x{k} in 8 bits, {rows} rows", lambda i: dk.linear(x, packed[i], out=out),
                bytes_of(sizes, rows, n, k, 1), len(packed), cost.linear_flops(rows, n, k), peers,
                agreeing(lambda: F.linear(x.float(), wide), lambda: F.linear(x, q.to(x.dtype)) * halves[0][1]),
                headline=rows == 8 and "gate_up" in name)


def head_case(sizes, name, rows, weights, packed):
    n, k = weights[0].shape
    x, ids, values = sizes.random(rows, k), torch.empty(rows, dtype=torch.int64), torch.empty(rows)

    def check(got):
        """Roundings differ, so what is compared is how large the logits of the chosen ids are."""
        exact, rounded = (F.linear(x.to(t), weights[0].to(t)).float() for t in (torch.float32, sizes.dtype))
        gap = exact.amax(-1) - exact.gather(1, got[0][:, None])[:, 0]
        assert (gap <= 2 * (rounded - exact).abs().amax(-1)).all(), f"a logit is {gap.max():.3g} under the largest"

    problem = SimpleNamespace(expression=lambda x, w: (F.linear(x, w).argmax(-1),), args=lambda i: (x, weights[i]))
    return Case("lm_head_argmax", f"{name} {n}x{k}, {rows} rows",
                lambda i: dk.lm_head_argmax(x, packed[i], out_ids=ids, out_values=values),
                cost.lm_head_bytes(rows, n, k, 2), len(packed), cost.lm_head_flops(rows, n, k),
                sizes.peers_of("lm_head_argmax", problem) | torch_packed(sizes, x, weights, lambda y: y.argmax(-1)),
                check, headline=rows in (8, 128))


def top_of(x, w):
    """What lm_head_topk gives, by torch."""
    logits = F.linear(x, w)
    top = logits.topk(TOPK)
    return top.indices, top.values.float(), logits.float().logsumexp(-1)


def topk_case(sizes, name, rows, weights, packed):
    n, k = weights[0].shape
    x, lse = sizes.random(rows, k), torch.empty(rows)
    ids, values = torch.empty(rows, TOPK, dtype=torch.int64), torch.empty(rows, TOPK)

    def check(got):
        """Ids of near ties differ with the rounding, so what is compared is the logits that they stand for."""
        exact, rounded = (F.linear(x.to(t), weights[0].to(t)).float() for t in (torch.float32, sizes.dtype))
        off = 2 * (rounded - exact).abs().amax() + 1e-6
        assert ((exact.gather(1, got[0]) - exact.topk(TOPK).values).abs() <= off).all(), "other candidates"
        assert ((got[1] - exact.topk(TOPK).values).abs() <= off).all(), "other logits"
        assert ((got[2] - exact.logsumexp(-1)).abs() <= off).all(), "another log-sum-exp"

    problem = SimpleNamespace(expression=top_of, args=lambda i: (x, weights[i]))
    return Case("lm_head_topk", f"{name} {n}x{k}, {rows} rows, K {TOPK}",
                lambda i: dk.lm_head_topk(x, packed[i], TOPK, out_ids=ids, out_values=values, out_lse=lse),
                cost.lm_head_bytes(rows, n, k, 2, k=TOPK, lse=True), len(packed), cost.lm_head_flops(rows, n, k),
                sizes.peers_of("lm_head_topk", problem), check)
