"""Weights in blocks of 4 to 8 bits on a GPU, against torch's product with the elements that they stand for."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

import dflash_kernels as dk
from bench import cost
from bench.case import Case, Sizes, agreeing
from bench.ops.linear import TOPK, top_of
from bench.random_blocks import blocks
from dflash_kernels import reference
from dflash_kernels.formats import EVERY, RECORD

# outputs, inputs
LAYERS = {"cuda": {"qwen3-8b gate_up": (24576, 4096), "qwen3-8b down": (4096, 12288)},
          "tiny": {"tiny gate_up": (96, 256)}}
HEADS = {"cuda": {"qwen3-8b head": (151936, 4096)}, "tiny": {"tiny head": (200, 256)}}
FORMATS = {"cuda": {"gate_up": tuple(EVERY), "down": ("q4_0", "q8_0", "q6_k", "int4_g128"), "head": ("q8_0", "q6_k")},
           "tiny": {"gate_up": ("q4_0", "int4_g128"), "head": ("q8_0",)}}
ROWS, MANY = {"cuda": 8, "tiny": 3}, {"cuda": (1, 8, 16, 64, 128), "tiny": (20,)}
TOKENS = {"cuda": 128, "tiny": 2}


def cases(sizes: Sizes):
    """Every format with the rows of one request's block, one of them with fewer and more; heads; a lookup."""
    rows = ROWS[sizes.name]
    for name, (n, k) in LAYERS[sizes.name].items():
        for format in FORMATS[sizes.name][name.split()[1]]:
            yield from linear_cases(sizes, name, format, n, k, [rows])
    yield from linear_cases(sizes, name, "q4_k", n, k, MANY[sizes.name])
    for name, (n, k) in HEADS[sizes.name].items():
        for format in FORMATS[sizes.name]["head"]:
            packed, wide = weights_of(sizes, format, n, k)
            yield argmax_case(sizes, name, format, rows, packed, wide)
            yield topk_case(sizes, name, format, rows, packed, wide)
            yield embed_case(sizes, format, TOKENS[sizes.name], packed[0], wide)


def weights_of(sizes: Sizes, format: str, n: int, k: int):
    """Enough copies to exceed every cache, and the elements of the first."""
    first = blocks(format, n, k)
    packed = [dk.pack_weight(first, format=format)]
    copies = sizes.copies_of(int(n * k * EVERY[format].record / RECORD))
    packed += [dk.PackedWeight(packed[0].data.clone(), n, k, format=format, exact=True) for _ in range(copies - 1)]
    return packed, reference.quant.widen(packed[0].data, format, n, k).to(sizes.dtype)


def width(format: str) -> float:
    """Bytes of a weight."""
    return EVERY[format].record / RECORD


def linear_cases(sizes, name, format, n, k, rows):
    packed, wide = weights_of(sizes, format, n, k)
    for count in rows:
        yield linear_case(sizes, name, format, count, packed, wide)


def linear_case(sizes, name, format, rows, packed, wide):
    from dflash_kernels._triton.linear import shared

    n, k = wide.shape
    x, out = sizes.random(rows, k), torch.empty(rows, n, dtype=sizes.dtype)
    chunks = shared(rows, n, k, 2, width(format), x.device, EVERY[format].number)
    problem = SimpleNamespace(expression=lambda x, w: (F.linear(x, w),), args=lambda i: (x, wide))
    return Case("linear", f"{name} {n}x{k} in {format}, {rows} rows", lambda i: dk.linear(x, packed[i], out=out),
                cost.linear_bytes(rows, n, k, 2, width(format), chunks), len(packed), cost.linear_flops(rows, n, k),
                sizes.peers_of("linear", problem),
                agreeing(lambda: F.linear(x.float(), wide.float()), lambda: F.linear(x, wide)))


def argmax_case(sizes, name, format, rows, packed, wide):
    n, k = wide.shape
    x, ids, values = sizes.random(rows, k), torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    problem = SimpleNamespace(expression=lambda x, w: (F.linear(x, w).argmax(-1),), args=lambda i: (x, wide))
    return Case("lm_head_argmax", f"{name} {n}x{k} in {format}, {rows} rows",
                lambda i: dk.lm_head_argmax(x, packed[i], out_ids=ids, out_values=values),
                cost.lm_head_bytes(rows, n, k, 2, width(format)), len(packed), cost.lm_head_flops(rows, n, k),
                sizes.peers_of("lm_head_argmax", problem), lambda got: near_the_top(x, wide, got[0][:, None]))


def topk_case(sizes, name, format, rows, packed, wide):
    n, k = wide.shape
    x, lse = sizes.random(rows, k), torch.empty(rows)
    ids, values = torch.empty(rows, TOPK, dtype=torch.int64), torch.empty(rows, TOPK)

    problem = SimpleNamespace(expression=top_of, args=lambda i: (x, wide))
    return Case("lm_head_topk", f"{name} {n}x{k} in {format}, {rows} rows, K {TOPK}",
                lambda i: dk.lm_head_topk(x, packed[i], TOPK, out_ids=ids, out_values=values, out_lse=lse),
                cost.lm_head_bytes(rows, n, k, 2, width(format), k=TOPK, lse=True), len(packed),
                cost.lm_head_flops(rows, n, k), sizes.peers_of("lm_head_topk", problem),
                lambda got: near_the_top(x, wide, got[0]))


def near_the_top(x, wide, ids):
    """Roundings differ, so what is compared is how large the logits of the chosen ids are."""
    exact, rounded = F.linear(x.float(), wide.float()), F.linear(x, wide).float()
    gap = (exact.topk(ids.shape[1]).values - exact.gather(1, ids)).abs().max()
    assert gap <= 2 * (rounded - exact).abs().max() + 1e-6, f"a logit is {gap:.3g} off"


def embed_case(sizes, format, tokens, packed, wide):
    n, k = wide.shape
    ids, out = torch.randint(0, n, (1, tokens)), torch.empty(1, tokens, k, dtype=sizes.dtype)
    problem = SimpleNamespace(expression=lambda ids, w: (F.embedding(ids, w),), args=lambda i: (ids, wide))
    moved = int(tokens * (8 + k * (width(format) + 2)))
    return Case("embed_tokens", f"{tokens} rows of {n} x {k} in {format}",
                lambda i: dk.embed_tokens(ids, packed, out=out), moved, 1,
                peers=sizes.peers_of("embed_tokens", problem),
                check=agreeing(lambda: wide[ids].double(), lambda: wide[ids]))
