"""The draft step, whole and by stage, with random weights in a real drafter's geometry; each stage is one graph.

The limit of the step is one read of its weights and of the context's K and V at the bandwidth. Stages share the memory
of the step, so their times add up to the step's, apart from the gaps between launches.
"""

from types import SimpleNamespace

import torch

import dflash_kernels as dk
from bench import cost
from bench.case import Case, Sizes, captured, packed_bytes
from dflash_decode.kv import PagePool
from dflash_decode.model.config import read_draft_config
from dflash_decode.model.drafter import Drafter, tensor_shapes

PAGE = 64
CONTEXT = {"cpu": 1024, "cuda": 1024, "tiny": 40}
# hidden, MLP width, heads, key/value heads, head dim, layers, block, target_layer_ids, vocabulary, draft vocabulary
GEOMETRIES = {"cpu": {"smollm2": (576, 1536, 9, 3, 64, 3, 8, 4, 49152, 8192)},
              "cuda": {"qwen3-8b": (4096, 12288, 32, 8, 128, 5, 16, 5, 151936, None),
                       "minimax-m2.7": (3072, 8192, 48, 8, 128, 5, 8, 5, 200064, None)},
              "tiny": {"tiny": (32, 48, 2, 1, 32, 1, 4, 2, 100, None)}}
BATCHES = {"cpu": (1, 8), "cuda": (1, 8, 32), "tiny": (1,)}


def cases(sizes: Sizes):
    for name, geometry in GEOMETRIES[sizes.name].items():
        drafter = random_drafter(geometry, sizes)
        for batch in BATCHES[sizes.name]:
            yield from step_cases(sizes, name, drafter, batch)


def random_drafter(geometry, sizes):
    """On a CPU in 8 bits, as drafters are kept there."""
    hidden, inner, heads, kv_heads, dim, layers, block, target_layer_ids, vocab, drafted = geometry
    config = read_draft_config({
        "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads, "head_dim": dim,
        "num_key_value_heads": kv_heads, "num_hidden_layers": layers, "block_size": block, "vocab_size": vocab,
        "mask_token_id": 0, "rope_theta": 10000.0, "num_target_layers": 8,
        "target_layer_ids": list(range(target_layer_ids))})
    weights = {n: torch.ones(size) if len(size) == 1 else sizes.random(*size) * 0.02
               for n, size in tensor_shapes(config).items()}
    embedding = sizes.random(vocab, hidden)
    target = SimpleNamespace(dtype=sizes.dtype, device=torch.device(sizes.device), num_layers=8, hidden_size=hidden,
                             vocab_size=vocab, max_context=2 * CONTEXT[sizes.name], embedding=embedding,
                             embedding_scale=1.0, head=dk.pack_weight(embedding), head_bias=None)
    return Drafter(config, weights, target, None if drafted is None else torch.arange(drafted),
                   int8=sizes.name == "cpu")


def step_cases(sizes, name, d, batch):
    c, width, device, length = d.config, d.block_size, d.device, CONTEXT[sizes.name]
    pool = PagePool(batch * (length // PAGE + 1), PAGE)
    caches = d.cache.allocate(pool.num_pages, PAGE)
    for cache in caches:
        cache.k.normal_()
        cache.v.normal_()
    table = torch.stack([pool.table_row(pool.allocate(length + width), length // PAGE + 1)
                         for _ in range(batch)]).to(device)
    lens, whole = (torch.full((batch,), n, dtype=torch.int32) for n in (length, width))
    draft, context = d.make_draft(batch, width, caches, PAGE), d.make_context(batch, width, caches)
    features = sizes.random(batch * width, len(c.target_layer_ids) * c.target_hidden_size)
    keys = c.num_layers * batch * cost.attention_bytes(length, width, c.num_heads, c.num_kv_heads, c.head_dim, 2)
    head, layers = d.head.data.nbytes, packed_bytes(*d.layers)
    label = f"{name} drafter, {batch} x block {width}, context {length}"

    def block():
        return draft.block.positions.view(-1), None, table, lens, whole

    draft.run(lens, table, whole)
    stages = {
        "draft step": (lambda i: draft.run(lens, table, whole), layers + keys + head, True),
        "draft layers": (lambda i: draft.layers.run(*block()), layers + keys, False),
        "draft head": (lambda i: dk.lm_head_argmax(draft.masked, d.head, num_valid=d.num_valid,
                                                   out_ids=draft.guesses.view(-1),
                                                   out_values=draft.values.view(-1)), head, False),
        "draft context": (lambda i: context.run(features, draft.block.positions, draft.block.slots, whole),
                          packed_bytes(d) - head, False)}
    for stage, (run, moved, headline) in stages.items():
        if sizes.name == "cpu" and dk.StepGraph.available():
            yield Case(stage, label, captured(run, "cpu"), moved, headline=headline, replays=True)
        else:
            yield Case(stage, label, run, moved, headline=headline)
