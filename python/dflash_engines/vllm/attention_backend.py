"""vLLM's attention backend for a DFlash drafter: block_attention over the engine's pages and the block's own K/V.

A page holds a head's keys and values side by side, (pages, Hkv, P, 2 * D) in the engine's memory order, as in its
FLASH_ATTN. The block's K/V are read from the projection and never written to the cache, so the cache of a position
always has the K/V of the context's projection.
"""

from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder, AttentionType

from dflash_kernels import PagedKV, block_attention, write_context_kv
from dflash_kernels.reference import attention as plain_attention
from dflash_kernels.reference import context as plain_context

from ..hooks import LEFT, guarded
from .backend_name import LOG, NAME
from .context import paged


class DFlashAttentionBackend(AttentionBackend):
    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes = ["auto"]
    forward_includes_kv_cache_update = True  # there is none: the block's K/V stay out of the cache

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type["DFlashAttention"]:
        return DFlashAttention

    @staticmethod
    def get_builder_cls() -> type["DFlashMetadataBuilder"]:
        return DFlashMetadataBuilder

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True  # a row's bits depend on that row alone

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False  # the other side may hold these pages in another order

    @classmethod
    def supports_combination(cls, *args, **kwargs) -> str | None:
        from vllm.config import get_current_vllm_config

        return "the V2 runner not supported" if get_current_vllm_config().use_v2_model_runner else None

    @classmethod
    def validate_configuration(cls, *args, use_non_causal: bool = False, **kwargs) -> list[str]:
        """The K/V of a target's tokens would never be written: its layers, whoever names this backend for them, are
        told from a drafter's by their attention."""
        from vllm.config import get_current_vllm_config

        reasons = super().validate_configuration(*args, use_non_causal=use_non_causal, **kwargs)
        method = getattr(get_current_vllm_config().speculative_config, "method", None)
        if not use_non_causal or method != "dflash":
            reasons.append("layers other than those of a DFlash drafter, which see their whole block, not supported")
        return reasons


@dataclass
class DFlashMetadata:
    """Metadata of B requests with `width` queries each.

    width is 0 where requests differ in it, as in the target's passes, whose metadata are made for every group of layers
    and not used by this one. It is None where making the metadata failed. seq_lens (B,) int32 count the queries;
    context_lens (B,) do not. query_starts (B + 1,) are their rows.
    """

    causal: bool
    width: int | None
    seq_lens: torch.Tensor
    context_lens: torch.Tensor
    page_table: torch.Tensor
    query_starts: torch.Tensor


def _metadata(common) -> DFlashMetadata:
    requests, width = common.batch_size(), common.max_query_len
    uniform = common.num_actual_tokens == requests * width
    lens = common.seq_lens - width if uniform else common.seq_lens
    return DFlashMetadata(common.causal, width if uniform else 0, common.seq_lens, lens, common.block_table_tensor,
                          common.query_start_loc)


def _forward(impl, query, key, value, kv_cache, made, output):
    if made.width is None:
        return LEFT
    if made.width == 0:
        raise NotImplementedError(f"{NAME}: every request must have as many queries, as in a drafter's pass")
    requests = made.context_lens.shape[0]
    q, k, v, out = (t[:requests * made.width].unflatten(0, (requests, made.width))
                    for t in (query, key, value, output))
    block_attention(q, k, v, impl.paged(kv_cache), made.page_table, made.context_lens, scale=impl.scale,
                    causal=bool(made.causal), sinks=impl.sinks, softcap=impl.softcap, out=out)


def _write(impl, key, value, kv_cache, slots) -> None:
    write_context_kv(torch.stack([key, value], 1).flatten(1), slots, slots, [impl.paged(kv_cache)], cos_sin=None)


# No backend of the engine reads these pages: where a step of ours fails, the ops' specification in torch goes on,
# slowly, from nothing but what the engine handed over.
def _plain_metadata(common) -> DFlashMetadata:
    return DFlashMetadata(common.causal, None, common.seq_lens, common.seq_lens, common.block_table_tensor,
                          common.query_start_loc)


def _plain_forward(impl, query, key, value, kv_cache, made, output) -> None:
    """Each request by itself, whatever its number of queries."""
    keys, values = kv_cache.transpose(1, 2).split(impl.head_size, -1)
    starts = made.query_starts.tolist()
    for b, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
        q, k, v, out = (t[None, start:end] for t in (query, key, value, output))
        plain_attention.block_attention(q, k, v, keys, values, None, None, made.page_table[b:b + 1],
                                        made.seq_lens[b:b + 1] - (end - start), None, None, None, q.shape[1],
                                        impl.scale, bool(made.causal), -1, -1, impl.sinks, impl.softcap, out)


def _plain_write(impl, key, value, kv_cache, slots) -> None:
    keys, values = kv_cache.transpose(1, 2).split(impl.head_size, -1)
    plain_context.write_context_kv(torch.stack([key, value], 1).flatten(1), slots, slots, [keys], [values], None, None,
                                   None, None, None, 0.0, 1.0, False, True)


_build = guarded("attention's metadata", _metadata, _plain_metadata, LOG)
_attend = guarded("attention", _forward, _plain_forward, LOG)
_store = guarded("attention's writes of context K/V", _write, _plain_write, LOG)


class DFlashMetadataBuilder(AttentionMetadataBuilder[DFlashMetadata]):
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False) -> DFlashMetadata:
        return _build(common_attn_metadata)


class DFlashAttention(AttentionImpl[DFlashMetadata]):
    def __init__(self, num_heads, head_size, scale, num_kv_heads=None, alibi_slopes=None, sliding_window=None,
                 kv_cache_dtype="auto", logits_soft_cap=None, attn_type=AttentionType.DECODER,
                 kv_sharing_target_layer_name=None, sinks=None):
        if alibi_slopes is not None or sliding_window is not None or kv_sharing_target_layer_name is not None:
            raise NotImplementedError(f"{NAME}: ALiBi slopes, windows and shared caches are not supported")
        self.num_heads, self.head_size, self.num_kv_heads = num_heads, head_size, num_kv_heads or num_heads
        self.scale, self.softcap, self.sinks = float(scale), float(logits_soft_cap or 0), sinks
        self.kv_cache_dtype, self.attn_type = kv_cache_dtype, attn_type

    def fused_output_quant_supported(self, quant_key) -> bool:
        """The engine asks when it compiles the model, and then quantises outputs itself."""
        return False

    def paged(self, kv_cache: torch.Tensor) -> PagedKV:
        return paged(kv_cache, self.head_size)

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None,
                output_block_scale=None):
        """query (T, Hq, D), key and value (T, Hkv, D): B requests' blocks in sequence. T can be padded."""
        if output_scale is not None or output_block_scale is not None:  # in the pass that measures memory already
            raise NotImplementedError(f"{NAME}: quantised outputs are not supported")
        if attn_metadata is None:  # the engine measures memory; there is no cache yet
            return output
        _attend(self, query, key, value, kv_cache, attn_metadata, output)
        return output

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping) -> None:
        """Writes context K/V (T, Hkv, D), already rotated, in the engine's own precomputation."""
        _store(self, key, value, kv_cache, slot_mapping)
