"""The cases of each noun but products (products.py), experts and router (experts.py), sample and selector (sampled.py):
what its launchers launch for a call, noted on tensors without memory.

A launch is compiled as Triton would compile it: an argument that is None and an integer 1 are constants, an integer
that divides by 16 is marked, but one that the kernel does not specialise on is neither. So a case is a name and a call.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32",
          torch.int64: "i64", torch.uint8: "u8", torch.int8: "i8"}
FLOATS = tuple(DTYPES)[:3]
PAGE, VOCAB = 16, 151_936


class Case(NamedTuple):
    """One kernel as one configuration compiles it. signature has a type for each argument that is not a constexpr,
    "constexpr" for the others; options are the compiler's, such as enable_fp_fusion."""

    name: str
    kernel: Any
    signature: dict
    constexprs: dict
    num_warps: int
    num_stages: int
    options: dict = {}  # noqa: RUF012


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
    given |= {name: options.pop(name) for name in launch.options if name in kernel.arg_names}
    kinds = {p.name: "constexpr" if p.is_constexpr else _kind(given[p.name], not p.do_not_specialize)
             for p in kernel.params}
    absent = {p.name: given[p.name] for p in kernel.params if kinds[p.name] == "constexpr" and not p.is_constexpr}
    constants = [p.name for p in kernel.params if p.is_constexpr]
    constants = {name: given[name] for name in sorted(constants, key=list(given).index)}  # in the launch's order
    warps, stages = options.pop("num_warps"), options.pop("num_stages", 3)
    return Case(name, kernel, kinds, constants | absent, warps, stages, options)


def _kind(value: object, specialised: bool) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + DTYPES[value.dtype]
    if value is None or specialised and value == 1 and not isinstance(value, float):
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    kind = "i32" if -1 << 31 <= value < 1 << 31 else "i64"
    return f"{kind}:16" if specialised and value % 16 == 0 else kind


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


def conv() -> Iterator[Case]:
    """Two taps and groups of 16, as published; each rounding where it is one of 16 bits."""
    from dflash_kernels._triton.conv import COLUMNS, CONFIGS, grouped_conv, grouped_conv_add_rms_norm

    for width in CONFIGS:
        for dtype in FLOATS:
            for rounding in range(1 if dtype == torch.float32 else 3):
                x, delta, base = empty(18, width, dtype=dtype), empty(18, 2, width // 16, dtype=dtype), empty(
                    2, width, dtype=dtype)
                name = f"{width} {DTYPES[dtype]} {('end', 'reference', 'engine')[rounding]}"
                if width == COLUMNS:
                    (launch,) = launches(grouped_conv, x, delta, base, 9, rounding, x)
                    yield case(f"grouped_conv {name}", launch)
                if rounding == 0 or width == max(CONFIGS):
                    (launch,) = launches(grouped_conv_add_rms_norm, x, delta, base, 9, rounding, x, base[0], 1e-6, x, x)
                    yield case(f"grouped_conv_add_rms_norm {name}", launch)


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
    """The anchors are a column of tokens. The vocabulary does not divide by 16, nor does the mask token."""
    from dflash_kernels._triton.block import CONFIGS, embed_tokens, prepare_block
    from dflash_kernels.formats import EVERY, gpu_shape

    vocab, ids, lens = 151_670, empty(2, 9), empty(2, dtype=torch.int32)
    given = (ids[:, 0], lens, vocab - 1)
    for width, _ in CONFIGS.values():
        for dtype in (*FLOATS, torch.int64):
            table, rows = empty(vocab, width, dtype=dtype), empty(2, 9, width, dtype=dtype)
            (launch,) = launches(embed_tokens, ids, table, 0, rows)
            yield case(f"embed_tokens {width} {DTYPES[dtype]}", launch)
            if dtype in FLOATS:
                (launch,) = launches(prepare_block, *given, empty(2, 9, dtype=torch.int32), PAGE, lens, table, 0, ids,
                                     ids, ids, rows)
                yield case(f"prepare_block {width} {DTYPES[dtype]}", launch)
    for name, f in EVERY.items():
        table, rows = empty(*gpu_shape(f, vocab, 4096), dtype=torch.uint8), empty(2, 9, 4096, dtype=torch.bfloat16)
        (launch,) = launches(embed_tokens, ids, table, f.number, rows)
        yield case(f"embed_tokens {name}", launch)
    (launch,) = launches(prepare_block, *given, empty(2, 9, dtype=torch.int32), PAGE, lens, table, f.number, ids, ids,
                         ids, rows)
    yield case(f"prepare_block {name}", launch)
    (launch,) = launches(prepare_block, *given, None, 1, None, None, 0, ids, ids, None, None)
    yield case("prepare_block ids alone", launch)


class Heads(NamedTuple):
    """What context and rope turn. bare: no norm and no rounding after it; context takes all tokens into caches at any
    address, rope has no cache."""

    dim: int
    rotary: int
    dtype: torch.dtype
    fp8: bool = False
    interleaved: bool = False
    bare: bool = False

    def cache(self, kv_heads: int) -> torch.Tensor:
        shape, kept = (1001, PAGE, kv_heads, self.dim), torch.float8_e4m3fn if self.fp8 else self.dtype
        return empty(math.prod(shape) + self.bare, dtype=kept)[self.bare:].view(shape)

    def scales(self, kv_heads: int) -> list[torch.Tensor | None]:
        """One of each key head for K, one of all for V."""
        return [empty(n, dtype=torch.float32) if self.fp8 else None for n in (kv_heads, 1)]

    def table(self) -> torch.Tensor | None:
        return empty(40_961, self.rotary, dtype=torch.float32) if self.rotary else None


def heads() -> Iterator[tuple[str, Heads]]:
    """Every configuration in every dtype, then what else changes code."""
    from dflash_kernels._triton.rope import CONFIGS

    fp32, bf16, fp16 = FLOATS
    for dim in CONFIGS:
        yield from ((f"{dim}", Heads(dim, dim, dtype)) for dtype in FLOATS)
        yield f"{dim} fp8 cache", Heads(dim, dim, bf16, fp8=True)
    yield "128 partial", Heads(128, 64, bf16)
    yield "128 partial fp8 cache", Heads(128, 64, fp16, fp8=True)
    yield "128 interleaved", Heads(128, 128, bf16, interleaved=True)
    yield "128 interleaved fp8 cache", Heads(128, 128, fp32, fp8=True, interleaved=True)
    yield "128 unrotated", Heads(128, 0, bf16)
    yield "128 bare", Heads(128, 128, bf16, bare=True)


def context() -> Iterator[Case]:
    from dflash_kernels._triton import context

    layers, kv_heads = 5, 4
    for name, h in heads():
        kv = empty(2, layers * 2 * kv_heads * h.dim, dtype=h.dtype)
        caches, (k_scale, v_scale) = [h.cache(kv_heads)] * layers, h.scales(kv_heads)
        weights, committed = empty(layers, h.dim, dtype=h.dtype), empty(1, dtype=torch.int32)
        with mock.patch.dict(context._bases):  # the addresses of nothing
            (launch,) = launches(
                context.write_context_kv, kv, empty(2), empty(2), caches, caches, [k_scale] * layers * h.fp8,
                [v_scale] * layers * h.fp8, None if h.bare else weights, h.table(), None if h.bare else committed, 1e-6,
                1.0 if h.bare else 0.5, h.interleaved, not h.bare)
        yield case(f"write_context_kv {name} {DTYPES[h.dtype]}", launch)


def rope() -> Iterator[Case]:
    from dflash_kernels._triton.rope import qk_norm_rope

    q_heads, kv_heads = 28, 4
    for name, h in heads():
        qkv = empty(2, (q_heads + 2 * kv_heads) * h.dim, dtype=h.dtype)
        weight, cache, slots = empty(h.dim, dtype=h.dtype), h.cache(kv_heads), empty(2)
        if h.bare:
            weight = cache = slots = None
        (launch,) = launches(qk_norm_rope, qkv, empty(2), h.table(), weight, weight, cache, cache, *h.scales(kv_heads),
                             slots, q_heads, kv_heads, h.dim, 1e-6, h.interleaved, not h.bare)
        yield case(f"qk_norm_rope {name} {DTYPES[h.dtype]}", launch)


def attention() -> Iterator[Case]:
    """One request, whose splits programs share out; every tensor that there may be, and a window of odd sizes."""
    from dflash_kernels._triton.attention import CONFIGS, block_attention

    lens, table, sinks = empty(1, dtype=torch.int32), empty(1, 2560, dtype=torch.int32), empty(8, dtype=torch.float32)
    for itemsize, cached, dim in CONFIGS:
        fp8 = cached == 1
        scale = empty(2, dtype=torch.float32) if fp8 else None
        for dtype in (dtype for dtype in FLOATS if dtype.itemsize == itemsize):
            q, k = empty(1, 9, 8, dim, dtype=dtype), empty(1, 9, 2, dim, dtype=dtype)
            cache = empty(1001, PAGE, 2, dim, dtype=torch.float8_e4m3fn if fp8 else dtype)
            for softcap in (0.0, 30.0) if dtype == torch.bfloat16 and not fp8 else (0.0,):
                tiles, combine = launches(block_attention, q, k, k, cache, cache, scale, scale, table, lens, lens, lens,
                                          lens, 9, 0.125, False, 1001, 3, sinks, softcap, q)
                name = f"{dim} {DTYPES[dtype]}"
                yield case(f"block_attention {name}" + " fp8 cache" * fp8 + " softcap" * (softcap > 0), tiles)
                if not fp8 and not softcap:
                    yield case(f"block_attention combine_splits {name}", combine)


NOUNS = {"norm": norm, "conv": conv, "activation": activation, "verify": verify, "block": block, "context": context,
         "rope": rope, "attention": attention}


def cases(noun: str, arch: int) -> list[Case]:
    """As on a chip of this architecture, which attention's launcher asks for."""
    from dflash_kernels._triton import attention

    with mock.patch.multiple(attention, generation=lambda device: arch // 10, native_fp8=lambda device: arch >= 89):
        return list(NOUNS[noun]())
