"""Cases of the nouns whose launchers say it all: what they launch for a call, noted on tensors without memory.

A launch is compiled as Triton would compile it: an argument that is None and an integer 1 are constants, an integer
that divides by 16 is marked, but one that the kernel does not specialise on is neither. So a case is a name and a call.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

from dflash_kernels._triton._case import Case

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}
FLOATS = tuple(DTYPES)[:3]
PAGE = 16


class Launch(NamedTuple):
    kernel: Any
    arguments: tuple
    options: dict


def launches(call: Callable, *arguments) -> list[Launch]:
    """What a launcher starts; nothing runs."""
    from triton.runtime.jit import KernelInterface

    noted = []

    def get(kernel, grid):
        return lambda *args, **options: noted.append(Launch(kernel, args, options))

    with mock.patch.object(KernelInterface, "__getitem__", get):
        call(*arguments)
    return noted


def case(name: str, launch: Launch) -> Case:
    kernel, options = launch.kernel, dict(launch.options)
    given = dict(zip(kernel.arg_names, launch.arguments, strict=False))
    given |= {name: options.pop(name) for name in kernel.arg_names if name in options}
    kinds = {p.name: "constexpr" if p.is_constexpr else _kind(given[p.name], not p.do_not_specialize)
             for p in kernel.params}
    absent = {p.name: given[p.name] for p in kernel.params if kinds[p.name] == "constexpr" and not p.is_constexpr}
    constants = {p.name: given[p.name] for p in kernel.params if p.is_constexpr}
    warps, stages = options.pop("num_warps"), options.pop("num_stages", 3)
    return Case(name, kernel, kinds, constants | absent, warps, stages, options)


def _kind(value: object, specialised: bool) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + DTYPES[value.dtype]
    if value is None or specialised and value == 1 and not isinstance(value, float):
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    return "i32:16" if specialised and value % 16 == 0 else "i32"


def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def norm() -> Iterator[Case]:
    from dflash_kernels._triton.norm import CONFIGS, add_rms_norm, rms_norm

    for width in (*CONFIGS, 2 * max(CONFIGS)):
        for dtype in FLOATS:
            x, weight = empty(2, width, dtype=dtype), empty(width, dtype=dtype)
            for op, arguments in ((rms_norm, (x, weight, 1e-6, x)), (add_rms_norm, (x, x, weight, 1e-6, x, x))):
                (launch,) = launches(op, *arguments)
                yield case(f"{op.__name__} {width} {DTYPES[dtype]}", launch)


def activation() -> Iterator[Case]:
    from dflash_kernels._triton.activation import CONFIGS, silu_and_mul

    for block, _ in CONFIGS.values():
        for dtype in FLOATS:
            (launch,) = launches(silu_and_mul, empty(2, 2 * block, dtype=dtype), empty(2, block, dtype=dtype))
            yield case(f"silu_and_mul {block} {DTYPES[dtype]}", launch)


def verify() -> Iterator[Case]:
    import triton

    from dflash_kernels._triton.verify import CONFIGS, verify_greedy

    block, tile = 9, CONFIGS["logits"][0]
    ids, lens = empty(1, block), empty(1, dtype=torch.int32)
    given = (lens, lens, lens, lens, ids, empty(1), lens)
    for dtype in FLOATS:
        parts, _ = launches(verify_greedy, ids, None, empty(1, block, 2 * tile, dtype=dtype), *given)
        yield case(f"verify_greedy argmax {DTYPES[dtype]}", parts)
    (launch,) = launches(verify_greedy, ids, ids, None, *given)
    yield case("verify_greedy ids 1", launch)
    for parts in (1, 59):  # the fewest and the most that 9 rows are cut into
        _, launch = launches(verify_greedy, ids, None, empty(1, block, parts * tile, dtype=torch.float32), *given)
        yield case(f"verify_greedy keys {triton.next_power_of_2(parts)}", launch)


def block() -> Iterator[Case]:
    """Anchors out of a column of tokens, and sizes that do not divide by 16 where a model's may be such."""
    from dflash_kernels._triton.block import CONFIGS, embed_tokens, prepare_block

    vocab, ids, lens = 151_670, empty(2, 9), empty(2, dtype=torch.int32)
    given = (ids[:, 0], lens, vocab - 1)
    for width, _ in CONFIGS.values():
        for dtype in (*FLOATS, torch.int64):
            table, rows = empty(vocab, width, dtype=dtype), empty(2, 9, width, dtype=dtype)
            (launch,) = launches(embed_tokens, ids, table, rows)
            yield case(f"embed_tokens {width} {DTYPES[dtype]}", launch)
            if dtype in FLOATS:
                (launch,) = launches(prepare_block, *given, empty(2, 9, dtype=torch.int32), PAGE, lens, table, ids, ids,
                                     ids, rows)
                yield case(f"prepare_block {width} {DTYPES[dtype]}", launch)
    (launch,) = launches(prepare_block, *given, None, 1, None, None, ids, ids, None, None)
    yield case("prepare_block ids alone", launch)


NOUNS = {"norm": norm, "activation": activation, "verify": verify, "block": block}
