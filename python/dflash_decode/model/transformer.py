"""The decoder layers shared by Llama- or Qwen3-like targets and DFlash drafters, built from our ops.

    h = norm(x);  x += o(attention(qk_norm_rope(qkv(h))));  h = norm(x);  x += down(silu(gate(h)) * up(h))

Each addition is fused into the norm that follows it. All memory of a pass over B requests of Q tokens is allocated when
the pass is made, so that it can be recorded as a graph.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dflash_kernels import (
    PackedWeight,
    PagedKV,
    add_rms_norm,
    block_attention,
    linear,
    pack_weight,
    qk_norm_rope,
    quantize_blocks,
    quantize_weight,
    rms_norm,
    silu_and_mul,
)

from ..checkpoint.blocks import Blocks
from .config import LayerMask

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Tensors:
    """A checkpoint's tensors, taken one by one with their shapes checked. A tensor that is never taken is an error."""

    def __init__(self, tensors: Mapping[str, torch.Tensor | Blocks], dtype: torch.dtype, device: torch.device,
                 what: str):
        self._tensors, self._dtype, self._device, self._what = tensors, dtype, device, what
        self._left = set(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """Takes a weight of any float dtype and converts it to `dtype`."""
        return self._take(name, shape, _FLOATS).to(self._device, self._dtype)

    def take_weight(self, name: str, *shape: int) -> torch.Tensor | Blocks:
        """Takes a weight of products: as `take` does, or in its blocks."""
        if not isinstance(self._tensors.get(name), Blocks):
            return self.take(name, *shape)
        return self._take(name, shape, None)

    def take_ids(self, name: str, *shape: int) -> torch.Tensor:
        """Takes integers and converts them to int64."""
        return self._take(name, shape, _INTEGERS).to(self._device, torch.int64)

    def _take(self, name, shape, dtypes):
        if name not in self._left:
            raise ValueError(f"{self._what}: tensor {name} must be there with shape {shape}; got nothing")
        self._left.remove(name)
        t = self._tensors[name]
        if tuple(t.shape) != shape:
            raise ValueError(f"{self._what}: tensor {name} must have shape {shape}; got {tuple(t.shape)}")
        if dtypes is None:
            return t
        if isinstance(t, Blocks):
            raise ValueError(f"{self._what}: tensor {name} must have elements; got blocks of {t.format}")
        if t.dtype not in dtypes:
            names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise ValueError(f"{self._what}: tensor {name} must be one of {names}; got "
                             f"{str(t.dtype).removeprefix('torch.')}")
        return t

    def drop(self, *endings: str) -> None:
        """Ignores tensors that carry no new information."""
        self._left = {name for name in self._left if not name.endswith(endings)}

    def finish(self) -> None:
        if self._left:
            raise ValueError(f"{self._what}: tensor {sorted(self._left)[0]} must not be there (its config has no place "
                             f"for it); got {len(self._left)} such tensors")


@dataclass(frozen=True)
class Layer:
    input_norm: torch.Tensor
    qkv: "Weight"
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: "Weight"
    o_bias: torch.Tensor | None
    post_norm: torch.Tensor
    gate_up: "Weight"
    gate_up_bias: torch.Tensor | None
    down: "Weight"
    down_bias: torch.Tensor | None
    mask: LayerMask
    sinks: torch.Tensor | None


@dataclass(frozen=True)
class Geometry:
    """value_scale multiplies V. It is folded into the weight, so that V is the same wherever it is computed."""

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
    value_scale: float = 1.0

    @property
    def qkv_width(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


Packer = Callable[[torch.Tensor | Blocks], PackedWeight]


def packer(int8: bool, exact: bool = False) -> Packer:
    """The packing of weights: in their blocks, in their dtype, or in 8 bits; on a CPU with a scale for 32 elements, so
    that rows of products become int8 too, elsewhere with one per row. exact: whether a file's blocks are multiplied as
    the elements that they stand for."""
    def pack(weight: torch.Tensor | Blocks) -> PackedWeight:
        if isinstance(weight, Blocks):
            return pack_weight(weight.data, format=weight.format, exact=exact)
        if int8 and weight.device.type == "cpu" and weight.shape[1] % 32 == 0:
            return pack_weight(quantize_blocks(weight, "q8_0"), format="q8_0")
        return pack_weight(*quantize_weight(weight)) if int8 else pack_weight(weight)

    return pack


class Weight:
    """A weight whose rows come from several tensors, one below the other. Those of one format are one product."""

    def __init__(self, pack: Packer, *parts: torch.Tensor | Blocks):
        groups: list[list[torch.Tensor | Blocks]] = []
        for part in parts:
            if groups and _kind(groups[-1][0]) == _kind(part):
                groups[-1].append(part)
            else:
                groups.append([part])
        self.parts = [pack(_below(group)) for group in groups]

    def product(self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        """out = linear(x), with the bias of all rows."""
        if len(self.parts) == 1:
            linear(x, self.parts[0], bias, out=out)
            return
        at = 0
        for part in self.parts:
            to = slice(at, at := at + part.out_features)
            linear(x, part, None if bias is None else bias[to], out=out[:, to])


def _kind(part: torch.Tensor | Blocks) -> str | None:
    return part.format if isinstance(part, Blocks) else None


def _below(parts: Sequence[torch.Tensor | Blocks]) -> torch.Tensor | Blocks:
    """Tensors of one kind as one."""
    if len(parts) == 1:
        return parts[0]
    rows = torch.cat([part.data if isinstance(part, Blocks) else part for part in parts])
    return Blocks(rows, parts[0].format) if isinstance(parts[0], Blocks) else rows


def take_layer(tensors: Tensors, prefix: str, g: Geometry, mask: LayerMask,
               pack: Packer) -> tuple[Layer, list[torch.Tensor | Blocks | None]]:
    """One layer's weights, packed, and [k weight, v weight, k bias, v bias] unpacked."""
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
    gate, gate_bias = projection("mlp.gate_proj", g.intermediate, g.hidden, g.mlp_bias)
    up, up_bias = projection("mlp.up_proj", g.intermediate, g.hidden, g.mlp_bias)
    down, down_bias = projection("mlp.down_proj", g.hidden, g.intermediate, g.mlp_bias)
    head_norms = [tensors.take(f"{prefix}self_attn.{n}.weight", g.head_dim) if g.qk_norm else None
                  for n in ("q_norm", "k_norm")]
    layer = Layer(
        input_norm=tensors.take(f"{prefix}input_layernorm.weight", g.hidden),
        qkv=Weight(pack, q, k, v), qkv_bias=_cat(q_bias, k_bias, v_bias),
        q_norm=head_norms[0], k_norm=head_norms[1], o=Weight(pack, o), o_bias=o_bias,
        post_norm=tensors.take(f"{prefix}post_attention_layernorm.weight", g.hidden),
        gate_up=Weight(pack, gate, up), gate_up_bias=_cat(gate_bias, up_bias),
        down=Weight(pack, down), down_bias=down_bias, mask=mask,
        sinks=tensors.take(f"{prefix}self_attn.attention_sink_bias", g.num_heads) if mask.sinks else None,
    )
    return layer, [k, v, k_bias, v_bias]


def _cat(*parts):
    return None if parts[0] is None else torch.cat(parts)


class LayersPass:
    """A pass of some layers over B blocks of Q tokens, in memory of its own: T = B * Q rows, or `rows` if packed.

    x (T, H): an input, the embedded tokens; run() overwrites it.
    features (T, F * H): after run(), the outputs of the target layers side by side, in the order of `target_layer_ids`.
        The last layer's output is taken after the final norm, as in transformers' hidden_states[-1].
    """

    def __init__(
        self,
        g: Geometry,
        layers: Sequence[Layer],
        final_norm: torch.Tensor,
        cos_sin: torch.Tensor,
        interleaved: bool,
        batch: int,
        width: int,
        caches: Sequence[PagedKV],
        *,
        target_layer_ids: Sequence[int] = (),
        rows: int | None = None,
    ):
        self.g, self.layers, self.final_norm, self.cos_sin = g, layers, final_norm, cos_sin
        self.interleaved, self.shape, self.caches = interleaved, (batch, width), caches
        rows = batch * width if rows is None else rows

        def buffer(columns):
            return torch.zeros((rows, columns), dtype=final_norm.dtype, device=final_norm.device)

        self.x, self.normed, self.added = buffer(g.hidden), buffer(g.hidden), buffer(g.hidden)
        self.qkv, self.mixed = buffer(g.qkv_width), buffer(g.num_heads * g.head_dim)
        self.gate_up, self.act = buffer(2 * g.intermediate), buffer(g.intermediate)
        self.features = buffer(len(target_layer_ids) * g.hidden)
        self.collected = {
            layer: self.features[:, i * g.hidden:(i + 1) * g.hidden] for i, layer in enumerate(target_layer_ids)
        }

    def run(self, positions: torch.Tensor, slots: torch.Tensor | None, page_table: torch.Tensor,
            context_lens: torch.Tensor, block_lens: torch.Tensor,
            block_starts: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the rows (T, H) after the final norm. slots: where this block's K/V are written; None writes none."""
        where = (page_table, context_lens, block_lens, block_starts)
        x, stream = self.x, self.x
        for index, (layer, cache) in enumerate(zip(self.layers, self.caches, strict=True)):
            if index == 0:
                rms_norm(x, layer.input_norm, self.g.eps, out=self.normed)
            else:
                stream = self._add(stream, layer.input_norm, self.collected.get(index - 1, x))
            self._attend(layer, cache, positions, slots, *where)
            stream = self._add(stream, layer.post_norm, x)
            layer.gate_up.product(self.normed, layer.gate_up_bias, self.gate_up)
            silu_and_mul(self.gate_up, out=self.act)
            layer.down.product(self.act, layer.down_bias, self.added)
        last = self.collected.get(len(self.layers) - 1, self.normed)
        add_rms_norm(self.added, stream, self.final_norm, self.g.eps, out=last)
        return last

    def _add(self, stream, weight, into):
        """normed = norm(stream + added). The sum is written to `into`, which can be part of the features, so that they
        need no copy."""
        add_rms_norm(self.added, stream, weight, self.g.eps, out=self.normed,
                     residual_out=None if into is stream else into)
        return into

    def _attend(self, layer, cache, positions, slots, page_table, context_lens, block_lens, block_starts):
        g = self.g
        layer.qkv.product(self.normed, layer.qkv_bias, self.qkv)
        qk_norm_rope(self.qkv, positions, self.cos_sin, num_heads=g.num_heads, num_kv_heads=g.num_kv_heads,
                     head_dim=g.head_dim, q_weight=layer.q_norm, k_weight=layer.k_norm, eps=g.eps,
                     interleaved=self.interleaved, cache=None if slots is None else cache, slots=slots)
        rows = self.shape if block_starts is None else (len(self.qkv),)
        heads = self.qkv.view(*rows, -1, g.head_dim)
        q, k, v = heads.split((g.num_heads, g.num_kv_heads, g.num_kv_heads), -2)
        block_attention(q, k, v, cache, page_table, context_lens, block_lens=block_lens, block_starts=block_starts,
                        max_block=None if block_starts is None else self.shape[1], causal=layer.mask.causal,
                        window=layer.mask.window, sinks=layer.sinks, out=self.mixed.view(*rows, -1, g.head_dim))
        layer.o.product(self.mixed, layer.o_bias, self.added)
