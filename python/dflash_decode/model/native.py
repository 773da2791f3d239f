"""Dense Llama- and Qwen-family targets built from our ops and pages."""

from collections.abc import Mapping, Sequence

import torch

from dflash_kernels import PackedWeight, PagedKV, embed_tokens, linear, lm_head_argmax

from ..checkpoint.blocks import Blocks
from ..checkpoint.fields import MOST_LAYERS, Fields, head_dim_of, shown
from ..kv import CacheShape
from .masks import LayerMask
from .rope import Rope, RopeTables, read_rope
from .tensors import Tensors, packer
from .transformer import Geometry, LayersPass, take_layer

_WHAT = "target config"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
_NO_ROPE_EVERY = 4  # of SmolLM3's layers, where its config does not list them
_MLP_BIAS = ("llama", "smollm3")
# Fields that some model of these families has, and the values at which they change nothing.
_NEUTRAL = {
    "hidden_act": ("silu",), "rope_interleaved": (False,), "is_neox_style": (True,), "partial_rotary_factor": (1.0,),
    "attn_logit_softcapping": (0.0,), "final_logit_softcapping": (0.0,), "logit_scale": (1.0,), "clip_qkv": (),
    "num_experts": (0,), "num_local_experts": (0,), "quantization_config": (), "attention_multiplier": (),
    "embedding_multiplier": (1.0,), "residual_multiplier": (1.0,), "logits_scaling": (1.0,),
}


class NativeTarget:
    """A dense decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU; with or without per-head norms and biases.

    config: a Hugging Face config.json of model_type llama, mistral, qwen2, qwen3 or smollm3.
    tensors: by Hugging Face names.
    dtype: by default that of the embedding.
    max_context: the longest prompt plus answer, at most the model's own.
    int8: keeps the weights of products in 8 bits: on a CPU in blocks of 32 with a scale each, beside rows that are
        rounded to int8 too, elsewhere with one scale per row. A step reads half of the bytes; the output can differ.
    exact: multiplies tensors in blocks as the elements that they stand for. The output is that of these elements.

    Raises ValueError for a missing or wrong field or tensor, and NotImplementedError for a field that changes the
    arithmetic into something not implemented.
    """

    graph_safe = packs = True
    head_bias: torch.Tensor | None = None
    embedding_scale = 1.0

    def __init__(self, config: Mapping, tensors: Mapping[str, torch.Tensor | Blocks], *,
                 dtype: torch.dtype | None = None,
                 device: torch.device | str = "cpu", max_context: int | None = None, int8: bool = False,
                 exact: bool = False):
        f = Fields(_WHAT, config)
        g, layers = _geometry(f)
        self.num_layers, self.hidden_size, self.vocab_size = layers, g.hidden, f.whole("vocab_size")
        self.max_context = f.whole("max_position_embeddings")
        if max_context is not None:
            if not 1 <= max_context <= self.max_context:
                raise ValueError(f"{_WHAT}: max_context must be between 1 and max_position_embeddings = "
                                 f"{self.max_context}; got {max_context}")
            self.max_context = max_context
        self._rope = read_rope(config, g.head_dim, _WHAT)
        ropes = [self._rope if turns else Rope(1.0, 0) for turns in _turning(f, layers)]
        tied = f.flag("tie_word_embeddings", False)
        name = "model.embed_tokens.weight"
        if dtype is None:  # where there is no such tensor, `take` says so
            dtype = getattr(tensors.get(name), "dtype", torch.bfloat16)
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"target checkpoint: the dtype of {name} must be float32, bfloat16 or float16; "
                             f"got {dtype}")
        self.dtype, self.device, self.geometry = dtype, torch.device(device), g
        self.cache = CacheShape(layers, g.num_kv_heads, g.head_dim, dtype, self.device)
        taker = Tensors(tensors, dtype, self.device, "target checkpoint")
        taker.drop("rotary_emb.inv_freq")
        self.int8, pack = int8, packer(int8, exact)
        embedding = taker.take_weight(name, self.vocab_size, g.hidden)
        # Blocks serve both: rows of a packed weight can be looked up.
        self.embedding = pack(embedding) if isinstance(embedding, Blocks) else embedding.contiguous()
        self.head: torch.Tensor | PackedWeight
        if tied:
            taker.drop("lm_head.weight")
            self.head = self.embedding if isinstance(self.embedding, PackedWeight) else pack(self.embedding)
        else:
            self.head = pack(taker.take_weight("lm_head.weight", self.vocab_size, g.hidden))
        self._layers = [take_layer(taker, f"model.layers.{i}.", g, LayerMask(causal=True), pack)[0]
                        for i in range(layers)]
        self._norm = taker.take("model.norm.weight", g.hidden)
        taker.finish()
        self._tables = RopeTables(ropes, self.max_context, self.device)

    def make_pass(
        self, batch: int, width: int, caches: Sequence[PagedKV], target_layer_ids: Sequence[int] = (),
        rows: int | None = None
    ) -> "NativePass":
        tables = self._tables.reaching(caches, width)
        layers = LayersPass(self.geometry, self._layers, self._norm, tables, self._rope.interleaved, batch, width,
                            caches, target_layer_ids=target_layer_ids, rows=rows)
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


def _geometry(f: Fields) -> tuple[Geometry, int]:
    family = f.get("model_type")
    if family not in FAMILIES:
        raise NotImplementedError(f"{_WHAT}: model_type must be one of {', '.join(FAMILIES)}; got {shown(family)}")
    for name, neutral in _NEUTRAL.items():
        value = f.get(name)
        if value is not None and value not in neutral:
            raise NotImplementedError(f"{_WHAT}: {name} = {shown(value)} changes the model into one that is not "
                                      "supported")
    layers = f.whole("num_hidden_layers", most=MOST_LAYERS)
    _refuse_windows(f, family, layers)
    hidden, heads = f.whole("hidden_size"), f.whole("num_attention_heads")
    kv_heads = f.whole("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ValueError(f"{_WHAT}: num_attention_heads must be a multiple of num_key_value_heads; "
                         f"got {heads} and {kv_heads}")
    bias = f.flag("attention_bias", False) and family in ("llama", "qwen3", "smollm3")
    return Geometry(
        hidden=hidden, intermediate=f.whole("intermediate_size"), num_heads=heads, num_kv_heads=kv_heads,
        head_dim=head_dim_of(f, hidden, heads), eps=f.number("rms_norm_eps", 1e-6, above=0.0, most=1.0),
        qkv_bias=bias or family == "qwen2", o_bias=bias, mlp_bias=f.flag("mlp_bias", False) and family in _MLP_BIAS,
        qk_norm=family == "qwen3",
    ), layers


def _turning(f: Fields, layers: int) -> list[bool]:
    """Whether each layer rotates its queries and keys: 1 in no_rope_layers, which SmolLM3 has."""
    listed = f.items("no_rope_layers", None, int, f"{layers} times 0 or 1")
    if f.get("model_type") != "smollm3":
        if listed:
            raise NotImplementedError(f"{_WHAT}: no_rope_layers = {shown(listed)} changes the model into one that is "
                                      "not supported")
        return [True] * layers
    if listed is None:
        every = f.whole("no_rope_layer_interval", _NO_ROPE_EVERY)
        return [(i + 1) % every != 0 for i in range(layers)]
    if len(listed) != layers or not set(listed) <= {0, 1}:
        f.refuse("no_rope_layers", f"a list of {layers} times 0 or 1", listed)
    return [bool(one) for one in listed]


def _refuse_windows(f: Fields, family: str, layers: int) -> None:
    """Refuses sliding windows, which few checkpoints of these families use and none is supported."""
    types, asked = f.items("layer_types", None, str, "names"), family.startswith(("qwen", "smollm3"))
    if types is not None and set(types) != {"full_attention"}:
        raise NotImplementedError(f"{_WHAT}: layer_types must all be full_attention; got {shown(types)}")
    slides = f.flag("use_sliding_window", False) if asked else family == "mistral"
    window, first = f.whole("sliding_window", None, least=0), f.whole("max_window_layers", 28, least=0)
    if types is None and slides and window is not None and layers > (first if family.startswith("qwen") else 0):
        raise NotImplementedError(f"{_WHAT}: sliding_window = {window} is not supported in targets")
