"""Linear layers, and the packed layout that streams."""

import torch
import torch.nn.functional as F

from ..formats import EXACT
from . import quant
from ._wide import wide

BLOCK = 16


def pack(weight):
    """(N, K) -> (ceil(N/16), ceil(K/32)*16, 16, 2) for bfloat16, (ceil(N/16), ceil(K/32)*32, 16) for int8,
    (ceil(N/16), K, 16) otherwise; zeros fill the rest."""
    n, k = weight.shape
    tiled = weight.dtype in (torch.bfloat16, torch.int8)
    padded = F.pad(weight, (0, -k % 32 if tiled else 0, 0, -n % BLOCK))
    if weight.dtype == torch.bfloat16:
        return padded.view(-1, BLOCK, padded.shape[1] // 2, 2).transpose(1, 2).contiguous()
    return padded.view(-1, BLOCK, padded.shape[1]).transpose(1, 2).contiguous()


def quantize(weight):
    top = weight.abs().amax(1).float()
    scales = torch.where(top > 0, top / 127, 1.0)
    return torch.round(weight.float() / scales[:, None]).to(torch.int8), scales


def unpack(data, n, k):
    if data.dim() == 4:
        return data.transpose(1, 2).reshape(data.shape[0] * BLOCK, -1)[:n, :k]
    return data.transpose(1, 2).reshape(-1, data.shape[1])[:n, :k]


def linear(x, weight, scales, format, bias, out_features, out):
    if format and format < EXACT:
        sums = quant.sums(x, weight, quant.name_of(format), out_features)
    else:
        if format:
            weight = quant.widen(weight, quant.name_of(format), out_features, x.shape[-1]).to(x.dtype)
        elif weight.dim() > 2:
            weight = unpack(weight, out_features, x.shape[-1])
        sums = F.linear(wide(x), weight.to(wide(x).dtype))
    if scales is not None:
        sums = sums * scales
    out.copy_(sums if bias is None else sums + wide(bias))
