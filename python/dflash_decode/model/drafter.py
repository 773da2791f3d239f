"""A DFlash drafter built from our ops: L layers that fill a block in one bidirectional pass.

    context:  c = norm(fc(features of the target));  K, V of every layer = one linear of c;  norm, RoPE, pages
    draft:    [anchor, MASK, ...] -> layers, each attending to its context pages and to the block itself -> argmax, or
              a selector's choice of the most likely tokens
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from dflash_kernels import (
    PagedKV,
    PreparedBlock,
    Proposal,
    SamplingTensors,
    embed_tokens,
    linear,
    lm_head_argmax,
    lm_head_topk,
    prepare_block,
    rms_norm,
    sample_draft,
    select_candidates,
    write_context_kv,
)

from ..arguments import check_target, of_type
from ..kv import CacheShape
from . import Target
from .config import DraftConfig, read_draft_config
from .dflash2 import take_selector
from .names import renamed
from .quantized import dequantized
from .rope import RopeTables
from .tensors import Tensors, packer
from .transformer import Geometry, Layer, LayersPass, take_layer
from .vocabulary import take_vocabulary

_WHAT = "draft checkpoint"
_CANDIDATES = 16  # most likely tokens that a draft is drawn from


class Drafter:
    """A drafter for one target.

    config: a DraftConfig, or config.json as a dict.
    tensors: by the names of z-lab's checkpoints (`layers.N. ...`, `fc`, `hidden_norm`, `norm`, and where it has its
        own: `embed_tokens`, `lm_head`, `d2t`, `mask_embedding`), with or without `model.`.
    vocabulary (n,) int: the target's tokens that the drafter can draft. The draft head is then these rows of the
        target's LM head, so a step streams n rows instead of all. None: all.
    int8: keeps the weights in 8 bits, as a NativeTarget does, and the draft head unless it is the target's whole LM
        head. A step reads half of the bytes. Drafts can differ; the output does not.

    The embedding and the LM head are the target's where the checkpoint has none. Raises TypeError for an argument of
    another type, and ValueError for a missing, unexpected or misshapen tensor and for a drafter that does not fit the
    target.
    """

    graph_safe = True

    def __init__(self, config: DraftConfig | Mapping, tensors: Mapping[str, torch.Tensor], target: Target,
                 vocabulary: torch.Tensor | None = None, *, int8: bool = False):
        check_target("Drafter", target)
        of_type("Drafter", "config", config, (DraftConfig, Mapping), "a DraftConfig, or a config.json as a dict")
        of_type("Drafter", "tensors", tensors, Mapping, "a mapping of names to tensors")
        of_type("Drafter", "vocabulary", vocabulary, (torch.Tensor, type(None)), "a tensor of token ids (n,) or None")
        of_type("Drafter", "int8", int8, bool, "True or False")
        self.config = c = config if isinstance(config, DraftConfig) else read_draft_config(config)
        self.dtype, self.device, self.block_size = target.dtype, target.device, c.block_size
        _check_fits(c, target)
        self.int8, self.pack = int8, packer(int8)
        self.geometry = g = Geometry(
            hidden=c.hidden_size, intermediate=c.intermediate_size, num_heads=c.num_heads, num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim, eps=c.rms_norm_eps, qkv_bias=c.attention_bias, o_bias=c.attention_bias,
            mlp_bias=c.mlp_bias, value_scale=c.value_scale, conv=c.conv)
        self.cache = CacheShape(c.num_layers, c.num_kv_heads, c.head_dim, self.dtype, self.device)
        stored = dequantized(c.quantization, renamed(tensors), self.dtype, _WHAT)
        taker = Tensors(stored, self.dtype, self.device, _WHAT)
        self.fc = self.pack(taker.take("fc.weight", c.hidden_size, c.features))
        self.hidden_norm = taker.take("hidden_norm.weight", c.hidden_size)
        self.norm = taker.take("norm.weight", c.hidden_size)
        self.layers: list[Layer] = []
        context: list[list[Any]] = []
        for i, mask in enumerate(c.masks):
            layer, parts = take_layer(taker, i, g, mask, self.pack)
            self.layers.append(layer)
            context.append(parts)
        self.context_kv = self.pack(torch.cat([t for k, v, _, _ in context for t in (k, v)]))
        self.context_bias = torch.cat([t for *_, k, v in context for t in (k, v)]) if c.attention_bias else None
        self.k_norms = torch.stack([cast(torch.Tensor, layer.k_norm) for layer in self.layers])
        own = take_vocabulary(taker, c, target)
        self.embedding, self.ids_of_draft, self.num_valid = own.embedding, own.ids_of_draft, own.num_valid
        self.selector = take_selector(taker, c, self.pack, own.ids_of_draft)
        self.head, self.head_bias = (target.head, target.head_bias) if own.head is None else (self.pack(own.head), None)
        if vocabulary is not None:
            self._restrict(vocabulary, target)
        taker.finish()
        self.calibration: tuple[float, list[float]] | None = None  # start of chances.Calibration
        self.tables = RopeTables(c.ropes, target.max_context, self.device)

    @property
    def target_layer_ids(self) -> tuple[int, ...]:
        return self.config.target_layer_ids

    def _restrict(self, vocabulary, target):
        """Reduces the draft head to the rows `vocabulary` of the target's LM head."""
        if self.head is not target.head or self.ids_of_draft is not None:
            raise ValueError(f"{_WHAT}: a draft vocabulary must come with the target's head; got a head of its own")
        ids = vocabulary.to(self.device, torch.int64)
        if ids.dim() != 1 or not len(ids) or not bool(((ids >= 0) & (ids < target.vocab_size)).all()):
            got = f"{tuple(ids.shape)}, {int(ids.min())} to {int(ids.max())}" if ids.numel() else "none"
            raise ValueError(f"{_WHAT}: draft vocabulary must be ids (n,) below {target.vocab_size}; got {got}")
        self.ids_of_draft, self.num_valid = ids, len(ids)
        self.head = self.pack(self.head.rows(ids).to(self.dtype))
        self.head_bias = None if self.head_bias is None else self.head_bias[ids].contiguous()

    def make_draft(self, batch: int, width: int, caches: Sequence[PagedKV], page_size: int,
                   params: SamplingTensors | None = None) -> "DraftPass":
        return DraftPass(self, batch, width, caches, page_size, params)

    def make_context(self, batch: int, width: int, caches: Sequence[PagedKV]) -> "ContextPass":
        return ContextPass(self, batch, width, caches)

    @classmethod
    def random(cls, target: Target, num_layers: int = 3, block_size: int = 8, seed: int = 0) -> "Drafter":
        """A drafter with random weights in the target's geometry. Its drafts are worthless; its work is that of a
        trained one."""
        shape, n = target.cache, target.num_layers
        heads = max(target.hidden_size // shape.head_dim // shape.kv_heads, 1) * shape.kv_heads
        config = {
            "hidden_size": target.hidden_size, "intermediate_size": 8 * (target.hidden_size // 3),
            "num_hidden_layers": num_layers, "num_attention_heads": heads, "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim, "vocab_size": target.vocab_size, "block_size": block_size, "mask_token_id": 0,
            "rope_theta": 10000.0,
            "num_target_layers": n, "target_layer_ids": sorted({i * (n - 1) // max(num_layers - 1, 1)
                                                                for i in range(num_layers)}),
        }
        read, generator = read_draft_config(config), torch.Generator().manual_seed(seed)
        tensors = {name: torch.ones(size) if len(size) == 1 else torch.randn(size, generator=generator) * 0.02
                   for name, size in tensor_shapes(read).items()}
        return cls(read, tensors, target)


class ContextPass:
    """Writes K/V of the committed tokens to the drafter's pages: T = B * Q rows in one pass, in memory of its own."""

    def __init__(self, drafter: Drafter, batch: int, width: int, caches: Sequence[PagedKV]):
        self.drafter, self.caches, rows = drafter, caches, batch * width

        def buffer(columns):
            return torch.zeros((rows, columns), dtype=drafter.dtype, device=drafter.device)

        self.projected, self.context = (buffer(drafter.config.hidden_size) for _ in range(2))
        self.kv = buffer(drafter.context_kv.out_features)
        self.cos_sin = drafter.tables.reaching(caches, width)

    def run(self, features: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor,
            commit_lens: torch.Tensor) -> None:
        """features (B * Q, F * H), positions, slots (B, Q) -> K/V of every layer, in the pages of the rows
        i < commit_lens of each request. The others are rejected drafts or padding."""
        d, c = self.drafter, self.drafter.config
        linear(features, d.fc, out=self.projected)
        rms_norm(self.projected, d.hidden_norm, c.rms_norm_eps, out=self.context)
        linear(self.context, d.context_kv, d.context_bias, out=self.kv)
        wide = 2 * c.num_kv_heads * c.head_dim
        for first, end in d.tables.runs():
            write_context_kv(self.kv[:, first * wide:end * wide], positions.view(-1), slots.view(-1),
                             self.caches[first:end], k_weights=d.k_norms[first:end], cos_sin=self.cos_sin[first],
                             eps=c.rms_norm_eps, interleaved=c.ropes[first].interleaved, commit_lens=commit_lens)


class DraftPass:
    """Drafts blocks of Q tokens for B requests, in memory of its own that never moves.

    params: the settings to sample drafts with; None drafts the most likely tokens. anchors (B,) int64: an input, each
    request's last token. After run(): ids (B, Q) with the anchors in column 0, block.positions and block.slots (B, R),
    and proposal, the distribution that the drafts were sampled from, or None.

    The pass has R rows of each block: Q, of which the anchor's does not draft, or Q - 1, which all do
    (DraftConfig.from_anchor).
    """

    def __init__(self, drafter: Drafter, batch: int, width: int, caches: Sequence[PagedKV], page_size: int,
                 params: SamplingTensors | None = None):
        self.drafter, self.page_size, self.width, c = drafter, page_size, width, drafter.config
        self.rows = r = width - c.from_anchor
        self.layers = LayersPass(drafter.geometry, drafter.layers, drafter.norm, drafter.tables.reaching(caches, r),
                                 c.ropes[0].interleaved, batch, r, caches)
        tokens, guesses, device = batch * width, batch * (width - 1), drafter.device

        def ids(*shape):
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.block = replace(PreparedBlock.empty(batch, r, device=device), rows=self.layers.x.view(batch, r, -1))
        self.masked_rows, self.masked = None, self.layers.normed
        if not c.from_anchor:  # the anchor's row drafts nothing: the head sees the others, gathered
            self.masked_rows = torch.arange(tokens, device=device).view(batch, width)[:, 1:].flatten().contiguous()
            self.masked = torch.zeros((guesses, c.hidden_size), dtype=drafter.dtype, device=device)
        self.params = params
        self.proposal: Proposal | None = None
        self.candidates: torch.Tensor | None = None
        shape: tuple[int, ...] = (batch, width - 1)
        if params is not None or c.selector:
            most = c.selector.candidates if c.selector else _CANDIDATES
            shape = (*shape, min(most, drafter.num_valid))
            self.candidates = ids(*shape)
        self.values, self.lse, self.logprobs = (torch.zeros(n, dtype=torch.float32, device=device)
                                                for n in (shape, guesses, shape[:2]))
        self.pairs: torch.Tensor | None = None
        if c.selector and not c.selector.markov:
            self.pairs = torch.zeros((*shape[:2], c.selector.rank), dtype=drafter.dtype, device=device)
        # known = [every anchor, then every guess]; block_order makes (B, Q) blocks of it.
        self.known, self.draft_ids, self.ids = ids(tokens), ids(*shape), ids(batch, width)
        self.anchors, self.guesses = self.known[:batch], self.known[batch:].view(batch, width - 1)
        if params is not None:
            self.proposal = Proposal(probs=torch.zeros_like(self.values), ids=self.candidates)
        place = torch.arange(tokens, device=device)
        self.block_order = torch.cat((place[:batch, None], place[batch:].view(batch, width - 1)), dim=1)

    def confidences(self) -> torch.Tensor:
        """(B, Q - 1) float32: the drafter's probability of each draft, where the most likely tokens are drafted; the
        selector's, among the candidates."""
        if self.drafter.selector:
            return self.logprobs.exp()
        return (self.values - self.lse.view(self.values.shape)).exp_()

    def run(self, context_lens: torch.Tensor, page_table: torch.Tensor, block_lens: torch.Tensor) -> torch.Tensor:
        """block_lens (B,) int32: valid rows of each block's pass, at most R."""
        d, c = self.drafter, self.drafter.config
        prepare_block(self.anchors, context_lens, self.rows, c.mask_token_id, page_table=page_table,
                      page_size=self.page_size, block_lens=block_lens, embedding=d.embedding, out=self.block)
        hidden = self.layers.run(self.block.positions.view(-1), None, page_table, context_lens, block_lens)
        if self.masked_rows is not None:
            embed_tokens(self.masked_rows, hidden, out=self.masked)
        self._guess(context_lens)
        _gather(self.known, self.block_order, self.ids)
        return self.ids

    def _guess(self, context_lens: torch.Tensor) -> None:
        """Runs the draft head, and maps its result to the target's ids."""
        d, c = self.drafter, self.drafter.config
        ids = self.guesses if self.candidates is None else self.candidates
        named = ids if d.ids_of_draft is None else self.draft_ids
        options: dict[str, Any] = {"bias": d.head_bias, "num_valid": d.num_valid,
                                   "out_values": self.values.flatten(0, 1), "out_ids": named.flatten(0, 1)}
        if not (c.selector and c.selector.markov):  # whose bias is one of the logits as they are, as in vLLM
            options |= {"scale": c.output_multiplier, "softcap": c.final_logit_softcapping}
        if self.candidates is None:
            lm_head_argmax(self.masked, d.head, out_lse=self.lse, **options)
        else:
            lm_head_topk(self.masked, d.head, self.values.shape[-1], out_lse=self.lse, **options)
        if d.ids_of_draft is not None:
            _gather(d.ids_of_draft, self.draft_ids.view(-1), ids.view(-1))
        probs = self.proposal.probs if self.proposal else None
        if d.selector:
            if self.pairs is not None and d.selector.projection is not None:
                linear(self.masked, d.selector.projection, out=self.pairs.view(len(self.masked), -1))
            select_candidates(self.values, ids, self.pairs, self.anchors, d.selector.predecessor, d.selector.successor,
                              context_lens, self.params, out_ids=self.guesses, out_logprobs=self.logprobs,
                              out_probs=probs)
        elif self.params is not None:
            sample_draft(self.values, ids, context_lens, self.params, out_ids=self.guesses, out_probs=probs)


def _gather(table, index, out):
    """out = table[index] for ids."""
    embed_tokens(index, table[:, None], out=out[..., None])


def tensor_shapes(c: DraftConfig) -> dict[str, tuple[int, ...]]:
    """The tensor shapes of a checkpoint without an embedding or LM head of its own."""
    q, kv, h, i = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.hidden_size, c.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (h, c.features), "hidden_norm.weight": (h,),
              "norm.weight": (h,)}
    layer = {
        "self_attn.q_proj": (q, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h),
        "self_attn.o_proj": (h, q), "self_attn.q_norm": (c.head_dim,), "self_attn.k_norm": (c.head_dim,),
        "mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i), "input_layernorm": (h,),
        "post_attention_layernorm": (h,)}
    for n, mask in enumerate(c.masks):
        for name, size in layer.items():
            shapes[f"layers.{n}.{name}.weight"] = size
            biased = c.mlp_bias if name.startswith("mlp") else c.attention_bias and name.endswith("proj")
            if biased:
                shapes[f"layers.{n}.{name}.bias"] = size[:1]
        if mask.sinks:
            shapes[f"layers.{n}.self_attn.attention_sink_bias"] = (c.num_heads,)
        if c.conv:
            for name in ("attention_conv", "mlp_conv"):
                shapes[f"layers.{n}.{name}.base_kernel"] = (2, c.conv.taps, h)
                shapes[f"layers.{n}.{name}.kernel_projection.weight"] = (2 * c.conv.taps * (h // c.conv.group), h)
    if c.selector and c.selector.markov:
        shapes["markov_head.markov_w1.weight"] = (c.vocab_size, c.selector.rank)
        shapes["markov_head.markov_w2.weight"] = (c.draft_vocab_size, c.selector.rank)
    elif c.selector:
        for name in ("predecessor_codebook", "successor_codebook"):
            shapes[f"candidate_selector.{name}"] = (c.vocab_size, c.selector.rank)
        shapes["candidate_selector.hidden_projection.weight"] = (c.selector.rank, h)
    return shapes


def _check_fits(c: DraftConfig, target: Target) -> None:
    for name, got, want in (("num_target_layers", c.num_target_layers, target.num_layers),
                            ("target_hidden_size", c.target_hidden_size, target.hidden_size)):
        if got is not None and got != want:
            raise ValueError(f"draft config: {name} must be the target's, {want}; got {got}")
    if max(c.target_layer_ids) >= target.num_layers:
        raise ValueError(f"draft config: target_layer_ids must be below the target's {target.num_layers} layers; "
                         f"got {list(c.target_layer_ids)}")
    if c.mask_token_id >= target.vocab_size:
        raise ValueError(f"draft config: mask_token_id must be below the target's vocabulary of {target.vocab_size}; "
                         f"got {c.mask_token_id}")
