"""The target: a causal model that returns its hidden states for thousands of rows, on any device.

A Llama of a GGUF file is written out with torch's own operators for a GPU, and is the decoding loop's on a CPU, which
takes less than half of the time there. Any other is transformers' model.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F

from dflash_decode import Session
from dflash_decode.checkpoint import Checkpoint, find_model, load_checkpoint
from dflash_decode.model.rope import Rope, read_rope
from dflash_decode.step import Prefill, prefill_sizes
from dflash_kernels import lm_head_topk

PAGE, ROWS = 64, 256  # of the decoding loop's passes
LOGITS = 2048  # rows of logits at a time


def passes_over(prefill: Callable[[int], Prefill], ids: list[int], table: torch.Tensor,
                device: torch.device) -> Iterator[tuple[slice, Prefill]]:
    """Runs a text through prefill(rows), a part at a time: where the part lies, and the pass that has just read it."""
    done = 0
    for rows in prefill_sizes(len(ids), ROWS, device):
        part, found = ids[done:done + rows], prefill(rows)
        found(part, done, table)
        yield slice(done, done + len(part)), found
        done += len(part)


def rope_table(rope: Rope, positions: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos, sin (positions, head_dim), half-split layout, float32."""
    cos, sin = rope.table(positions, device).chunk(2, -1)
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


class Target(ABC):
    """What training needs of a target.

    embedding, head (vocab, H); norm (H,), the weight of the final norm. layers: how many. theta: RoPE's, and
    max_positions: the longest context, which the drafter takes over. logits are hidden @ head.T, and rows of the
    embedding are the inputs of the first layer: a target that scales either is refused.
    """

    device: torch.device
    dtype: torch.dtype
    embedding: torch.Tensor
    head: torch.Tensor
    norm: torch.Tensor
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    eps: float
    theta: float
    max_positions: int
    bos_id: int | None
    eos_id: int | None

    @abstractmethod
    def forward(self, ids: torch.Tensor, target_layer_ids: Iterable[int] = ()) -> tuple[torch.Tensor,
                                                                                      list[torch.Tensor]]:
        """ids (B, T) padded on the right -> the final normed hidden states (B, T, H) and the outputs of the layers
        `target_layer_ids` in rising order, each (B, T, H)."""

    def likely(self, final: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """final (N, H) -> the most likely tokens after each row, and their probabilities, (N, count)."""
        tops = [torch.softmax(F.linear(rows, self.head), -1).topk(count) for rows in final.split(LOGITS)]
        return torch.cat([top.indices for top in tops]), torch.cat([top.values for top in tops])


def load_target(model: str, device: str | torch.device = "cpu") -> Target:
    """A target by the name, file or directory that `dflash-kernels generate` takes."""
    where = find_model(model)
    if where.is_dir():
        return TransformersTarget(where, device)
    if torch.device(device).type == "cpu":
        return DecodedTarget(model)
    return LlamaTarget(load_checkpoint(model, torch.bfloat16), device)


class Llama(Target):
    """checkpoint: config and tensors of a Llama without biases, with tied embeddings or its own head."""

    def __init__(self, checkpoint: Checkpoint, device: str | torch.device):
        c, take = checkpoint.config, lambda name: checkpoint.tensor(name).to(device)
        if c.get("model_type") != "llama" or c.get("attention_bias") or c.get("mlp_bias"):
            raise ValueError("target: a GGUF file must be of a Llama without biases (a Hugging Face directory can be "
                             f"of any family); got model_type {c.get('model_type')}")
        self.device = torch.device(device)
        self.hidden, self.eps, self.vocab = c["hidden_size"], c["rms_norm_eps"], c["vocab_size"]
        self.heads, self.kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        self.head_dim = c.get("head_dim") or self.hidden // self.heads
        self.intermediate, self.layers = c["intermediate_size"], c["num_hidden_layers"]
        self.rope = read_rope(c, self.head_dim, "target", bounded=True)
        self.theta = self.rope.theta
        self.max_positions = c["max_position_embeddings"]
        self.bos_id, self.eos_id = c.get("bos_token_id"), c.get("eos_token_id")
        self.embedding, self.norm = take("model.embed_tokens.weight"), take("model.norm.weight")
        self.head = take("lm_head.weight") if "lm_head.weight" in checkpoint.tensors else self.embedding
        self.dtype = self.embedding.dtype


class DecodedTarget(Llama):
    """The model of a GGUF file on a CPU, by the passes of decoding: its weights stay in their blocks, as `generate`
    keeps them. positions: of the longest text."""

    def __init__(self, model: str, positions: int = 4096):
        super().__init__(load_checkpoint(model, torch.bfloat16), "cpu")
        target, pages = Session.load(model, "none").target, -(-positions // PAGE)
        kv = target.cache.allocate(pages, PAGE)
        self.table, self.packed_head = torch.arange(pages, dtype=torch.int32), target.head
        self.prefill = cache(lambda layers, rows: Prefill(target, None, kv, [], rows, PAGE, pages,
                                                          target_layer_ids=layers))

    def forward(self, ids: torch.Tensor, target_layer_ids: Iterable[int] = ()):
        layers, (b, t) = tuple(sorted(set(target_layer_ids))), ids.shape
        final = torch.empty(b, t, self.hidden, dtype=self.dtype)
        seen = torch.empty(b, t, len(layers) * self.hidden, dtype=self.dtype)
        for i, text in enumerate(ids.tolist()):
            for at, found in passes_over(partial(self.prefill, layers), text, self.table, self.device):
                final[i, at] = found.out[:at.stop - at.start]
                if layers:
                    seen[i, at] = found.features[:at.stop - at.start]
        return final, list(seen.split(self.hidden, -1)) if layers else []

    def likely(self, final: torch.Tensor, count: int):
        ids, values, lse = lm_head_topk(final, self.packed_head, count)
        return ids, (values - lse[:, None]).exp()


class LlamaTarget(Llama):
    """The same in torch's operators. positions: of the longest text."""

    def __init__(self, checkpoint: Checkpoint, device: str | torch.device = "cpu", positions: int = 4096):
        super().__init__(checkpoint, device)
        self.weights = []

        def take(name: str) -> torch.Tensor:
            return checkpoint.tensor(name).to(device)

        for i in range(self.layers):
            at = f"model.layers.{i}."
            self.weights.append(Layer(
                input_norm=take(at + "input_layernorm.weight"),
                qkv=torch.cat([take(f"{at}self_attn.{n}_proj.weight") for n in "qkv"]),
                o=take(at + "self_attn.o_proj.weight"),
                post_norm=take(at + "post_attention_layernorm.weight"),
                gate_up=torch.cat([take(f"{at}mlp.{n}_proj.weight") for n in ("gate", "up")]),
                down=take(at + "mlp.down_proj.weight")))
        rope = self.rope
        if rope.rotary_dim != self.head_dim or rope.interleaved:
            raise ValueError("target: RoPE must rotate whole heads, in halves; got "
                             f"{rope.rotary_dim} of {self.head_dim}{', interleaved' * rope.interleaved}")
        table = rope_table(rope, positions, self.device)
        self.cos, self.sin = (t.to(self.dtype) for t in table)

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
    def forward(self, ids: torch.Tensor, target_layer_ids: Iterable[int] = ()):
        x, target_layer_ids, seen = F.embedding(ids, self.embedding), set(target_layer_ids), {}
        cos, sin = self.cos[:ids.shape[1]], self.sin[:ids.shape[1]]
        for i, layer in enumerate(self.weights):
            q, k, v = self._qkv(layer, x, cos, sin)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + F.linear(out.transpose(1, 2).flatten(2), layer.o)
            x = x + self._mlp(layer, x)
            if i in target_layer_ids:
                seen[i] = x
        return self.normed(x, self.norm), [seen[i] for i in sorted(seen)]


class TransformersTarget(Target):
    """The model of a Hugging Face directory, of any family whose text decodes through our loop."""

    def __init__(self, folder: Path, device: str | torch.device = "cpu"):
        from dflash_decode.model.hf_loading import read_model

        model = read_model(folder, torch.bfloat16).to(device).eval()
        c, embeddings = model.config.get_text_config(), model.get_input_embeddings()
        head = model.get_output_embeddings()
        _refuse_scales(c, embeddings, head)
        self.base, self.device, self.dtype = model.base_model, torch.device(device), torch.bfloat16
        self.embedding, self.head = embeddings.weight.detach(), head.weight.detach()
        self.vocab, self.hidden = self.embedding.shape
        self.heads, self.layers = c.num_attention_heads, c.num_hidden_layers
        self.kv_heads = getattr(c, "num_key_value_heads", None) or self.heads
        self.head_dim = getattr(c, "head_dim", None) or self.hidden // self.heads
        self.intermediate, self.eps = c.intermediate_size, getattr(c, "rms_norm_eps", 1e-6)
        self.theta = float((getattr(c, "rope_parameters", None) or {}).get("rope_theta", 10_000.0))
        self.max_positions, self.bos_id, self.eos_id = c.max_position_embeddings, c.bos_token_id, c.eos_token_id
        self.norm = _norm_of(getattr(model.get_decoder(), "norm", None), self.embedding[:64], self.eps)

    @torch.inference_mode()
    def forward(self, ids: torch.Tensor, target_layer_ids: Iterable[int] = ()):
        # Padding is on the right, so no token sees it, and a mask would only cost time.
        found = self.base(input_ids=ids, use_cache=False, output_hidden_states=True)
        return found.last_hidden_state, [found.hidden_states[i + 1] for i in sorted(target_layer_ids)]


@torch.inference_mode()
def _norm_of(module, rows: torch.Tensor, eps: float) -> torch.Tensor:
    """The weight of the final norm, where it is an RMS norm as the drafter's is; otherwise ones."""
    weight = getattr(module, "weight", None)
    if weight is not None:
        like = F.rms_norm(rows, weight.shape, weight, eps)
        if (module(rows) - like).abs().max() <= 0.02 * like.abs().max():
            return weight.detach()
    return torch.ones_like(rows[0])


def _refuse_scales(config, embeddings, head) -> None:
    from dflash_decode.model.hf import embedding_scale, logit_scale

    if head.bias is not None:
        raise ValueError("target: the LM head must have no bias, as the drafter uses it; got one")
    for what, got, neutral in (("the embedding's scale", embedding_scale(embeddings), 1.0),
                               ("the logits' scale", logit_scale(config), 1.0),
                               ("final_logit_softcapping", getattr(config, "final_logit_softcapping", None), None)):
        if got != neutral:
            raise ValueError(f"target: {what} must be {neutral}, as a drafter has none; got {got}")
