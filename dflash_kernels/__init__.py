"""Kernels for DFlash speculative decoding. Importing this prints nothing and touches no GPU."""

from .graph import StepGraph
from .info import build_info
from .ops.activation import silu_and_mul
from .ops.attention import block_attention
from .ops.block import embed_tokens, prepare_block
from .ops.context import write_context_kv
from .ops.head import lm_head_argmax, merge_argmax
from .ops.linear import linear, pack_weight
from .ops.norm import add_rms_norm, rms_norm
from .ops.rope import qk_norm_rope
from .ops.verify import verify_greedy
from .types import PackedWeight, PagedKV, PreparedBlock, Verified

__all__ = [
    "PackedWeight",
    "PagedKV",
    "PreparedBlock",
    "StepGraph",
    "Verified",
    "add_rms_norm",
    "block_attention",
    "build_info",
    "embed_tokens",
    "linear",
    "lm_head_argmax",
    "merge_argmax",
    "pack_weight",
    "prepare_block",
    "qk_norm_rope",
    "rms_norm",
    "silu_and_mul",
    "verify_greedy",
    "write_context_kv",
]
__version__ = "0.1.0"
