"""Kernels for DFlash speculative decoding.

Importing the package prints nothing and touches no GPU.
"""

from ._version import __version__ as __version__
from .info import build_info
from .limits import Support, supports
from .ops.activation import silu_and_mul
from .ops.attention import block_attention
from .ops.block import embed_tokens, prepare_block
from .ops.context import write_context_kv
from .ops.conv import grouped_conv, grouped_conv_add_rms_norm
from .ops.experts import expert_mlp, pack_experts
from .ops.int4 import awq_blocks, gptq_blocks
from .ops.linear import linear, pack_weight, quantize_blocks, quantize_weight
from .ops.lm_head import combine_argmax, combine_topk, lm_head_argmax, lm_head_topk
from .ops.norm import add_rms_norm, rms_norm
from .ops.rope import qk_norm_rope
from .ops.router import route_experts
from .ops.sample import sample_draft, verify_sample, workspace_size
from .ops.selector import select_candidates
from .ops.verify import verify_greedy
from .paged_kv import PagedKV
from .step_graph import StepGraph
from .storage import PackedExperts, PackedWeight
from .types import LogitAdjustments, PreparedBlock, Proposal, SamplingTensors, Verified

__all__ = [
    "LogitAdjustments",
    "PackedExperts",
    "PackedWeight",
    "PagedKV",
    "PreparedBlock",
    "Proposal",
    "SamplingTensors",
    "StepGraph",
    "Support",
    "Verified",
    "add_rms_norm",
    "awq_blocks",
    "block_attention",
    "build_info",
    "embed_tokens",
    "expert_mlp",
    "gptq_blocks",
    "grouped_conv",
    "grouped_conv_add_rms_norm",
    "linear",
    "lm_head_argmax",
    "lm_head_topk",
    "combine_argmax",
    "combine_topk",
    "pack_experts",
    "pack_weight",
    "prepare_block",
    "qk_norm_rope",
    "quantize_blocks",
    "quantize_weight",
    "rms_norm",
    "route_experts",
    "sample_draft",
    "select_candidates",
    "silu_and_mul",
    "supports",
    "verify_greedy",
    "verify_sample",
    "workspace_size",
    "write_context_kv",
]
