"""Targets built from our ops and pages."""

from collections.abc import Mapping, Sequence

import torch

from dflash_kernels import PackedWeight, PagedKV, embed_tokens, linear, lm_head_argmax

from ..checkpoint.blocks import Blocks
from ..kv import CacheShape
from .quantized import dequantized
from .rope import RopeTables
from .target_config import read_target_config
from .tensors import Tensors, packer
from .transformer import LayersPass, take_layer

_WHAT = "target checkpoint"


class NativeTarget:
    """A decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU or experts; with or without norms of queries and keys,
    biases, windows and sinks.

    config: a Hugging Face config.json of a model_type in families.FAMILIES.
    tensors: by Hugging Face names.
    dtype: by default that of the embedding.
    max_context: the longest prompt plus answer, at most the model's own.
    int8: keeps the weights of products in 8 bits: on a CPU in blocks of 32 with a scale each, beside rows that are
        rounded to int8 too, elsewhere with one scale per row. A step reads half of the bytes; the output can differ.
    exact: multiplies tensors in blocks as the elements that they stand for. The output is that of these elements.

    Raises ValueError for a missing or wrong field or tensor, and NotImplementedError for a field that changes the
    arithmetic into something not implemented.
    """

    graph_safe = packs = reuses = True
    head_bias: torch.Tensor | None = None
    embedding_scale = 1.0

    def __init__(self, config: Mapping, tensors: Mapping[str, torch.Tensor | Blocks], *,
                 dtype: torch.dtype | None = None,
                 device: torch.device | str = "cpu", max_context: int | None = None, int8: bool = False,
                 exact: bool = False):
        c = read_target_config(config)
        g = c.geometry
        self.num_layers, self.hidden_size, self.vocab_size = c.num_layers, g.hidden, c.vocab_size
        self.max_context = c.max_context
        if max_context is not None:
            if not 1 <= max_context <= self.max_context:
                raise ValueError(f"target config: max_context must be between 1 and max_position_embeddings = "
                                 f"{self.max_context}; got {max_context}")
            self.max_context = max_context
        name = "model.embed_tokens.weight"
        if dtype is None:  # where there is no such tensor, `take` says so
            dtype = getattr(tensors.get(name), "dtype", torch.bfloat16)
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{_WHAT}: the dtype of {name} must be float32, bfloat16 or float16; "
                             f"got {dtype}")
        self.dtype, self.device, self.geometry = dtype, torch.device(device), g
        self.cache = CacheShape(c.num_layers, g.num_kv_heads, g.head_dim, dtype, self.device)
        taker = Tensors(dequantized(c.quantization, tensors, dtype, _WHAT), dtype, self.device, _WHAT)
        taker.drop("rotary_emb.inv_freq")
        taker.drop_under(*(f"model.layers.{c.num_layers + i}." for i in range(c.extra)))
        self.int8, pack = int8, packer(int8, exact)
        embedding = taker.take_weight(name, self.vocab_size, g.hidden)
        # Blocks serve both: rows of a packed weight can be looked up.
        self.embedding = pack(embedding) if isinstance(embedding, Blocks) else embedding.contiguous()
        self.head: torch.Tensor | PackedWeight
        if c.tied:
            taker.drop("lm_head.weight")
            self.head = self.embedding if isinstance(self.embedding, PackedWeight) else pack(self.embedding)
        else:
            self.head = pack(taker.take_weight("lm_head.weight", self.vocab_size, g.hidden))
        self._layers = [take_layer(taker, i, g, mask, pack, prefix="model.", int8=int8)[0]
                        for i, mask in enumerate(c.masks)]
        self._norm = taker.take("model.norm.weight", g.hidden)
        taker.finish()
        self._tables = RopeTables(c.ropes, self.max_context, self.device)
        self._query_tables = RopeTables(c.query_ropes, self.max_context, self.device) if c.query_ropes else None

    def make_pass(
        self, batch: int, width: int, caches: Sequence[PagedKV], target_layer_ids: Sequence[int] = (),
        rows: int | None = None
    ) -> "NativePass":
        tables, others = self._tables.reaching(caches, width), self._query_tables
        layers = LayersPass(self.geometry, self._layers, self._norm, tables, False, batch, width, caches,
                            target_layer_ids=target_layer_ids, rows=rows,
                            query_cos_sin=others.reaching(caches, width) if others else None)
        return NativePass(self.embedding, layers)

    def next_ids(self, rows: torch.Tensor, ids: torch.Tensor, values: torch.Tensor) -> None:
        lm_head_argmax(rows, self.head, out_ids=ids, out_values=values)

    def logits(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        linear(rows, self.head, out=out)


class NativePass:
    def __init__(self, embedding, layers):
        self.embedding, self.layers = embedding, layers

    def run(self, ids, positions, slots, page_table, context_lens, block_lens, block_starts=None):
        embed_tokens(ids.view(-1), self.embedding, out=self.layers.x)
        rows = self.layers.run(positions.view(-1), slots.view(-1), page_table, context_lens, block_lens, block_starts)
        return rows, self.layers.features
