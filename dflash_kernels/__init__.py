"""Kernels for DFlash speculative decoding. Importing this prints nothing and touches no GPU."""

from .ops.head import lm_head_argmax
from .ops.linear import linear, pack_weight
from .ops.norm import add_rms_norm, rms_norm
from .types import PackedWeight, PagedKV

__all__ = [
    "PackedWeight",
    "PagedKV",
    "add_rms_norm",
    "linear",
    "lm_head_argmax",
    "pack_weight",
    "rms_norm",
]
__version__ = "0.1.0"
