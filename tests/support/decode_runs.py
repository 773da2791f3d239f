"""What the tests of the loop run: requests, a drafter that knows the text, and targets of random weights, with nothing
but torch, so that they run on a bare machine with a GPU too."""

import random

import torch

from dflash_decode.loop import Decoder
from dflash_decode.model.drafter import Drafter, DraftPass
from dflash_decode.model.native import NativeTarget
from dflash_decode.requests import Request
from dflash_decode.sampling import SamplingParams

VOCAB = 97
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], list(range(15)), list(range(16)), list(range(40, 57)), [9] * 33, [96, 0], [8, 8]]


class Oracle(Drafter):
    """Drafts the known text with random faults, so that every accepted length occurs."""

    graph_safe = False

    @classmethod
    def knowing(cls, target, texts, fault_rate, block_size=6, seed=0):
        oracle = cls.random(target, num_layers=2, block_size=block_size)
        oracle.texts, oracle.fault_rate, oracle.dice = texts, fault_rate, random.Random(seed)
        return oracle

    def make_draft(self, batch, width, caches, page_size, params=None):
        return OraclePass(self, batch, width, caches, page_size, params)


class OraclePass(DraftPass):
    def run(self, context_lens, page_table, block_lens):
        super().run(context_lens, page_table, block_lens)
        owners = {live.pages[0]: live for live in self.drafter.decoder._active}
        for row, (page, length) in enumerate(zip(page_table[:, 0].tolist(), block_lens.tolist(), strict=True)):
            if not length:
                continue
            live = owners[page]
            known = self.drafter.texts[live.request.id][live.emitted:][:self.width - 1]
            for i, token in enumerate(known, 1):
                wrong = self.drafter.dice.random() < self.drafter.fault_rate
                self.ids[row, i] = (token + 1) % VOCAB if wrong else token
        return self.ids


def collect(events):
    """{id: (tokens, finish, acceptance lengths)}"""
    texts, ends = {}, {}
    for event in events:
        texts.setdefault(event.id, []).extend(event.tokens)
        if event.finish:
            assert event.id not in ends
            ends[event.id] = event
    return {key: (tokens, ends[key].finish, ends[key].acceptance_lengths) for key, tokens in texts.items()}


def check_texts(target, drafter, block_size):
    """Greedy and sampled requests together have the baseline's texts; with drawn drafts the greedy ones have."""
    requests = [Request(0, [5, 9, 33], 9, ()), Request(1, [1], 7, (), SamplingParams(0.8, seed=3)),
                Request(2, [8] * 17, 8, ())]

    def texts(of, **options):
        return {key: text for key, (text, *_) in collect(Decoder(target, of, max_context=64, **options).stream(
            requests)).items()}

    want = texts(None)
    assert texts(drafter, block_size=block_size) == want
    drawn = texts(drafter, block_size=block_size, sample_from="request")
    assert [drawn[key] for key in (0, 2)] == [want[key] for key in (0, 2)] and len(drawn[1]) == 7


def run(target, drafter, requests, **options):
    if drafter is not None:  # what a step takes on this machine decides nothing
        options.setdefault("block_size", drafter.block_size)
    decoder = Decoder(target, drafter, page_size=options.pop("page_size", 4), prefill_rows=16, **options)
    for caches in decoder.kv:
        for cache in caches:
            cache.k.fill_(float("nan"))
            cache.v.fill_(float("nan"))
    if drafter is not None:
        drafter.decoder = decoder
    out = collect(decoder.stream(requests))
    assert decoder.pool.free_pages == decoder.pool.num_pages
    return out


def requests(lengths=(1, 2, 13, 29, 30, 5, 17, 8), stops=()):
    return [Request(i, p, n, stops) for i, (p, n) in enumerate(zip(PROMPTS, lengths, strict=True))]


def random_target(family, dtype, device, hidden=64, inner=96, heads=4, kv_heads=2, layers=4):
    """A NativeTarget of "llama" or "qwen3", with norms far from one, so that none can be forgotten unseen."""
    generator, dim = torch.Generator().manual_seed(0), {"llama": 16, "qwen3": 32}[family]

    def make(*shape):
        x = torch.randn(shape, generator=generator)
        return (1 + 0.3 * x if len(shape) == 1 else x * 1.5 / shape[-1] ** 0.5).to(dtype)

    tensors = {"model.embed_tokens": make(VOCAB, hidden), "lm_head": make(VOCAB, hidden), "model.norm": make(hidden)}
    for i in range(layers):
        sizes = {"self_attn.q_proj": (heads * dim, hidden), "self_attn.k_proj": (kv_heads * dim, hidden),
                 "self_attn.v_proj": (kv_heads * dim, hidden), "self_attn.o_proj": (hidden, heads * dim),
                 "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
                 "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        if family == "qwen3":
            sizes |= {"self_attn.q_norm": (dim,), "self_attn.k_norm": (dim,)}
        tensors |= {f"model.layers.{i}.{name}": make(*shape) for name, shape in sizes.items()}
    config = {"model_type": family, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
              "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim, "vocab_size": VOCAB,
              "max_position_embeddings": 512}
    return NativeTarget(config, {f"{name}.weight": t for name, t in tensors.items()}, device=device)
