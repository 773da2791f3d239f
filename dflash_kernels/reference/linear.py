"""Linear layers, and the packed layout that streams."""

import torch
import torch.nn.functional as F

from ._wide import wide

BLOCK = 16


def pack(weight):
    """(N, K) -> (ceil(N/16), ceil(K/32)*16, 16, 2) for bfloat16, (ceil(N/16), K, 16) otherwise; zeros fill the rest."""
    n, k = weight.shape
    pairs = weight.dtype == torch.bfloat16
    padded = F.pad(weight, (0, -k % 32 if pairs else 0, 0, -n % BLOCK))
    if pairs:
        return padded.view(-1, BLOCK, padded.shape[1] // 2, 2).transpose(1, 2).contiguous()
    return padded.view(-1, BLOCK, k).transpose(1, 2).contiguous()


def unpack(data, n, k):
    if data.dim() == 4:
        return data.transpose(1, 2).reshape(data.shape[0] * BLOCK, -1)[:n, :k]
    return data.transpose(1, 2).reshape(-1, data.shape[1])[:n, :k]


def linear(x, weight, bias, out_features, out):
    if weight.dim() > 2:
        weight = unpack(weight, out_features, x.shape[-1])
    out.copy_(F.linear(wide(x), wide(weight), None if bias is None else wide(bias)))
