"""Kernels for DFlash speculative decoding. Importing this prints nothing and touches no GPU."""

from .ops.block import embed_tokens, prepare_block
from .ops.norm import add_rms_norm, rms_norm
from .ops.verify import verify_greedy
from .types import PagedKV, PreparedBlock, Verified

__all__ = [
    "PagedKV",
    "PreparedBlock",
    "Verified",
    "add_rms_norm",
    "embed_tokens",
    "prepare_block",
    "rms_norm",
    "verify_greedy",
]
__version__ = "0.1.0"
