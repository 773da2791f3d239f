"""The decoder layers shared by Llama- or Qwen3-like targets and DFlash drafters, built from our ops.

    h = norm(x);  x += o(attention(qk_norm_rope(qkv(h))));  h = norm(x);  x += down(silu(gate(h)) * up(h))

Each addition is fused into the norm that follows it; of DFlash2, with its convolutions (dflash2.py). All memory of a
pass over B requests of Q tokens is allocated when the pass is made, so that it can be recorded as a graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from dflash_kernels import PagedKV, add_rms_norm, block_attention, qk_norm_rope, rms_norm

from ..checkpoint.blocks import Blocks
from .config import Convolution
from .dflash2 import Conv, ConvMemory, take_conv
from .masks import LayerMask
from .mlp import Mlp, take_mlp
from .moe import Experts, ExpertsConfig, take_experts
from .tensors import Packer, Tensors, Weight


@dataclass(frozen=True)
class Layer:
    input_norm: torch.Tensor
    qkv: Weight
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Weight
    o_bias: torch.Tensor | None
    post_norm: torch.Tensor
    mlp: Mlp | Experts
    mask: LayerMask
    sinks: torch.Tensor | None
    attention_conv: Conv | None = None
    mlp_conv: Conv | None = None


@dataclass(frozen=True)
class Geometry:
    """value_scale multiplies V. It is folded into the weight, so that V is the same wherever it is computed.
    norm_of_heads: queries, and keys, are normed as one vector of all heads. sinks: the name of the sinks' tensor."""

    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = True
    norm_of_heads: bool = False
    sinks: str = "attention_sink_bias"
    value_scale: float = 1.0
    conv: Convolution | None = None
    experts: ExpertsConfig | None = None

    @property
    def qkv_width(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


def take_layer(tensors: Tensors, index: int, g: Geometry, mask: LayerMask, pack: Packer, *, prefix: str = "",
               int8: bool = False) -> tuple[Layer, list[torch.Tensor | Blocks | None]]:
    """One layer's weights, packed, and [k weight, v weight, k bias, v bias] unpacked. int8: experts in 8 bits."""
    prefix = f"{prefix}layers.{index}."
    kv = g.num_kv_heads * g.head_dim

    def projection(name, n, k, bias):
        weight = tensors.take_weight(f"{prefix}{name}.weight", n, k)
        return weight, tensors.take(f"{prefix}{name}.bias", n) if bias else None

    q, q_bias = projection("self_attn.q_proj", g.num_heads * g.head_dim, g.hidden, g.qkv_bias)
    k, k_bias = projection("self_attn.k_proj", kv, g.hidden, g.qkv_bias)
    v, v_bias = projection("self_attn.v_proj", kv, g.hidden, g.qkv_bias)
    if g.value_scale != 1.0:
        v, v_bias = (None if t is None else (t.float() * g.value_scale).to(t.dtype) for t in (v, v_bias))
    o, o_bias = projection("self_attn.o_proj", g.hidden, g.num_heads * g.head_dim, g.o_bias)
    head_norms = [tensors.take(f"{prefix}self_attn.{n}.weight", g.head_dim * (heads if g.norm_of_heads else 1))
                  if g.qk_norm else None for n, heads in (("q_norm", g.num_heads), ("k_norm", g.num_kv_heads))]
    convs = [take_conv(tensors, f"{prefix}{name}", g.hidden, g.conv, pack) if g.conv else None
             for name in ("attention_conv", "mlp_conv")]
    if g.experts and index not in g.experts.dense:
        mlp: Mlp | Experts = take_experts(tensors, prefix, g.experts, g.hidden, pack, int8)
    else:
        mlp = take_mlp(tensors, f"{prefix}mlp.", g.hidden, g.intermediate, g.mlp_bias, pack)
    layer = Layer(
        input_norm=tensors.take(f"{prefix}input_layernorm.weight", g.hidden),
        qkv=Weight(pack, q, k, v), qkv_bias=_cat(q_bias, k_bias, v_bias),
        q_norm=head_norms[0], k_norm=head_norms[1], o=Weight(pack, o), o_bias=o_bias,
        post_norm=tensors.take(f"{prefix}post_attention_layernorm.weight", g.hidden),
        mlp=mlp, mask=mask,
        sinks=tensors.take(f"{prefix}self_attn.{g.sinks}", g.num_heads) if mask.sinks else None,
        attention_conv=convs[0], mlp_conv=convs[1],
    )
    return layer, [k, v, k_bias, v_bias]


def _cat(*parts):
    return None if parts[0] is None else torch.cat(parts)


class LayersPass:
    """A pass of some layers over B blocks of Q tokens, in memory of its own: T = B * Q rows, or `rows` if packed.

    x (T, H): an input, the embedded tokens; run() overwrites it.
    cos_sin: the rotary table of each layer. query_cos_sin: of its queries, where they have another.
    features (T, F * H): after run(), the outputs of the target layers side by side, in the order of `target_layer_ids`.
        The last layer's output is taken after the final norm, as in transformers' hidden_states[-1].
    """

    def __init__(
        self,
        g: Geometry,
        layers: Sequence[Layer],
        final_norm: torch.Tensor,
        cos_sin: Sequence[torch.Tensor | None],
        interleaved: bool,
        batch: int,
        width: int,
        caches: Sequence[PagedKV],
        *,
        target_layer_ids: Sequence[int] = (),
        rows: int | None = None,
        query_cos_sin: Sequence[torch.Tensor | None] | None = None,
    ):
        self.g, self.layers, self.final_norm, self.cos_sin = g, layers, final_norm, cos_sin
        self.query_cos_sin = query_cos_sin or [None] * len(layers)
        self.interleaved, self.shape, self.caches = interleaved, (batch, width), caches
        rows = batch * width if rows is None else rows

        def buffer(columns):
            return torch.zeros((rows, columns), dtype=final_norm.dtype, device=final_norm.device)

        self.x, self.normed, self.added = buffer(g.hidden), buffer(g.hidden), buffer(g.hidden)
        self.qkv, self.mixed = buffer(g.qkv_width), buffer(g.num_heads * g.head_dim)
        self.memory = {shape: mlp.memory(self.x) for shape, mlp in {one.mlp.shape: one.mlp for one in layers}.items()}
        self.conv = ConvMemory(g.conv, batch, width, self.x) if g.conv else None
        self.features = buffer(len(target_layer_ids) * g.hidden)
        self.collected = {
            layer: self.features[:, i * g.hidden:(i + 1) * g.hidden] for i, layer in enumerate(target_layer_ids)
        }

    def run(self, positions: torch.Tensor, slots: torch.Tensor | None, page_table: torch.Tensor,
            context_lens: torch.Tensor, block_lens: torch.Tensor,
            block_starts: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the rows (T, H) after the final norm. slots: where this block's K/V are written; None writes none."""
        where = (page_table, context_lens, block_lens, block_starts)
        x, stream, conv = self.x, self.x, None
        tables = zip(self.cos_sin, self.query_cos_sin, strict=True)
        for index, (layer, cache, table) in enumerate(zip(self.layers, self.caches, tables, strict=True)):
            if index == 0:
                rms_norm(x, layer.input_norm, self.g.eps, out=self.normed)
            else:
                stream = self._add(stream, layer.input_norm, self.collected.get(index - 1, x), conv)
            self._attend(self._start(layer.attention_conv), layer, cache, table, positions, slots, *where)
            stream = self._add(stream, layer.post_norm, x, layer.attention_conv)
            layer.mlp.run(self._start(layer.mlp_conv), self.added, self.memory[layer.mlp.shape])
            conv = layer.mlp_conv
        last = self.collected.get(len(self.layers) - 1, self.normed)
        self._finish(conv, stream, self.final_norm, last, None)
        return last

    def _start(self, conv):
        """A sublayer's input from its normed rows."""
        return self.normed if self.conv is None else self.conv.start(conv, self.normed)

    def _add(self, stream, weight, into, conv):
        """normed = norm(stream + added). The sum is written to `into`, which can be part of the features, so that they
        need no copy. conv: the sublayer's, whose second convolution comes first."""
        self._finish(conv, stream, weight, self.normed, None if into is stream else into)
        return into

    def _finish(self, conv, stream, weight, out, residual_out):
        if self.conv is None:
            add_rms_norm(self.added, stream, weight, self.g.eps, out=out, residual_out=residual_out)
        else:
            self.conv.finish(conv, self.added, stream, weight, self.g.eps, out, residual_out)

    def _attend(self, rows, layer, cache, tables, positions, slots, page_table, context_lens, block_lens, block_starts):
        g = self.g
        layer.qkv.product(rows, layer.qkv_bias, self.qkv)
        if g.norm_of_heads:
            self._norm_heads(layer.q_norm, layer.k_norm)
        self._turn(layer, tables, positions, None if slots is None else cache, slots)
        shape = self.shape if block_starts is None else (len(self.qkv),)
        heads = self.qkv.view(*shape, -1, g.head_dim)
        q, k, v = heads.split((g.num_heads, g.num_kv_heads, g.num_kv_heads), -2)
        block_attention(q, k, v, cache, page_table, context_lens, block_lens=block_lens, block_starts=block_starts,
                        max_block=None if block_starts is None else self.shape[1], causal=layer.mask.causal,
                        window=layer.mask.window, sinks=layer.sinks, out=self.mixed.view(*shape, -1, g.head_dim))
        layer.o.product(self.mixed, layer.o_bias, self.added)

    def _turn(self, layer, tables, positions, cache, slots):
        """Norms and turns queries and keys, and stores keys and values. Queries with a table of their own turn apart.
        """
        g, (table, of_queries), rows, heads = self.g, tables, self.qkv, self.g.num_heads
        q_norm, k_norm = (None, None) if g.norm_of_heads else (layer.q_norm, layer.k_norm)
        turn = partial(qk_norm_rope, head_dim=g.head_dim, q_weight=q_norm, k_weight=k_norm, eps=g.eps,
                       interleaved=self.interleaved)
        if of_queries is not None:
            queries, rows = rows.tensor_split((heads * g.head_dim,), -1)
            turn(queries, positions, of_queries, num_heads=heads, num_kv_heads=0)
            heads = 0
        turn(rows, positions, table, num_heads=heads, num_kv_heads=g.num_kv_heads, cache=cache, slots=slots)

    def _norm_heads(self, q_norm, k_norm):
        """Norms the queries in place as one vector of all heads, and the keys as another."""
        q, k, _ = self.qkv.split([n * self.g.head_dim for n in (self.g.num_heads, *[self.g.num_kv_heads] * 2)], -1)
        for part, weight in ((q, q_norm), (k, k_norm)):
            rms_norm(part, weight, self.g.eps, out=part)
