"""Weights in blocks as files have them (../formats.py)."""

import torch

from ..formats import GROUPED, LOOKED_UP, LOOKUP

PIECE = 32  # elements with a scale of their own, or half of one


def split(b, name):
    """Blocks (N, B, bytes) of a file: codes (N, K) and scales (N, pieces, groups, bytes) as uint8, and the superblocks'
    own scales (N, B, groups, 2), or None. A minimum is added here, so where a file subtracts it, its scale's sign
    changes."""
    n = b.shape[0]
    if name in ("q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl"):
        codes, at = torch.cat([b[..., -16:] & 15, b[..., -16:] >> 4], -1), 4 if name.endswith("1") else 2
        if name.startswith("q5"):
            codes = codes | torch.stack([b[..., at:-16] >> i & 1 for i in range(8)], -1).flatten(-2) << 4
        return codes.view(n, -1), b[..., :at].unflatten(-1, (-1, 2)), None
    if name == "q8_0":
        return (b[..., 2:] ^ 0x80).reshape(n, -1), b[..., :2].unflatten(-1, (-1, 2)), None
    if name in GROUPED:
        codes, zero = torch.cat([b[..., -64:] & 15, b[..., -64:] >> 4], -1), b[..., 2:-64]
        return codes.view(n, -1), torch.cat([b[..., :2], zero, zero * 0], -1)[..., None, :], None
    if name == "q6_k":
        low, high = b[..., :128].unflatten(-1, (2, 1, 64)), b[..., 128:192].unflatten(-1, (2, 1, 32))
        codes = torch.cat([low & 15, low >> 4], -2).reshape(n, -1)
        codes = codes | (torch.cat([high >> s & 3 for s in (0, 2, 4, 6)], -2) << 4).reshape(n, -1)
        return codes, b[..., 192:208].reshape(n, -1, 2, 1), b[..., 208:].unflatten(-1, (1, 2))
    if name == "iq4_xs":
        four = b[..., 8:].unflatten(-1, (8, 1, 16))
        low = torch.stack([b[..., 4:8] & 15, b[..., 4:8] >> 4], -1).flatten(-2)
        high = torch.stack([b[..., 2:4] >> s & 3 for s in (0, 2, 4, 6)], -1).flatten(-2)
        scales = (low | high << 4).view(torch.int8) - 32
        return torch.cat([four & 15, four >> 4], -2).reshape(n, -1), scales.view(torch.uint8).reshape(n, -1, 1, 1), \
            b[..., :2].unflatten(-1, (1, 2))
    low = b[..., -128:].unflatten(-1, (4, 1, 32))
    codes = torch.cat([low & 15, low >> 4], -2).reshape(n, -1)
    if name == "q5_k":
        codes = codes | (torch.stack([b[..., 16:48] >> i & 1 for i in range(8)], -2) << 4).reshape(n, -1)
    first, second, third = b[..., 4:8], b[..., 8:12], b[..., 12:16]
    scales = torch.cat([first & 63, (third & 15) | (first >> 2 & 48)], -1)
    minimums = torch.cat([second & 63, (third >> 4) | (second >> 2 & 48)], -1)
    head = b[..., :4].clone()
    head[..., 3] ^= 0x80
    return codes, torch.stack([scales, minimums], -1).view(n, -1, 2, 1), head.unflatten(-1, (2, 2))


def values(codes, name, f):
    """What codes stand for, less the offset."""
    codes = torch.tensor(LOOKUP, device=codes.device)[codes.long()] if name in LOOKED_UP else codes
    return codes.short() - f.offset
