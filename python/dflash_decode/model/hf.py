"""Any Hugging Face causal language model as a target, with our paged attention in it.

Transformers looks its attention function up by name. We register a function that keeps K and V in our pages and calls
`block_attention`; the rest of the model is unchanged. Its matrix products come from the library, which can choose
another kernel for another number of rows. In bfloat16, speculative and baseline output can therefore differ at a near
tie; `dflash_decode.lossless` finds the place and the margin.
"""

from collections.abc import Mapping, Sequence

import torch

from dflash_kernels import PackedWeight, PagedKV, block_attention, linear, lm_head_argmax, pack_weight

from ..kv import CacheShape
from .hf_states import KINDS, UNBOUNDED, States, current, mixers

IMPLEMENTATION = "paged_block_attention"  # a name with "flash" in it would be taken for a FlashAttention
_ATTENDS = ("full_attention", "sliding_attention", "chunked_attention")  # kinds of layers
_SEVERAL_SHAPES = "has layers with keys of several shapes, and pages have one"
_NOT_OURS = ("position_bias", "head_mask", "relative_position_bias")
_UNLIMITED = 2**63 - 1
_STATELESS = ("moe", "mlp")  # kinds of layers that neither attend nor have a state


class HFTarget:
    """A transformers model as a target.

    model: a transformers PreTrainedModel for causal language modelling, on any device, in eval mode. Its attention
    implementation is replaced permanently.

    Raises TypeError for any other object, and ValueError for a model without an output head. Raises NotImplementedError
    for a model whose attention is not transformers' interface (MLA, layers of several head dims), that keeps a state
    other than K and V outside transformers' cache, or whose masks have windows that its attention is not given.
    """

    graph_safe = packs = reuses = False

    def __init__(self, model, *, max_context: int | None = None):
        refuse_model(model)
        seen = _hidden_and_logits(model)
        config, head = model.config.get_text_config(), model.get_output_embeddings()
        longest = getattr(config, "max_position_embeddings", max_context)
        if longest is None:
            raise ValueError(f"HFTarget: max_context must be given, as the config of {type(model).__name__} has no "
                             "max_position_embeddings; got None")
        longest = min(longest, _same_angles(config))
        _register()
        model.set_attn_implementation(IMPLEMENTATION)
        self.model, self.base = model.eval(), model.base_model
        embeddings = model.get_input_embeddings()
        self.embedding, self.embedding_scale = embeddings.weight.detach(), embedding_scale(embeddings)
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        self.num_layers = config.num_hidden_layers
        self.max_context = min(max_context or longest, longest)
        self.head: torch.Tensor | PackedWeight = pack_weight(head.weight.detach())
        self.head_bias = None if head.bias is None else head.bias.detach()
        self._scale = logit_scale(config)
        self._softcap = float(getattr(config, "final_logit_softcapping", None) or 0.0)
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        # A layer that does not attend has no pages.
        self.cache_of = {layer: i for i, layer in enumerate(_attending(config))}
        self.states = States(model) if any(mixers(model)) else None
        self.cache = CacheShape(len(self.cache_of), getattr(config, "num_key_value_heads", None) or heads, head_dim,
                                self.dtype, self.device)
        self._check_head(*seen)

    def _check_head(self, hidden: torch.Tensor, want: torch.Tensor) -> None:
        """The model's own last hidden states (n, H) and logits (n, V) of some tokens. Raises NotImplementedError for a
        model whose logits are another function of the first."""
        if hidden.shape[-1] == self.hidden_size:
            self.logits(hidden.to(self.dtype), got := torch.empty_like(want, dtype=self.dtype))
            if bool((got.float() - want.float()).abs().max() <= 0.05 * want.float().abs().max()):
                return
        raise NotImplementedError(f"HFTarget: the logits of {type(self.model).__name__} must be the output embeddings' "
                                  "product with the base model's output; there is more between the two")

    def make_pass(
        self, batch: int, width: int, caches: Sequence[PagedKV], target_layer_ids: Sequence[int] = (),
        rows: int | None = None
    ) -> "HFPass":
        return HFPass(self, caches, target_layer_ids)

    def next_ids(self, rows: torch.Tensor, ids: torch.Tensor, values: torch.Tensor) -> None:
        lm_head_argmax(rows, self.head, bias=self.head_bias, scale=self._scale, softcap=self._softcap, out_ids=ids,
                       out_values=values)

    def logits(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        linear(rows, self.head, self.head_bias, out=out)
        if self._scale != 1.0:
            out.mul_(self._scale)
        if self._softcap:
            out.copy_(self._softcap * torch.tanh(out.float() / self._softcap))


@torch.inference_mode()
def _hidden_and_logits(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Of four tokens, by the model itself."""
    if model.config._attn_implementation == IMPLEMENTATION:  # it was a target before
        model.set_attn_implementation("eager")
    kept: list[torch.Tensor] = []
    hook = model.base_model.register_forward_hook(lambda base, given, output: kept.append(output[0]))
    was = model.training
    try:
        ids = torch.arange(1, 5, device=model.device)[None] % model.config.get_text_config().vocab_size
        logits = model.eval()(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
        model.train(was)
    return kept[-1].flatten(0, -2), logits.flatten(0, -2)


def _same_angles(config) -> int:
    """The positions up to which a token's angles do not depend on the length of the text. transformers takes other
    factors of a longrope for a call that reaches beyond its original length, and a prompt comes in several."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    tables = [table for table in (given, *given.values()) if isinstance(table, Mapping)]
    changing = [table for table in tables if table.get("rope_type", table.get("type")) == "longrope"
                and list(table.get("short_factor") or ()) != list(table.get("long_factor") or ())]
    lengths = [table.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None) or _UNLIMITED for table in changing]
    return min(lengths, default=_UNLIMITED)


class HFPass:
    """One forward call of the model. Feature f is transformers' hidden_states[target_layer_ids[f] + 1]."""

    def __init__(self, target: HFTarget, caches: Sequence[PagedKV], target_layer_ids: Sequence[int]):
        self.target, self.caches, self.target_layer_ids = target, caches, tuple(target_layer_ids)

    @torch.inference_mode()
    def run(self, ids, positions, slots, page_table, context_lens, block_lens, block_starts=None):
        self.slots, self.where = slots, (page_table, context_lens, block_lens)
        self.seen: set[int] = set()
        states = self.target.states
        self.blocks = states.blocks(self.caches[0], *self.where) if states else ()
        try:
            current.value = self
            output = self.target.base(input_ids=ids, position_ids=positions, use_cache=False,
                                      output_hidden_states=bool(self.target_layer_ids))
        finally:
            current.value = None
        if self.seen != self.target.cache_of.keys():
            raise NotImplementedError(f"HFTarget: all {len(self.target.cache_of)} layers must attend through "
                                      f"transformers' attention interface; {len(self.seen)} did")
        if states:
            states.keep(self.caches[0], self.blocks)
        rows = output.last_hidden_state.reshape(-1, self.target.hidden_size)
        if not self.target_layer_ids:
            return rows, rows[:, :0]
        return rows, torch.cat([output.hidden_states[t + 1] for t in self.target_layer_ids], -1).view(rows.shape[0], -1)

    def attend(self, layer, q, k, v, *, scaling, window, sinks, softcap, causal):
        """q, k, v (B, heads, Q, D), after RoPE -> (B, Q, Hq, D); K and V of rows with a slot go to their pages."""
        if layer in (None, -1):  # of a module that several layers share (Zamba), and layers run in order
            layer = next((one for one in self.target.cache_of if one not in self.seen), layer)
        if layer not in self.target.cache_of:
            raise NotImplementedError(f"HFTarget: attention of layer {layer} is not among those of the config's "
                                      "layer_types, and has no pages")
        self.seen.add(layer)
        cache = self.caches[self.target.cache_of[layer]]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        block_attention(q, k, v, cache, *self.where[:2], block_lens=self.where[2], scale=scaling, causal=causal,
                        window=window, sinks=sinks, softcap=softcap, out=out)
        kept = self.slots >= 0
        page, row = self.slots[kept] // cache.page_size, self.slots[kept] % cache.page_size
        cache.k[page, row], cache.v[page, row] = k[kept], v[kept]
        return out


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, softcap=None,
               s_aux=None, is_causal=None, **kwargs):
    now = getattr(current, "value", None)
    if now is None:
        raise RuntimeError("this model's attention belongs to dflash_decode.model.hf.HFTarget; run it through "
                           "that, or call model.set_attn_implementation('sdpa') to have it back")
    for name in _NOT_OURS:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"HFTarget: attention with {name} is not supported")
    if value.shape[-1] != query.shape[-1]:
        raise NotImplementedError(f"HFTarget: keys and values must have the same head dim; got {query.shape[-1]} and "
                                  f"{value.shape[-1]}")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if sliding_window is None and attention_mask is not None and int(attention_mask) < now.target.max_context:
        raise NotImplementedError(f"HFTarget: a window of {int(attention_mask)} given only in the mask is not "
                                  "supported")
    window = (-1, -1) if sliding_window is None else (int(sliding_window) - 1, -1)
    return now.attend(module.layer_idx, query, key, value, scaling=scaling, window=window, sinks=s_aux,
                      softcap=float(softcap or 0.0), causal=bool(is_causal)), None


def refuse_model(model) -> None:
    """Raises for a model that cannot be a target. The model can be on the meta device, because weights do not matter.
    """
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "config"):
        raise TypeError(f"HFTarget: model must be a transformers model for causal language modelling; got a "
                        f"{type(model).__name__}")
    config, name = model.config.get_text_config(), type(model).__name__
    if model.get_output_embeddings() is None:
        raise ValueError(f"HFTarget: model must have an output head; got {name}")
    if model.config.is_encoder_decoder or config.is_encoder_decoder:
        raise NotImplementedError(f"HFTarget: {name} reads its prompt with an encoder, which has no pages")
    if why := _layers_apart(config):
        raise NotImplementedError(f"HFTarget: {name} {why}")
    if not model._can_set_attn_implementation():
        raise NotImplementedError(f"HFTarget: {name} does not use transformers' attention "
                                  "interface")
    types = getattr(config, "layer_types", None) or ()
    stateful = {i for i, kind in enumerate(types) if kind in KINDS}
    # A class may be of hybrids and this model have attention alone.
    found = {module.layer_idx for module in mixers(model)}
    if found != stateful or getattr(model, "_is_stateful", False) and not types:
        raise NotImplementedError(f"HFTarget: {name} keeps state other than keys and values that is not in "
                                  "transformers' cache")
    limit = getattr(config, "time_step_limit", None) or UNBOUNDED
    if stateful and tuple(limit) != UNBOUNDED:
        raise NotImplementedError(f"HFTarget: time_step_limit of a {name} must be {UNBOUNDED}, as transformers bounds "
                                  f"the time steps of several tokens and not of one; got {tuple(limit)}")
    if not _attending(config):
        raise NotImplementedError(f"HFTarget: {name} has no layer that attends, and so no pages")
    if any(getattr(module, "is_causal", None) is False for module in model.get_decoder().modules()):
        raise NotImplementedError(f"HFTarget: {name} does not attend causally, as its config makes it an encoder")


def _layers_apart(config) -> str | None:
    """Why the layers' state is not pages of keys and values of one shape, one per token."""
    try:
        heads, _, head_dim, of_values, elsewhere, rank = (getattr(config, name, None) for name in (
            "num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim", "global_head_dim", "kv_lora_rank"))
    except RuntimeError:  # transformers' own for a field that differs between layers
        return _SEVERAL_SHAPES
    if rank is not None:
        return f"keeps latent vectors, not keys and values (MLA, kv_lora_rank = {rank}), which have no pages"
    if elsewhere not in (None, head_dim):
        return _SEVERAL_SHAPES
    if None not in (head_dim, of_values) and head_dim != of_values and heads is not None:
        return f"has keys of {head_dim} and values of {of_values} dimensions, which must have as many"
    others = sorted(set(getattr(config, "layer_types", None) or ()) - {*_ATTENDS, *KINDS, *_STATELESS})
    if others:
        return f"has layers of a kind that is not supported, {', '.join(others)}: all must be full or sliding " \
               f"attention, {', '.join(KINDS)}"
    if getattr(config, "cross_attention_layers", None):
        return "has layers that attend to images alone, which is not supported"
    chunk = getattr(config, "attention_chunk_size", None)
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()) and chunk \
            and chunk < config.max_position_embeddings:
        return f"attends in chunks of {chunk} tokens, which is not supported"
    return None


def _attending(config) -> list[int]:
    """The numbers of the layers that attend."""
    types = getattr(config, "layer_types", None) or [_ATTENDS[0]] * config.num_hidden_layers
    return [i for i, kind in enumerate(types) if kind in (*_ATTENDS, "hybrid")]


def embedding_scale(module) -> float:
    """The factor that an embedding's module applies to its rows (Gemma), in the model's dtype."""
    return float(torch.as_tensor(getattr(module, "embed_scale", 1.0)).to(module.weight.dtype))


def logit_scale(config) -> float:
    """The scale that the model's own class applies to the logits, which sampling with a temperature depends on."""
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere, Falcon-H1
        if getattr(config, name, None):
            return float(getattr(config, name))
    scaling = float(getattr(config, "logits_scaling", None) or 1.0)  # Granite, MiniCPM and HyperCLOVA X
    return scaling if config.model_type.startswith("hyperclovax") else 1.0 / scaling


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    AttentionInterface.register(IMPLEMENTATION, _attention)
    # What is visible follows from lengths and pages. Instead of a mask the attention gets the mask's window, as some
    # models tell it of no other.
    AttentionMaskInterface.register(IMPLEMENTATION, lambda *_args, local_size=None, **_kwargs:
                                    None if local_size is None else torch.tensor(local_size))
