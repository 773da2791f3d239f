"""The target in PyTorch: a dense Llama-like model that writes text in large batches and returns its hidden states.

Training needs thousands of rows on any device, so it uses torch's own operators. Only attention on a CPU, for texts
being written, is ours: with torch, requests of different lengths all cost as much as the longest.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from dflash_decode.checkpoint import Checkpoint, load_checkpoint
from dflash_decode.model.rope import Rope
from dflash_kernels import PagedKV, block_attention


def rope_table(head_dim: int, theta: float, positions: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos, sin (positions, head_dim), half-split layout, float32."""
    cos, sin = Rope(theta, head_dim).table(positions, device).chunk(2, -1)
    return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of x (..., head_dim); cos, sin broadcast against it."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


@dataclass
class Layer:
    input_norm: torch.Tensor
    qkv: torch.Tensor
    o: torch.Tensor
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass
class Writing:
    """A text in progress: `ids` are its prompt, `answer` the tokens written."""

    key: object
    ids: list[int]
    temperature: float
    budget: int
    answer: list[int] = field(default_factory=list)
    finish: str = "length"


class Target:
    """checkpoint: config and tensors of a Llama-like model without biases, with tied embeddings or its own head."""

    def __init__(self, checkpoint: Checkpoint, device: str | torch.device = "cpu", max_positions: int = 2048):
        c, take = checkpoint.config, lambda name: checkpoint.tensor(name).to(device)
        if c.get("model_type") != "llama" or c.get("attention_bias"):
            raise ValueError(f"target: model_type must be llama without biases; got {c.get('model_type')}")
        self.config, self.device = c, torch.device(device)
        self.hidden, self.eps, self.vocab = c["hidden_size"], c["rms_norm_eps"], c["vocab_size"]
        self.heads, self.kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        self.head_dim = c.get("head_dim") or self.hidden // self.heads
        self.embedding, self.norm = take("model.embed_tokens.weight"), take("model.norm.weight")
        self.head = take("lm_head.weight") if "lm_head.weight" in checkpoint.tensors else self.embedding
        self.dtype = self.embedding.dtype
        self.layers = []
        for i in range(c["num_hidden_layers"]):
            at = f"model.layers.{i}."
            self.layers.append(Layer(
                input_norm=take(at + "input_layernorm.weight"),
                qkv=torch.cat([take(f"{at}self_attn.{n}_proj.weight") for n in "qkv"]),
                o=take(at + "self_attn.o_proj.weight"),
                post_norm=take(at + "post_attention_layernorm.weight"),
                gate_up=torch.cat([take(f"{at}mlp.{n}_proj.weight") for n in ("gate", "up")]),
                down=take(at + "mlp.down_proj.weight")))
        table = rope_table(self.head_dim, float(c["rope_theta"]), max_positions, self.device)
        self.cos, self.sin = (t.to(self.dtype) for t in table)

    @classmethod
    def load(cls, model: str, device: str | torch.device = "cpu", max_positions: int = 2048) -> "Target":
        return cls(load_checkpoint(model, torch.bfloat16), device, max_positions)

    def normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (self.hidden,), weight, self.eps)

    def _qkv(self, layer: Layer, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
        """x (B, T, H) -> q (B, heads, T, D), k, v (B, kv_heads, T, D), q and k rotated."""
        b, t, _ = x.shape
        qkv = F.linear(self.normed(x, layer.input_norm), layer.qkv).view(b, t, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), 1)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def _mlp(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(self.normed(x, layer.post_norm), layer.gate_up).chunk(2, -1)
        return F.linear(F.silu(gate) * up, layer.down)

    @torch.inference_mode()
    def forward(self, ids: torch.Tensor, target_layer_ids: Iterable[int] = (), keep=None):
        """ids (B, T) padded on the right -> the final normed hidden states (B, T, H) and the outputs of the layers
        `target_layer_ids`, each (B, T, H). keep(i, k, v) sees each layer's rotated K and V (B, kv_heads, T, D)."""
        x, target_layer_ids, seen = F.embedding(ids, self.embedding), set(target_layer_ids), {}
        cos, sin = self.cos[:ids.shape[1]], self.sin[:ids.shape[1]]
        for i, layer in enumerate(self.layers):
            q, k, v = self._qkv(layer, x, cos, sin)
            if keep is not None:
                keep(i, k, v)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + F.linear(out.transpose(1, 2).flatten(2), layer.o)
            x = x + self._mlp(layer, x)
            if i in target_layer_ids:
                seen[i] = x
        return self.normed(x, self.norm), [seen[i] for i in sorted(seen)]

    @torch.inference_mode()
    def write(self, requests: Iterable[Writing], stop_ids: Iterable[int], slots: int, capacity: int,
              seed: int = 0) -> Iterator[Writing]:
        """Continues each request's ids until a stop id (not kept), its budget or `capacity` positions, `slots` at a
        time; a place that becomes free is taken by the next request. temperature 0 is greedy. Yields them finished."""
        waiting, stops = iter(requests), torch.tensor(list(stop_ids), device=self.device)
        shape = (len(self.layers), slots, self.kv_heads, capacity, self.head_dim)
        keys, values = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        random = torch.Generator(self.device).manual_seed(seed)
        texts: list[Writing | None] = [None] * slots
        lens = torch.zeros(slots, dtype=torch.long, device=self.device)  # positions in the cache
        last = torch.zeros(slots, dtype=torch.long, device=self.device)
        temp = torch.zeros(slots, device=self.device)
        place, more = torch.arange(slots, device=self.device), True
        while True:
            free = [s for s in range(slots) if texts[s] is None]
            if more and len(free) >= max(slots // 8, 1):
                taken = []
                for s in free:
                    text = next(waiting, None)
                    if text is None:
                        more = False
                        break
                    texts[s] = text
                    taken.append(s)
                if taken:
                    last[taken] = self._prefill([texts[s] for s in taken], taken, keys, values, lens, temp, random)
                    yield from self._settle(taken, texts, last, lens, stops, capacity)
            busy = [s for s in range(slots) if texts[s] is not None]
            if not busy:
                if more:
                    continue
                return
            last = self._step(last, lens, keys, values, int(lens[busy].max()) + 1, place, temp, random)
            lens += 1
            lens.clamp_(max=capacity - 1)
            yield from self._settle(busy, texts, last, lens, stops, capacity)

    def _prefill(self, texts, taken, keys, values, lens, temp, random) -> torch.Tensor:
        longest = max(len(t.ids) for t in texts)
        ids = torch.zeros((len(texts), longest), dtype=torch.long)
        for row, text in zip(ids, texts, strict=True):
            row[:len(text.ids)] = torch.tensor(text.ids)
        where = torch.tensor(taken, device=self.device)

        def keep(i, k, v):
            keys[i, where, :, :longest], values[i, where, :, :longest] = k, v

        hidden, _ = self.forward(ids.to(self.device), keep=keep)
        ends = torch.tensor([len(t.ids) for t in texts], device=self.device)
        lens[where], temp[where] = ends, torch.tensor([t.temperature for t in texts], device=self.device)
        return self._choose(hidden[torch.arange(len(texts), device=self.device), ends - 1], temp[where], random)

    def _step(self, last, lens, keys, values, longest, place, temp, random) -> torch.Tensor:
        b, group = len(last), self.heads // self.kv_heads
        x = F.embedding(last, self.embedding)[:, None]
        cos, sin = self.cos[lens][:, None, None], self.sin[lens][:, None, None]
        mask, context, table = None, lens.int(), place.int()[:, None]
        if self.device.type != "cpu":  # the CPU's block_attention reads each request's own length only
            mask = (torch.arange(longest, device=self.device) <= lens[:, None])[:, None, None]
        for i, layer in enumerate(self.layers):
            q, k, v = self._qkv(layer, x, cos, sin)
            keys[i, place, :, lens], values[i, place, :, lens] = k[:, :, 0], v[:, :, 0]
            if mask is None:
                cache = PagedKV(keys[i].transpose(1, 2), values[i].transpose(1, 2))
                out = block_attention(*(y.transpose(1, 2) for y in (q, k, v)), cache, table, context)
            else:  # the query heads that share a K/V head are its rows: K and V are read once
                out = F.scaled_dot_product_attention(q.reshape(b, self.kv_heads, group, self.head_dim),
                                                     keys[i, :, :, :longest], values[i, :, :, :longest], mask)
            x = x + F.linear(out.reshape(b, 1, -1), layer.o)
            x = x + self._mlp(layer, x)
        return self._choose(self.normed(x[:, 0], self.norm), temp, random)

    def _choose(self, hidden, temp, random) -> torch.Tensor:
        logits = F.linear(hidden, self.head)
        picks, warm = logits.max(-1).indices, (temp > 0).nonzero()[:, 0]
        if len(warm):
            odds = torch.softmax(logits[warm].float() / temp[warm, None], -1)
            picks[warm] = torch.multinomial(odds, 1, generator=random)[:, 0]
        return picks

    def _settle(self, which, texts, last, lens, stops, capacity) -> Iterator[Writing]:
        chosen, at = last.tolist(), lens.tolist()
        stopped = torch.isin(last, stops).tolist()
        for s in which:
            text = texts[s]
            if not stopped[s]:
                text.answer.append(chosen[s])
            if stopped[s] or len(text.answer) >= text.budget or at[s] + 1 >= capacity:
                text.finish, texts[s] = "stop" if stopped[s] else "length", None
                yield text
