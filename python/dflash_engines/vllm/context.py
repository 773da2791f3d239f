"""precompute_and_store_context_kv -> write_context_kv: context K/V of all draft layers, for both of vLLM's runners.

The engine's norm and projection stay. K norm, RoPE, the value scale and the writes to all layers' caches are one call,
in which an fp8 cache has its layer's own scales.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from dflash_kernels import PagedKV, write_context_kv

from ..hooks import LEFT, Hook, plan

LOG = logging.getLogger("vllm.dflash_kernels")
SPLIT_BACKENDS = ("FLASH_ATTN", "FLASHINFER", "DFLASH")  # keys, then values, side by side in a head's last dimension
FP8 = torch.float8_e4m3fn


VIEW = "_dflash_view"  # an attribute of the engine's tensor
KEPT = 64  # tokens of a decoding step, for which rows and views are made once


class Rows:
    """K and V of every layer as rows, for an engine layout that PagedKV cannot describe."""

    def __init__(self, layers: int, tokens: int, heads: int, head_dim: int, like: torch.Tensor):
        with torch.inference_mode(False):  # what is made in inference mode may not be written outside it
            self.rows = torch.empty(layers, 2, tokens, 1, heads, head_dim, dtype=like.dtype, device=like.device)
            self.slots = torch.arange(tokens, device=like.device)
        self.caches = [PagedKV(*pair) for pair in self.rows]
        self.views: dict[int, tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]] = {}

    def first(self, tokens: int) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """The slots of the first `tokens` rows, and each layer's K and V there, (tokens, Hkv, D)."""
        if tokens not in self.views:
            self.views[tokens] = self.slots[:tokens], [(k[:tokens, 0], v[:tokens, 0]) for k, v in self.rows]
        return self.views[tokens]


@dataclass
class Plan:
    """viewed: whether the engine's caches are viewed; otherwise the engine writes from rows. v_scale: of all layers.
    v_scales (L, 1, 1) float32: of each, where they differ."""

    cos_sin: torch.Tensor
    v_scale: float
    v_scales: torch.Tensor | None
    viewed: bool
    rows: Rows


def decide(model: Any) -> Plan | str:
    """model: vLLM's DFlashQwen3Model, with its buffers built and its caches bound."""
    if model.vllm_config.speculative_config.method != "dflash":
        return f"the drafter of {model.vllm_config.speculative_config.method}"
    if type(model)._project_context_kv.__module__ != type(model).precompute_and_store_context_kv.__module__:
        return f"{type(model).__name__} projects in its own way"
    if type(model)._normalize_context_k.__module__ != type(model).precompute_and_store_context_kv.__module__:
        return f"{type(model).__name__} normalises in its own way"
    if model._fused_kv_weight is None:
        return "a quantised K/V projection"
    if model._rope_head_size != model._head_dim:
        return f"RoPE over {model._rope_head_size} of heads of {model._head_dim}"
    layers, dtype = model._attn_layers, model._fused_kv_weight.dtype
    backends = {layer.attn_backend.get_name() for layer in layers}
    tiled = backends <= {"CPU_ATTN"}  # its keys are stored transposed or in tiles
    stored = {stored_as(layer) for layer in layers}
    if stored != {dtype} and (tiled or stored != {FP8}):
        return f"a cache of {', '.join(map(str, stored))} for a model of {dtype}"
    if any(getattr(layer, "kv_sharing_target_layer_name", None) for layer in layers):
        return "layers that share a cache"
    if not tiled and not backends <= set(SPLIT_BACKENDS):
        return f"the cache of {', '.join(sorted(backends))}"
    caches = [] if tiled else caches_of(layers, model._head_dim)
    if len({(c.k.shape, c.k.stride()) for c in caches}) > 1:
        return "draft layers with caches of different shapes"
    given = [getattr(layer.self_attn, "v_scale", None) for layer in model.layers]
    scales = [1.0 if scale is None else float(scale) for scale in given]
    each = torch.tensor(scales, device=model._fused_kv_weight.device)[:, None, None] if len({*scales}) > 1 else None
    return Plan(model._rope_cos_sin_cache.to(dtype).contiguous(), scales[0] if each is None else 1.0, each, not tiled,
                rows_of(model, KEPT if tiled else 0))


def stored_as(layer: Any) -> torch.dtype:
    """The dtype of the elements of an attention layer's cache. The engine keeps 8-bit floats as bytes."""
    fp8 = layer.kv_cache.dtype == torch.uint8 and layer.kv_cache_dtype in ("fp8", "fp8_e4m3")
    return FP8 if fp8 and not torch.version.hip else layer.kv_cache.dtype  # older AMD GPUs have another format


def caches_of(layers: list[Any], head_dim: int) -> list[PagedKV]:
    """Of the engine's attention layers, with the scales of each."""
    if stored_as(layers[0]) == FP8:
        return [paged(layer.kv_cache, head_dim, (layer._k_scale, layer._v_scale)) for layer in layers]
    return [paged(layer.kv_cache, head_dim) for layer in layers]


def paged(kv_cache: torch.Tensor, head_dim: int, scales: tuple[torch.Tensor, torch.Tensor] | None = None) -> PagedKV:
    """A view of a layer's cache, of fp8 if there are scales. It is kept with the engine's tensor and shares its memory
    alone, not the tensor, so that nothing of ours keeps a cache that the engine drops: it measures with one first."""
    kept = getattr(kv_cache, VIEW, None)
    if kept is None or kept[0] != kv_cache.data_ptr():  # an engine that slept wakes with its caches elsewhere
        memory = torch.empty(0, dtype=kv_cache.dtype, device=kv_cache.device).set_(
            kv_cache.untyped_storage(), kv_cache.storage_offset(), kv_cache.shape, kv_cache.stride())
        k, v = halves(memory if scales is None else memory.view(FP8), head_dim)
        kept = kv_cache.data_ptr(), PagedKV(k, v, *(scales or ()))
        setattr(kv_cache, VIEW, kept)
    return kept[1]


def halves(kv_cache: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of (pages, Hkv, P, 2 * D) in any physical order, split in the last dimension."""
    k, v = kv_cache.transpose(1, 2).split(head_dim, -1)
    return k, v


def project(model: Any, states: torch.Tensor) -> torch.Tensor:
    """Rows [K_0 | V_0 | K_1 | ...] of all layers, from the engine's own norm and product."""
    from vllm import _custom_ops

    normed = torch.empty_like(states)
    _custom_ops.rms_norm(normed, states, model._hidden_norm_weight, model._rms_norm_eps)
    return F.linear(normed, model._fused_kv_weight, model._fused_kv_bias)


def write(model: Any, made: Plan, kv: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor,
          caches: list[PagedKV]) -> None:
    if made.v_scales is not None:  # the op has one for all layers
        kv.unflatten(-1, (model._num_attn_layers, 2, model._num_kv_heads, -1))[:, :, 1].mul_(made.v_scales)
    write_context_kv(kv, positions, slots, caches, k_weights=model._k_norm_weights, cos_sin=made.cos_sin,
                     eps=model._rms_norm_eps, interleaved=not model._rope_is_neox, v_scale=made.v_scale,
                     rounding="each")


def rows_of(model: Any, tokens: int) -> Rows:
    return Rows(model._num_attn_layers, tokens, model._num_kv_heads, model._head_dim, model._fused_kv_weight)


def write_through(model: Any, made: Plan, kv: torch.Tensor, positions: torch.Tensor,
                  slots: list[torch.Tensor]) -> None:
    """Writes K and V of every layer into rows, which the engine copies into its own layout."""
    tokens = kv.shape[0]
    rows = made.rows if tokens <= KEPT else rows_of(model, tokens)
    own, parts = rows.first(tokens)
    write(model, made, kv, positions, own, rows.caches)
    for layer, (key, value), where in zip(model._attn_layers, parts, slots, strict=True):
        layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, where)


def fits(model: Any, states: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor | list[torch.Tensor]) -> bool:
    """Whether the engine's arguments have the expected form. The check costs a few of a call's 200 microseconds, so the
    op checks the device."""
    per_layer = isinstance(slots, list)
    if states.dim() != 2 or (per_layer and len(slots) != model._num_attn_layers):
        return False
    (tokens, width), weight = states.shape, model._fused_kv_weight
    return (states.dtype == weight.dtype and width == weight.shape[1]
            and all(t.dtype == torch.int64 and t.dim() == 1 and t.shape[0] == tokens
                    for t in (positions, *(slots if per_layer else (slots,)))))


def precompute_and_store_context_kv(self, context_states, context_positions, context_slot_mapping=None):
    slots: Any = context_slot_mapping
    per_layer = isinstance(slots, (list, tuple))
    # Without slots it measures memory, before there are caches; without buffers weights are made up.
    if slots is None or (per_layer and any(s is None for s in slots)) or not hasattr(self, "_num_attn_layers"):
        return LEFT
    made = plan(self, "context_kv", decide, LOG)
    slots = list(slots) if per_layer else slots
    if made is None or not fits(self, context_states, context_positions, slots):
        return LEFT
    kv = project(self, context_states)
    if not made.viewed:
        return write_through(self, made, kv, context_positions, slots if per_layer else [slots] * self._num_attn_layers)
    write(self, made, kv, context_positions, torch.stack(slots) if per_layer else slots,
          caches_of(self._attn_layers, self._head_dim))


MODEL = "vllm.model_executor.models.qwen3_dflash:DFlashQwen3Model"
HOOK = Hook("context_kv", f"{MODEL}.precompute_and_store_context_kv", precompute_and_store_context_kv,
            read={"0.32.0": "5bfcc6aca47658e6", "0.33.0": "5bfcc6aca47658e6"}, measured={"cpu": True},
            beside=(f"{MODEL}._project_context_kv", f"{MODEL}._normalize_context_k"))
