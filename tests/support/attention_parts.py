"""A DFlash drafter's attention layer as vLLM makes it, the metadata of a pass, and what the pass must give."""

import importlib
import sys
import types

import torch

from dflash_engines import vllm as plugin
from tests.support import fake_vllm as fake

HEADS, WIDTH = 4, 3
DRAFTER = fake.SelectorConfig(use_non_causal=True)


def why(name, device="cpu"):
    """What is said of a hook when a process has loaded the plugin and makes a proposer."""
    plugin.register()
    arguments = {"vllm_config": fake.config(), "device": torch.device(device)}
    return next(o.why for o in plugin.seen(arguments, plugin.V1) if o.name == name)


def fresh_backend(monkeypatch):
    """Our backend's module, made on the stand-in that is installed and kept from others: its base classes are those."""
    name = "dflash_engines.vllm.attention_backend"
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)
    return module


def layer_of(backend, heads_first, dtype=torch.float32):
    layer = fake.Layer(dtype, heads_first)
    layer.impl = backend.DFlashAttention(HEADS, fake.HEAD_DIM, 0.3, fake.KV_HEADS)
    return layer


def common(lens, width=WIDTH, tokens=None, causal=False):
    """What the engine's builders are given: lengths with the block, the table a view of a wider one. With `tokens` the
    second request has what the first leaves of them."""
    ends = [0, width, 2 * width if tokens is None else tokens]
    table = torch.arange(2 * fake.PAGES).flip(0).view(2, fake.PAGES).int() % fake.PAGES
    starts = torch.tensor(ends, dtype=torch.int32)
    return types.SimpleNamespace(batch_size=lambda: 2, max_query_len=width, causal=causal, num_actual_tokens=ends[-1],
                                 seq_lens=torch.tensor(lens, dtype=torch.int32) + starts.diff(), query_start_loc=starts,
                                 block_table_tensor=table[:, :3])


def built(backend, *args, **kwargs):
    return backend.DFlashMetadataBuilder(None, [], None, None).build(0, common(*args, **kwargs))


def expected(q, k, v, context, causal):
    """Attention of one request in float64: context (c, 2, Hkv, D), block rows (Q, ., D)."""
    keys, values = (torch.cat([context[:, i], t]).double().repeat_interleave(HEADS // fake.KV_HEADS, 1)
                    for i, t in enumerate((k, v)))
    scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * 0.3
    if causal:
        ahead = torch.arange(len(keys)) > len(context) + torch.arange(len(q))[:, None]
        scores = scores.masked_fill(ahead, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).float()
