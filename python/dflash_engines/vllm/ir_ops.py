"""rms_norm and add_rms_norm as implementations of vLLM's IR ops, under the provider name "dflash".

vLLM uses them where its kernel configuration names them, and nowhere else:

    --kernel-config '{"ir_op_priority": {"rms_norm": ["dflash"], "fused_add_rms_norm": ["dflash"]}}'

Its other IR op, gelu_and_mul_sparse, is none of ours, and silu_and_mul is no IR op. vLLM 0.33.0 says of the option that
0.34.0 removes it.
"""

import importlib.util
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from .backend_name import LOG

READ = ("0.32.0", "0.33.0")
PROVIDER = "dflash"


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    from dflash_kernels import rms_norm

    assert weight is not None  # as takes_norm checked
    return rms_norm(x, weight, epsilon)


def fused_add_rms_norm(x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float,
                       variance_size: int | None = None) -> tuple[Tensor, Tensor]:
    """In place: the norm is written to x, the sum to x_residual."""
    from dflash_kernels import add_rms_norm

    assert weight is not None  # as takes_add_norm checked
    return add_rms_norm(x, x_residual, weight, epsilon, out=x)


def takes_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    return (variance_size is None and weight is not None and weight.dtype == x.dtype and weight.is_contiguous()
            and weight.dim() == 1 and rows(x) and supported("rms_norm", x.device.type, x.dtype))


def takes_add_norm(x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float,
                   variance_size: int | None = None) -> bool:
    return (takes_norm(x, weight, epsilon, variance_size) and x_residual.dtype == x.dtype
            and x_residual.shape == x.shape and rows(x_residual))


def rows(x: Tensor) -> bool:
    return x.is_contiguous() or x.dim() == 2 and x.stride(1) == 1 and x.stride(0) > 0


@cache  # asked before each call
def supported(op: str, device: str, dtype: torch.dtype) -> bool:
    from dflash_kernels import supports

    return bool(supports(op, device=device, dtype=dtype))


def enter(_kernels: ModuleType) -> None:
    """Registers both with vLLM, once its own implementations are there."""
    import vllm
    from vllm import ir

    if vllm.__version__.partition("+")[0] not in READ:
        return LOG.info("dflash-kernels: IR ops: not offered, version %s was not read; %s were", vllm.__version__,
                        ", ".join(READ))
    there = not torch.version.cuda or importlib.util.find_spec("triton") is not None
    if not there:
        LOG.info("dflash-kernels: IR ops: not used, triton, which the GPU kernels are written in, is missing; "
                 "pip install triton")
    for op, function, takes in ((ir.ops.rms_norm, rms_norm, takes_norm),
                                (ir.ops.fused_add_rms_norm, fused_add_rms_norm, takes_add_norm)):
        if PROVIDER not in op.impls:
            op.register_impl(PROVIDER, supported=there, supports_args=takes,
                             inplace=op.name == "fused_add_rms_norm")(function)
