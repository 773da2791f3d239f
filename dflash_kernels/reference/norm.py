"""RMSNorm."""

import torch

from ._wide import wide


def rms_norm(x, weight, eps, out):
    h = wide(x)
    scale = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    out.copy_(h * scale * wide(weight))


def add_rms_norm(x, residual, weight, eps, out, residual_out):
    total = (wide(x) + wide(residual)).to(x.dtype)
    (residual if residual_out is None else residual_out).copy_(total)
    rms_norm(total, weight, eps, out)
