"""The cases of linear and the LM heads, as launched.py has those of the other nouns."""

from collections.abc import Iterator

import torch

from dflash_kernels.formats import EVERY, EXACT, gpu_shape

from .launched import DTYPES, FLOATS, VOCAB, Case, Launch, case, empty, launches

FEW = 1024  # outputs
FAR = (1 << 31) + 1  # an id past 32 bits, which a shard may begin at


def products() -> Iterator[tuple[str, torch.dtype, torch.dtype]]:
    """What `linear` and the heads multiply: what it is called, the dtypes of x and of the weight."""
    for dtype in FLOATS:
        yield DTYPES[dtype], dtype, dtype
        yield f"{DTYPES[dtype]} x i8", dtype, torch.int8


def block_products(head: bool = False) -> Iterator[tuple[str, torch.dtype, str]]:
    """Weights in blocks: every format beside bfloat16; beside the others, but not of a head, the one that takes most
    registers."""
    for dtype in (torch.bfloat16,) if head else FLOATS:
        for name in EVERY if dtype == torch.bfloat16 else ("q6_k",):
            yield f"{DTYPES[dtype]} x {name}", dtype, name


def operands(rows: int, n: int, dtype: torch.dtype, weight: torch.dtype | str) -> tuple:
    """x, weight, scales, format, bias."""
    x, bias, scales, number = empty(rows, 4096, dtype=dtype), empty(n, dtype=dtype), None, 0
    if isinstance(weight, str):
        data = empty(*gpu_shape(EVERY[weight], n, 4096), dtype=torch.uint8)
        number = EVERY[weight].number + EXACT
    else:
        data = empty(n, 4096, dtype=weight)
    if weight == torch.int8:
        scales = empty(n, dtype=torch.float32)
    return x, data, scales, number, bias


def linear() -> Iterator[Case]:
    """As many outputs as a vocabulary fill the chip. Of few, K is split, and the product stores float32 sums."""
    from dflash_kernels._triton.linear import configs, linear

    def launched(rows: int, n: int, dtype: torch.dtype, weight: torch.dtype | str) -> list[Launch]:
        return launches(linear, *operands(rows, n, dtype, weight), n, empty(rows, n, dtype=dtype))

    for name, dtype, weight in products():
        for rows in configs(dtype.itemsize):
            for n in (VOCAB, FEW) if dtype == torch.bfloat16 else (VOCAB,):
                product, *added = launched(rows, n, dtype, weight)
                yield case(f"linear {rows} rows {name}" + " split" * len(added), product)
        _, added = launched(16, FEW, dtype, weight)
        yield case(f"linear add_chunks {name}", added)
    for name, dtype, weight in block_products():
        for rows in configs(dtype.itemsize, 1):
            for n in (VOCAB, FEW) if dtype == torch.bfloat16 and rows == 16 else (VOCAB,):
                product, *added = launched(rows, n, dtype, weight)
                yield case(f"linear {rows} rows {name}" + " split" * len(added), product)


def lm_head() -> Iterator[Case]:
    from dflash_kernels._triton.linear import configs
    from dflash_kernels._triton.lm_head import combine_argmax, lm_head_argmax

    for name, dtype, weight in (*products(), *block_products(head=True)):
        for rows in configs(dtype.itemsize, isinstance(weight, str)):
            product, best = launches(lm_head_argmax, *operands(rows, VOCAB, dtype, weight), VOCAB, VOCAB, 1.0, 30.0,
                                     FAR, empty(rows), empty(rows, dtype=torch.float32))
            yield case(f"lm_head_argmax {rows} rows {name}", product)
    yield case("lm_head_argmax best_of_blocks", best)
    values, ids = empty(2, 9, dtype=torch.float32), empty(2, 9)
    (launch,) = launches(combine_argmax, values, ids, ids[0], values[0])
    yield case("combine_argmax", launch)


def lm_head_topk() -> Iterator[Case]:
    """K is 1, or one less than the power of two in the name."""
    from dflash_kernels._triton.linear import configs
    from dflash_kernels._triton.lm_head_topk import TALLEST, combine_topk, lm_head_topk

    def both(rows: int, dtype: torch.dtype, weight: torch.dtype | str, k: int) -> list[Launch]:
        return launches(lm_head_topk, *operands(rows, VOCAB, dtype, weight), VOCAB, VOCAB, 1.0, 30.0, FAR,
                        empty(rows, k), empty(rows, k, dtype=torch.float32), empty(rows, dtype=torch.float32))

    for name, dtype, weight in (*products(), *block_products(head=True)):
        for rows in configs(dtype.itemsize, isinstance(weight, str)):
            if rows <= (16 if isinstance(weight, str) else TALLEST[dtype.itemsize]):
                yield case(f"lm_head_topk {rows} rows {name}", both(rows, dtype, weight, 15)[0])
    for k in (1, 15, 63):
        _, first = both(16, torch.bfloat16, torch.bfloat16, k)
        yield case(f"lm_head_topk first_of_blocks {first.options['K']}", first)
    for shards, k in ((2, 15), (8, 63)):
        values, lse = empty(shards, 9, k, dtype=torch.float32), empty(shards, 9, dtype=torch.float32)
        (launch,) = launches(combine_topk, values, empty(shards, 9, k), lse, empty(9, k), values[0], lse[0])
        yield case(f"combine_topk {shards} x {k + 1}", launch)
