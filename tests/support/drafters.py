"""Drafters of random weights: dflash's own model and a dense one in torch beside ours, which serves in pages."""

import pytest
import torch

from dflash_decode.kv import NO_PAGE, PagePool
from dflash_decode.model.config import read_draft_config
from dflash_decode.model.drafter import Drafter, tensor_shapes
from tests.support.decode_models import VOCAB, make_target

HIDDEN, TARGET_LAYER_IDS, PAGE = 64, [2, 0, 3], 4


def draft_config(changes):
    top = {"hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
           "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCAB, "rms_norm_eps": 1e-5, "num_target_layers": 4,
           "max_position_embeddings": 512, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    nested = {"block_size": 6, "target_layer_ids": TARGET_LAYER_IDS, "mask_token_id": 7}
    names = {"input_embedding_scale", "output_multiplier", "final_logit_softcapping", "use_swa", "swa_window_size",
             "attention_sink_bias", "attention_value_scale"}
    nested |= {k: v for k, v in changes.items() if k in names}
    return {**top, **{k: v for k, v in changes.items() if k not in names}, "dflash_config": nested}


def random_tensors(config, dtype):
    torch.manual_seed(1)
    return {name: (torch.randn(size) * 0.3 + (0 if name.endswith("bias") else 1) if len(size) == 1
                   else torch.randn(size) * 0.7 / size[1] ** 0.5).to(dtype)
            for name, size in tensor_shapes(read_draft_config(config)).items()}


def dflash_model(config, tensors, dtype):
    model = pytest.importorskip("dflash.model")
    from transformers import Qwen3Config

    made = Qwen3Config(**{k: v for k, v in config.items()})
    made._attn_implementation = "sdpa"
    drafter = model.DFlashDraftModel(made).to(dtype).eval()
    drafter.load_state_dict(tensors)
    return drafter


def dense(c, t, features, rows):
    """One request's draft hidden states (Q, H), in the dtype of its tensors."""
    dtype, (n, q) = rows.dtype, (features.shape[0], rows.shape[0])
    exact = torch.float64 if dtype == torch.float64 else torch.float32

    def norm(x, w):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + c.rms_norm_eps) * w

    def rope(of, x, at):
        half, table = of.rotary_dim // 2, of.table(n + q).to(exact)
        cos, sin = (table[at, None, i * half:(i + 1) * half].to(dtype) for i in (0, 1))
        turning, still = x[..., :2 * half], x[..., 2 * half:]
        a, b = ((turning[..., 0::2], turning[..., 1::2]) if of.interleaved else turning.chunk(2, -1))
        pair = (a * cos - b * sin, b * cos + a * sin)
        turned = torch.stack(pair, -1).flatten(-2) if of.interleaved else torch.cat(pair, -1)
        return torch.cat((turned, still), -1)

    def project(name, x):
        return torch.nn.functional.linear(x, t[f"{name}.weight"], t.get(f"{name}.bias"))

    context, x = norm(project("fc", features), t["hidden_norm.weight"]), rows
    at, before = torch.arange(n + q), torch.arange(n, n + q)
    for i, (mask, of) in enumerate(zip(c.masks, c.ropes, strict=True)):
        name = f"layers.{i}."
        h, after = convolved(t, name + "attention_conv", norm(x, t[name + "input_layernorm.weight"]))
        both = torch.cat((context, h))
        query = project(name + "self_attn.q_proj", h).view(q, -1, c.head_dim)
        k, v = (project(f"{name}self_attn.{p}_proj", both).view(n + q, -1, c.head_dim) for p in "kv")
        query = rope(of, norm(query, t[name + "self_attn.q_norm.weight"]), before)
        k = rope(of, norm(k, t[name + "self_attn.k_norm.weight"]), at)
        k, v = (p.repeat_interleave(c.num_heads // c.num_kv_heads, 1) for p in (k, v * c.value_scale))
        scores = torch.einsum("qhd,khd->hqk", query, k) * c.head_dim ** -0.5
        gap = before[:, None] - at
        left, right = mask.window
        hidden = (gap < 0) if mask.causal else torch.zeros_like(gap, dtype=torch.bool)
        hidden |= (gap > left) if left >= 0 else False
        hidden |= (-gap > right) if right >= 0 else False
        scores = scores.masked_fill(hidden, float("-inf"))
        if mask.sinks:
            sink = t[name + "self_attn.attention_sink_bias"][:, None, None].expand(-1, q, 1)
            scores = torch.cat((scores, sink), -1)
        weights = scores.softmax(-1)[..., :n + q]
        x = x + after(project(name + "self_attn.o_proj", torch.einsum("hqk,khd->qhd", weights, v).reshape(q, -1)))
        h, after = convolved(t, name + "mlp_conv", norm(x, t[name + "post_attention_layernorm.weight"]))
        gate, up = project(name + "mlp.gate_proj", h), project(name + "mlp.up_proj", h)
        x = x + after(project(name + "mlp.down_proj", torch.nn.functional.silu(gate) * up))
    return norm(x, t["norm.weight"])


def convolved(t, name, x):
    """DFlash2's convolution before a sublayer, of its normed input x (Q, H), and the function that applies the one
    after it; the identity without one. Row i mixes rows i, i - 1, ... of the block, each with a coefficient of its
    own for each group of channels."""
    if f"{name}.base_kernel" not in t:
        return x, lambda y: y
    base = t[f"{name}.base_kernel"]
    taps, hidden = base.shape[1:]
    own = (x @ t[f"{name}.kernel_projection.weight"].T).view(len(x), 2, taps, -1)
    own = own.repeat_interleave(hidden // own.shape[-1], -1)

    def side(s, y):
        earlier = [torch.cat((torch.zeros_like(y[:tap]), y[:len(y) - tap])) for tap in range(taps)]
        return sum((base[s, tap] + own[:, s, tap]) * earlier[tap] for tap in range(taps))

    return side(0, x), lambda y: side(1, y)


def selected(t, hidden, logits, anchor, candidates):
    """DFlash2's greedy walk: of each slot's most likely tokens, the one that fits the token before it best."""
    pair, ids = hidden @ t["candidate_selector.hidden_projection.weight"].T, []
    before, after = (t[f"candidate_selector.{side}_codebook"] for side in ("predecessor", "successor"))
    for row, scores in zip(pair, logits, strict=True):
        top = scores.topk(candidates)
        edges = top.values + after[top.indices] @ (before[anchor] * row)
        anchor = int(top.indices[edges.argmax()])
        ids.append(anchor)
    return torch.tensor(ids)


def markov(t, logits, anchor, candidates):
    """DSpark's greedy walk over rows of logits: each token's bias comes from the one before it."""
    before, after = (t[f"markov_head.markov_w{i}.weight"] for i in (1, 2))
    ids = []
    for scores in logits:
        top = scores.topk(candidates)
        anchor = int(top.indices[(top.values + after[top.indices] @ before[anchor]).argmax()])
        ids.append(anchor)
    return torch.tensor(ids)


class Served:
    """A drafter with B requests in poisoned pages: contexts grow in ragged commits, then blocks are drafted."""

    def __init__(self, drafter, lengths, max_pages=16):
        pool = PagePool(64, PAGE)
        self.drafter, self.batch = drafter, len(lengths)
        self.kv = drafter.cache.allocate(pool.num_pages, PAGE)
        for cache in self.kv:
            cache.k.fill_(float("nan"))
            cache.v.fill_(float("nan"))
        self.tables = torch.stack([pool.table_row(pool.allocate(max(n, 0) + 8)[::-1], max_pages) for n in lengths])
        self.lens = torch.zeros(self.batch, dtype=torch.int32)
        torch.manual_seed(2)
        self.features = [torch.randn(n, drafter.config.features).to(drafter.dtype) for n in lengths]

    def commit_all(self, width=5, shift=0):
        """Feeds the features in steps of 0 to `width` rows; what a step does not commit is NaN."""
        context, generator = self.drafter.make_context(self.batch, width, self.kv), torch.Generator().manual_seed(3)
        while any(self.lens[b] < len(f) for b, f in enumerate(self.features)):
            rows = torch.full((self.batch, width, self.drafter.config.features), float("nan"), dtype=self.drafter.dtype)
            left = torch.tensor([len(f) for f in self.features], dtype=torch.int32) - self.lens
            counts = torch.minimum(torch.randint(0, width + 1, left.shape, generator=generator), left).int()
            positions = self.lens[:, None].long() + torch.arange(width)
            pages = self.tables.gather(1, (positions // PAGE).clamp(max=self.tables.shape[1] - 1)).long()
            slots = torch.where(pages == NO_PAGE, -1, pages * PAGE + positions % PAGE)
            for b, n in enumerate(counts.tolist()):
                rows[b, :n] = self.features[b][self.lens[b]:self.lens[b] + n]
            context.run(rows.view(-1, rows.shape[-1]), positions + shift, slots, counts)
            self.lens += counts
        return self

    def draft(self, anchors, block_lens=None, width=6):
        self.work = work = self.drafter.make_draft(self.batch, width, self.kv, PAGE)
        work.anchors.copy_(torch.tensor(anchors))
        lens = torch.tensor(block_lens or [work.rows] * self.batch, dtype=torch.int32)
        ids = work.run(self.lens, self.tables, lens)
        return work.layers.normed.view(self.batch, work.rows, -1), ids


def embedded(drafter, anchor, width=6):
    c = drafter.config
    return drafter.embedding[torch.tensor([anchor] + [c.mask_token_id] * (width - 1))]


def make(changes, dtype):
    config = draft_config(changes)
    model, target = make_target("llama", dtype)
    tensors = random_tensors(config, dtype)
    return config, tensors, model, Drafter(config, tensors, target)
