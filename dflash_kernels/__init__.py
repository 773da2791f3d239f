"""Kernels for DFlash speculative decoding. Importing this prints nothing and touches no GPU."""

from .ops.attention import block_attention
from .ops.norm import add_rms_norm, rms_norm

__all__ = ["add_rms_norm", "block_attention", "rms_norm"]
__version__ = "0.1.0"
