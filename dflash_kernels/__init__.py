"""Kernels for DFlash speculative decoding. Importing this prints nothing and touches no GPU."""

from .ops.activation import silu_and_mul
from .ops.context import write_context_kv
from .ops.norm import add_rms_norm, rms_norm
from .ops.rope import qk_norm_rope

__all__ = ["add_rms_norm", "qk_norm_rope", "rms_norm", "silu_and_mul", "write_context_kv"]
__version__ = "0.1.0"
