"""The entries of the launch tables: alternatives for each, and the benchmark cases whose time it decides."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch

import dflash_kernels as dk
from bench.case import Case, Sizes
from bench.ops import attention as bench_attention
from bench.ops import blocks as bench_blocks
from bench.ops import experts as bench_experts
from bench.ops import linear as bench_linear
from bench.ops import memory as bench_memory
from bench.ops import sample as bench_sample
from bench.ops import small as bench_small

# Fields that only change how fast the same bits come: doubled and halved, or some more and some fewer.
POWERS, COUNTS = {"BLOCK_N", "BLOCK_K", "warps"}, {"stages": (-1, 1, 2, 4), "fill": (-1, 1)}
SIDES = {"gate_up": (24576, 4096), "down": (4096, 12288), "qkv": (6144, 4096), "o": (4096, 4096)}  # Qwen3-8B's
MIXES = ((1, 1024), (1, 8192), (8, 8192), (32, 1024))  # requests, context
HEADS = {64: (64, 8), 128: (32, 8), 256: (16, 8)}  # query heads and key heads, by the size of a head
VOCAB = 151936


class Wide(Sizes):
    """float32."""

    dtype = torch.float32


@dataclass(frozen=True)
class Entry:
    """table: a dict in dflash_kernels._triton.<noun>, or a number there, whose path is empty. path: its keys in order.
    cases: made anew by each call. fixed: fields that have one value."""

    noun: str
    table: str
    path: tuple
    cases: Callable[[Sizes], list[Case]]
    fixed: tuple[str, ...] = ()

    @property
    def module(self):
        return importlib.import_module(f"dflash_kernels._triton.{self.noun}")

    @property
    def name(self) -> str:
        return f"{self.noun}.{self.table}"

    @property
    def value(self):
        found = getattr(self.module, self.table)
        for key in self.path:
            found = found[key]
        return found

    @contextmanager
    def set_to(self, value) -> Iterator[None]:
        held = getattr(self.module, self.table)
        for key in self.path[:-1]:
            held = held[key]
        patch = mock.patch.dict(held, {self.path[-1]: value}) if self.path else \
            mock.patch.object(self.module, self.table, value)
        with patch:
            yield


def literal(value) -> str:
    """The value as written in the table."""
    if hasattr(value, "_fields"):
        return f"{type(value).__name__}({', '.join(map(repr, value))})"
    return repr(value)


def neighbours(value, fixed: tuple[str, ...] = ()) -> list:
    """Values that differ in one number, but in none of the fields that are fixed."""
    if isinstance(value, int):
        return [n for n in (value // 2, value * 2) if n]
    fields = getattr(value, "_fields", range(len(value)))
    made = []
    for at, field in enumerate(fields):
        n = value[at]
        if isinstance(n, bool) or not isinstance(n, int) or field in fixed:
            continue
        if field in COUNTS:
            others = [n + more for more in COUNTS[field]]
        else:
            others = [n // 2, n * 2] if field in POWERS or isinstance(field, int) else []
        made += [with_number(value, at, other) for other in others if other > 0]
    return made


def with_number(value, at: int, n: int):
    numbers = (*value[:at], n, *value[at + 1:])
    return type(value)(*numbers) if hasattr(value, "_fields") else numbers


def entries(tiny: bool, major: int) -> list[Entry]:
    """The entries, the most decisive first. major: the compute capability whose part of the tables is used."""
    if tiny:
        return [Entry("linear", "CONFIGS", ((2, 16),), lambda sizes: products(sizes, 3, {"tiny": (40, 1100)})),
                Entry("norm", "CONFIGS", (1024,), lambda sizes: [bench_memory.norm_case(sizes, 3, 64)])]
    return [*linear_entries(2), *attention_entries(major), *block_entries(), *experts_entries(), *memory_entries(),
            *linear_entries(4)]


def linear_entries(itemsize: int) -> list[Entry]:
    module = importlib.import_module("dflash_kernels._triton.linear")
    sides = SIDES if itemsize == 2 else {"o": SIDES["o"]}

    def made(rows):
        return lambda sizes: products(sizes if itemsize == 2 else Wide(sizes.device, sizes.tiny, False), rows, sides)

    found = [Entry("linear", "CONFIGS", ((itemsize, rows),), made(rows)) for rows in module.configs(itemsize)]
    if itemsize == 2:
        found += [Entry("linear", name, (), made(16)) for name in ("ADD_BLOCK", "ADD_WARPS")]
        heads = importlib.import_module("dflash_kernels._triton.lm_head")
        found += [Entry("lm_head", name, (), lambda sizes: head(sizes, 16)) for name in ("BEST_BLOCK", "BEST_WARPS")
                  if hasattr(heads, name)]
    return found


def block_entries() -> list[Entry]:
    """Weights in blocks beside 16 bits, in the format that most checkpoints have. A piece has 32 k."""
    module = importlib.import_module("dflash_kernels._triton.linear")

    def made(rows):
        return lambda sizes: [bench_blocks.linear_case(sizes, name, "q4_k", rows, *bench_blocks.weights_of(
            sizes, "q4_k", n, k)) for name, (n, k) in SIDES.items()]

    return [Entry("linear", "BLOCK_CONFIGS", ((2, rows),), made(rows), ("BLOCK_K",)) for rows in module.configs(2, 1)]


def experts_entries() -> list[Entry]:
    """A layer of Qwen3-Coder-30B-A3B in 16 bits."""
    hidden, inner, experts, stored, chosen = bench_experts.QWEN

    def made(*some):
        def of(sizes):
            plain = bench_experts.weights_of(sizes, stored, hidden, inner)
            return [bench_experts.experts_case(sizes, "qwen3-coder-30b-a3b, random", rows, 0.0, chosen, plain, [
                dk.pack_experts(w) for w in plain]) for rows in some]
        return of

    def routed(sizes):
        return [bench_experts.router_case(sizes, "minimax-m2.7", rows, 256, chosen) for rows in (8, 64)]

    # Rows of which the tiles are found in gate_up, in either place as FOUND_WITHIN varies, and by a launch.
    few, between, many = made(1, 16, 64), made(192, 384), made(512)
    return [*(Entry("experts", name, (2,), few) for name in ("GATE_UP", "DOWN")),
            Entry("experts", "FIND_BLOCK", (), few), Entry("experts", "FOUND_WITHIN", (), between),
            *(Entry("experts", name, (), many) for name in ("SCHEDULE_BLOCK", "SCHEDULE_WARPS")),
            Entry("router", "WARPS", (256,), routed)]


def products(sizes: Sizes, rows: int, sides: dict) -> list[Case]:
    return [bench_linear.linear_case(sizes, name, rows, *bench_linear.weights_of(sizes, n, k))
            for name, (n, k) in sides.items()]


def head(sizes: Sizes, rows: int) -> list[Case]:
    return [bench_linear.head_case(sizes, "head", rows, *bench_linear.weights_of(sizes, VOCAB, 4096))]


def attention_entries(major: int) -> list[Entry]:
    """16-bit caches first. No benchmark covers 8-bit caches, float32 and a soft cap, which is reported."""
    module = importlib.import_module("dflash_kernels._triton.attention")

    def made(dim):
        return lambda sizes: [bench_attention.case(sizes, f"heads of {dim}", *HEADS[dim], dim, context, 8, batch)
                              for batch, context in MIXES]

    def unread(sizes):
        raise NotImplementedError("no benchmark reads such a cache")

    found = []
    for key, by in module.CONFIGS.items():
        generation = next((g for g in module.LIKE.get(major, (8,)) if g in by), None)
        if generation is not None:
            cases = made(key[2]) if key[:2] == (2, 2) else unread
            found.append(Entry("attention", "CONFIGS", (key, generation), cases))
    numbers = [name for name in ("COMBINE_ROWS", "COMBINE_WARPS", "COMBINE_STAGES") if hasattr(module, name)]
    return sorted(found, key=lambda e: e.path[0] != (2, 2, 128)) + [Entry("attention", name, (), made(128))
                                                                  for name in numbers]


def memory_entries() -> list[Entry]:
    m, g = bench_memory, bench_memory.QWEN3_8B
    widths = {1024: 1024, 4096: 4096, 8192: 5376, 256: 256, 1 << 62: 12288}  # a row of each entry
    found = [Entry("norm", "CONFIGS", (most,), lambda sizes, w=widths[most]: [
        m.norm_case(sizes, 64, w), m.add_norm_case(sizes, 64, w), m.norm_case(sizes, 8192, w)])
        for most in keys("norm") if most in widths]
    found += [Entry("activation", "CONFIGS", (most,), lambda sizes, w=widths[most]: [
        m.silu_case(sizes, rows, w) for rows in (64, 8192)]) for most in keys("activation") if most in widths]
    found += [Entry("conv", "CONFIGS", (most,), lambda sizes, w=widths[most]: [
        m.conv_case(sizes, rows, w, True) for rows in (64, 8192)]) for most in keys("conv") if most in widths]
    found += [Entry("conv", name, (), lambda sizes: [m.conv_case(sizes, rows, 4096, False) for rows in (64, 8192)])
              for name in ("COLUMNS", "COLUMN_WARPS")]
    found += [Entry("selector", "CONFIGS", (k,), lambda sizes, k=k: [bench_small.select_case(sizes, 8, 15, k, g.vocab)])
              for k in keys("selector")]
    found += [Entry("block", "CONFIGS", (most,), lambda sizes, w=4096 if most > 4096 else most: [
        m.embed_case(sizes, 128, w, g.vocab), m.block_case(sizes, 8, 16, w, g.vocab)]) for most in keys("block")]
    found += [Entry("rope", "CONFIGS", (dim,), lambda sizes, dim=dim: [m.rope_case(sizes, 128, *HEADS[dim], dim)])
              for dim in keys("rope") if dim in HEADS]
    found += [Entry("verify", "CONFIGS", ("logits",), lambda sizes: [m.verify_case(sizes, 8, 8, g.vocab)]),
              Entry("verify", "PROGRAMS", (), lambda sizes: [m.verify_case(sizes, 8, 8, g.vocab)])]
    drawn = {"chunks": {}, "residual": {}, "accept": {}, "rows": {"top_p": 0.9}}
    found += [Entry("sample", "CONFIGS", (key,), lambda sizes, f=filters: [sampled(sizes, f)])
              for key, filters in drawn.items()]
    return [*found, Entry("sample", "CONFIGS", ("draft",), lambda sizes: [
        bench_small.draft_case(sizes, 8, 15, 16, g.vocab)])]


def sampled(sizes: Sizes, filters: dict) -> Case:
    return bench_sample.sample_case(sizes, 8, 8, VOCAB, "top-p" if filters else "baseline", filters)


def keys(noun: str) -> list:
    return list(importlib.import_module(f"dflash_kernels._triton.{noun}").CONFIGS)
