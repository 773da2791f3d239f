"""Whole steps at Qwen3-8B's geometry with a drafter of five layers, and an attention layer of MiniMax-M2.7, with random
weights made on the device.

A step is recorded and replayed on the same memory, as in bench/ops/step.py. Its limit is one read of its weights and of
the context's K and V at the bandwidth. Page tables have room for more than the context: the time must not depend on the
capacity.
"""

from dataclasses import replace

import torch

import dflash_kernels as dk
from bench import cost
from bench.case import Case, Sizes, packed_bytes
from bench.model.step import GEOMETRIES as MODELS
from bench.model.step import Geometry, Layers
from bench.random_model import random_drafter, random_on, random_target
from dflash_decode.kv import PagePool
from dflash_decode.step import Step
from dflash_kernels.testing import rotary_table, same_bits

PAGE = 16
QWEN, MINIMAX = MODELS["qwen3-8b"], MODELS["minimax-m2.7"]
SMALL = Geometry("tiny", Layers(2, 32, 2, 1, 32, 48), Layers(1, 32, 2, 1, 32, 48), 100, 4, 2)
# whole model, layer, requests, capacities, context, rotated numbers of the layer's heads
GEOMETRIES = {"cuda": (QWEN, MINIMAX, (1, 8, 32), (2048, 40960), 1024, 64),
              "tiny": (SMALL, SMALL, (1,), (64,), 20, 16)}


def cases(sizes: Sizes):
    if sizes.name == "cpu":
        raise ValueError("whole: the device must be cuda; got cpu, where `step` is SmolLM2's")
    model, layer, batches, capacities, context, rotary = GEOMETRIES[sizes.name]
    device = torch.device(sizes.device, torch.cuda.current_device())
    target = random_target(model, device, sizes.dtype, max(capacities))
    drafter = random_drafter(model, target)
    for capacity in capacities:
        for batch in batches:
            yield from step_cases(model, target, drafter, batch, capacity, context)
    del target, drafter
    for capacity in capacities:
        for batch in batches:
            yield layer_case(sizes, layer, batch, capacity, context, rotary)


def step_cases(model, target, drafter, batch, capacity, context):
    """The cases, each made when its turn comes, so that not all buffers and graphs exist at the same time. The three
    have one context: unless the block's first row equals the baseline step's, bit for bit, the case is wrong."""
    layers, draft = packed_bytes(*target._layers) + target.head.data.nbytes, packed_bytes(drafter, *drafter.layers)
    label = f"{model.name}, {batch} x context {context}, capacity {capacity}"
    caches, baseline = filled(target, drafter, batch, context + model.block), []
    for op, width, with_draft in (("baseline step", 1, False), ("verify pass", model.block, False),
                                  ("DFlash step", model.block, True)):
        graph = recorded(target, drafter if with_draft else None, caches, batch, width, capacity, context)
        said = graph.step.verifier.next_ids[:, 0], graph.step.verifier.values.view(batch, width)[:, 0]
        baseline = baseline or [t.clone() for t in said]
        kv = batch * (context + width) * (model.target.kv_bytes() + with_draft * model.draft.kv_bytes())
        yield Case(
            op,
            label + f", {width} rows" * (width > 1),
            replaying(graph, said),
            layers + with_draft * draft + kv,
            check=as_baseline(baseline),
            headline=capacity == 2048 and batch == 1,
            replays=True,
        )


def replaying(graph, said):
    def run(_i):
        graph.replay()
        return said
    return run


def as_baseline(baseline):
    def check(got):
        ids, values = got
        assert values.isfinite().all(), "logits that are not finite"
        assert torch.equal(ids, baseline[0]) and same_bits(values.contiguous(), baseline[1]), (
            "not the baseline step's token"
        )

    return check


def filled(target, drafter, batch, tokens) -> tuple[list, list]:
    """The target's and the drafter's caches for this many tokens per request."""
    caches = tuple(made.cache.allocate(batch * -(-tokens // PAGE), PAGE) for made in (target, drafter))
    for cache in (c for kv in caches for c in kv):
        cache.k.normal_()
        cache.v.normal_()
    return caches


def recorded(target, drafter, caches, batch, width, capacity, context) -> dk.StepGraph:
    """A graph of the step, with the requests' pages and lengths set."""
    max_pages, pages = -(-capacity // PAGE), caches[0][0].num_pages
    pool = PagePool(pages, PAGE)
    step = Step(target, drafter, caches[0], caches[1] if drafter else (), batch, width, PAGE, max_pages)
    step.seat([pool.table_row(pool.allocate(pages // batch * PAGE), max_pages) for _ in range(batch)])
    step.fill([(1, context, width)] * batch)
    step.run()
    graph = dk.StepGraph(target.device)
    with graph.capture():
        step.run()
    graph.step = step  # what the graph reads, for as long as the graph
    return graph


def layer_case(sizes, model, batch, capacity, context, rotary):
    """Norm, q, k and v, their norms and partial RoPE, attention, output."""
    t, width = replace(model.target, layers=1), model.block
    make, rows = random_on(sizes.device, sizes.dtype), batch * width
    qkv_rows = (t.heads + 2 * t.kv_heads) * t.head_dim
    qkv, o = (dk.pack_weight(make(n, k) * k**-0.5) for n, k in ((qkv_rows, t.hidden), (t.hidden, t.heads * t.head_dim)))
    x, out, weight = make(rows, t.hidden), make(rows, t.hidden), make(t.hidden)
    normed, mixed, packed = torch.empty_like(x), make(rows, t.heads * t.head_dim), make(rows, qkv_rows)
    pages = -(-context // PAGE)
    table = torch.full((batch, -(-capacity // PAGE)), -1, dtype=torch.int32)
    table[:, :pages] = torch.arange(batch * pages, dtype=torch.int32).view(batch, pages)
    cache = dk.PagedKV(*(make(batch * pages, t.kv_heads, PAGE, t.head_dim).transpose(1, 2) for _ in range(2)))
    lens = torch.full((batch,), context, dtype=torch.int32)
    positions = (context + torch.arange(width)).repeat(batch)
    cos_sin = rotary_table(rotary, capacity).to(sizes.device)

    def run(_i):
        dk.rms_norm(x, weight, out=normed)
        dk.linear(normed, qkv, out=packed)
        dk.qk_norm_rope(packed, positions, cos_sin, num_heads=t.heads, num_kv_heads=t.kv_heads, head_dim=t.head_dim)
        heads = packed.view(batch, width, -1, t.head_dim)
        q, k, v = heads.split((t.heads, t.kv_heads, t.kv_heads), 2)
        dk.block_attention(q, k, v, cache, table, lens, causal=True, out=mixed.view(batch, width, -1, t.head_dim))
        return dk.linear(mixed, o, out=out)

    moved = (cost.linear_bytes(rows, qkv_rows, t.hidden, 2) + cost.linear_bytes(rows, t.hidden, t.heads * t.head_dim, 2)
             + batch * cost.attention_bytes(context, width, t.heads, t.kv_heads, t.head_dim, 2))
    return Case("attention layer", f"{model.name}, {batch} x context {context}, capacity {capacity}, {width} rows",
                captured_once(run, sizes), moved, replays=True)


def captured_once(run, sizes):
    run(0)
    graph = dk.StepGraph(sizes.device)
    with graph.capture():
        run(0)
    graph.run = run
    return lambda i: graph.replay()
