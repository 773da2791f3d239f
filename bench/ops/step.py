"""Whole steps of SmolLM2-135M in bfloat16: a baseline step, a verify pass, a DFlash step.

Each is a recorded step, replayed on the same memory. The limit of a pass is one read of its weights and of the
context's K and V at the read bandwidth.
"""

from pathlib import Path

import dflash_kernels as dk
from bench.case import Case, Sizes, packed_bytes
from dflash_decode.checkpoint import drafter_of, load_checkpoint, read_directory
from dflash_decode.kv import PagePool
from dflash_decode.model.dflash2 import read_selector
from dflash_decode.model.drafter import Drafter
from dflash_decode.model.native import NativeTarget
from dflash_decode.model.vocabulary import read_vocabulary
from dflash_decode.step import Step

BLOCK, CONTEXT, PAGE = 8, 256, 64


def recorded(step, context):
    """A graph of the step, with the request's pages and lengths set."""
    pool = PagePool(64, PAGE)
    step.seat([pool.table_row(pool.allocate(context + step.width), step.page_table.shape[1])])
    step.fill([(1, context, step.width)])
    step.run()
    graph = dk.StepGraph(step.target.device)
    with graph.capture():
        step.run()
    return graph


def cases(sizes: Sizes):
    checkpoint = load_checkpoint("smollm2")
    target = NativeTarget(checkpoint.config, checkpoint.tensors, device=sizes.device, max_context=2048)
    found = read_directory(Path(drafter_of("smollm2")))
    vocabulary = read_vocabulary(found.source)
    selector, fields = read_selector(found.source, vocabulary, target.vocab_size)
    drafter = Drafter(found.config | fields, found.tensors | selector, target, vocabulary, int8=sizes.device == "cpu")
    layers, head = packed_bytes(*target._layers), target.head.data.nbytes
    draft = packed_bytes(drafter, *drafter.layers)
    caches = [m.cache.allocate(64, PAGE) for m in (target, drafter)]
    for k in (t for kv in caches for cache in kv for t in (cache.k, cache.v)):
        k.normal_()
    baseline = recorded(Step(target, None, caches[0], (), 1, 1, PAGE, 64), CONTEXT)
    verify = recorded(Step(target, None, caches[0], (), 1, BLOCK, PAGE, 64), CONTEXT)
    dflash = recorded(Step(target, drafter, *caches, 1, BLOCK, PAGE, 64), CONTEXT)
    keys, draft_keys = (sum(t.nbytes for cache in kv for t in (cache.k, cache.v)) * CONTEXT // (64 * PAGE)
                        for kv in caches)
    once = layers + head + keys
    base = {"baseline step": lambda i: baseline.replay()}
    yield Case(
        "baseline step",
        f"SmolLM2, context {CONTEXT}",
        lambda i: baseline.replay(),
        once,
        headline=True,
        replays=True,
    )
    yield Case("verify pass", f"SmolLM2, context {CONTEXT}, {BLOCK} rows", lambda i: verify.replay(), once,
               peers=base, headline=True, replays=True)
    drafted = "its drafter in 8 bits" if drafter.int8 else "its drafter"
    yield Case("DFlash step", f"SmolLM2, context {CONTEXT}, {drafted}, block {BLOCK}", lambda i: dflash.replay(),
               once + draft + draft_keys, peers=base, headline=True, replays=True)
