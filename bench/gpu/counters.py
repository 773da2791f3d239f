"""Runs five kernels once each between the profiler's start and stop, for Nsight Compute: python -m bench.gpu.counters
"""

import sys

import torch

import dflash_kernels as dk
from bench.case import Sizes
from bench.random_model import random_on


def problems(sizes: Sizes):
    """The calls, and the kernels that they launch."""
    make = random_on("cuda", sizes.dtype)
    # weight's rows and columns, heads, key heads, head dim; rows of x; requests and their contexts; wide rows
    n, k, heads, kv_heads, dim, rows, batches, wide = (
        (96, 1100, 2, 1, 16, (3,), ((1, 40),), 200) if sizes.tiny else
        (4096, 12288, 32, 8, 128, (16, 128), ((1, 8192), (64, 1024)), 10_000))
    weight = dk.pack_weight(make(n, k))
    for count in rows:
        x = make(count, k)
        yield f"linear, {count} rows", lambda x=x: dk.linear(x, weight)
    for batch, context in batches:
        page = 16
        pages = -(-context // page)
        cache = dk.PagedKV(*(make(batch * pages, kv_heads, page, dim).transpose(1, 2) for _ in range(2)))
        table = torch.arange(batch * pages, dtype=torch.int32, device="cuda").view(batch, pages)
        lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        q, k_own, v_own = (make(batch, 8, count, dim) for count in (heads, kv_heads, kv_heads))
        yield (f"block_attention, {batch} x context {context}",
               lambda a=(q, k_own, v_own, cache, table, lens): dk.block_attention(*a, causal=True))
    x, ones = make(64, wide), make(wide)
    yield f"rms_norm, rows of {wide}", lambda: dk.rms_norm(x, ones)


def main() -> None:
    tiny = "--tiny" in sys.argv
    for name, call in problems(Sizes("cuda", tiny)):
        call()
        torch.cuda.synchronize()
        if not tiny:
            torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        if not tiny:
            torch.cuda.profiler.stop()
        print(name, flush=True)


if __name__ == "__main__":
    main()
