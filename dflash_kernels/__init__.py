"""Kernels for DFlash speculative decoding. Importing this prints nothing and touches no GPU."""

from .graph import StepGraph
from .ops.activation import silu_and_mul
from .ops.attention import block_attention
from .ops.context import write_context_kv
from .ops.head import lm_head_argmax
from .ops.linear import linear, pack_weight
from .ops.norm import add_rms_norm, rms_norm
from .ops.rope import qk_norm_rope
from .types import PackedWeight, PagedKV

__all__ = [
    "PackedWeight",
    "PagedKV",
    "StepGraph",
    "add_rms_norm",
    "block_attention",
    "linear",
    "lm_head_argmax",
    "pack_weight",
    "qk_norm_rope",
    "rms_norm",
    "silu_and_mul",
    "write_context_kv",
]
__version__ = "0.1.0"
