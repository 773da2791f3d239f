"""4-bit checkpoints in groups of 128 as rows of blocks (../formats.py): the tensors of AWQ and of GPTQ."""

import torch

GROUP = 128
AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # which nibble of a word has column 8 c + i


def awq_blocks(qweight, qzeros, scales):
    """qweight (K, N/8), qzeros (K/128, N/8), scales (K/128, N) -> rows (N, K/128 * 67)."""
    return _rows(_columns(qweight, AWQ_NIBBLES).T, _columns(qzeros, AWQ_NIBBLES).T, scales.T)


def gptq_blocks(qweight, qzeros, scales, above):
    """qweight (K/8, N), qzeros (K/128, N/8), scales (K/128, N) -> rows (N, K/128 * 67), or * 66 where all zero points
    are 8. above: what a zero point is above its nibble."""
    k, n = qweight.shape[0] * 8, qweight.shape[1]
    codes = (qweight[:, None] >> _shifts(range(8), qweight)[:, None] & 15).to(torch.uint8).view(k, n)
    zeros = _columns(qzeros, range(8)) + above
    return _rows(codes.T, None if bool((zeros == 8).all()) else zeros.T, scales.T)


def _shifts(nibbles, like):
    return torch.tensor([4 * i for i in nibbles], dtype=torch.int32, device=like.device)


def _columns(packed, nibbles):
    return (packed[..., None] >> _shifts(nibbles, packed) & 15).to(torch.uint8).flatten(1)


def _rows(codes, zeros, scales):
    n = codes.shape[0]
    low, high = codes.reshape(n, -1, 2, GROUP // 2).unbind(2)
    parts = [scales.half().contiguous()[..., None].view(torch.uint8), low | high << 4]
    if zeros is not None:
        parts.insert(1, zeros[..., None])
    return torch.cat(parts, -1).flatten(1)
