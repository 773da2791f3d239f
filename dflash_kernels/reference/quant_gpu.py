"""Weights in blocks as a GPU has them: records of 256 k, whose sections _triton/_quant.py describes.

A record holds 8 pieces of 32 k. Zeros fill the last record and the last 16 outputs.
"""

import torch
import torch.nn.functional as F

from ..formats import ALIGNED, EVERY, RECORD, gpu_shape
from ._blocks import PIECE, split, values

PIECES = 8
# In the halfword of upper bits of 6: where the two of piece i are; and in the byte of those of 5, where the one is.
Q6_AT, Q5_AT = (4, 6, 12, 14, 2, 0, 10, 8), (0, 4, 1, 5, 2, 6, 3, 7)


def pack(rows, name):
    """(N, bytes of a row) uint8, as a file has them -> (ceil(K/256), ceil(N/16) * 16, bytes) uint8."""
    f = EVERY[name]
    blocks = F.pad(rows, (0, 0, 0, -rows.shape[0] % ALIGNED)).unflatten(-1, (-1, f.bytes))
    codes, scales, head = split(blocks, name)
    n = blocks.shape[0]
    codes = F.pad(codes, (0, -codes.shape[1] % RECORD)).view(n, -1, PIECES, PIECE).transpose(0, 1)
    records = codes.shape[0]
    scales = scales.reshape(n, -1)  # every format has the same bytes of scales in each record
    scales = F.pad(scales, (0, -scales.shape[1] % _scale_bytes(name))).view(n, records, -1)
    if name == "q6_k":
        scales = scales.view(n, records, 2, 4, 2).permute(0, 1, 4, 2, 3).reshape(n, records, -1)
    if name in ("q6_k", "iq4_xs"):
        head = head.reshape(n, records, 2).view(torch.float16).float().view(torch.uint8)
    if head is not None:
        scales = torch.cat([head.reshape(n, records, -1), scales], -1)
    words = scales.view(n, records, -1, 4).permute(1, 2, 0, 3)
    sections = [part.contiguous().view(torch.uint8) for part in _codes(codes, name)] + [words]
    return torch.cat([s.reshape(records, -1) for s in sections], 1).view(records, n, f.record)


def unpack(data, name, n, k):
    """As quant.unpack, which calls it."""
    f = EVERY[name]
    assert tuple(data.shape) == gpu_shape(f, n, k)
    records, outputs, _ = data.shape
    flat, at = data.reshape(records, -1), 0

    def section(nbytes, dtype=torch.int32):
        nonlocal at
        at += nbytes
        return flat[:, (at - nbytes) * outputs:at * outputs].contiguous().view(dtype)

    if name == "q8_0":
        codes = section(256).view(records, 2, outputs, 32, 1)
        codes = (codes >> _shifts(4, 8, data.device) & 255).permute(2, 0, 1, 4, 3)
    else:
        codes = (section(128).view(records, outputs, 32, 1) >> _shifts(8, 4, data.device) & 15).permute(1, 0, 3, 2)
    if f.bits in (5, 6):
        size, kind, places = (32, torch.uint8, Q5_AT) if f.bits == 5 else (64, torch.int16, Q6_AT)
        high = section(size, kind).view(records, outputs, 32, 1).int() >> torch.tensor(places, device=data.device)
        codes = codes | (high & (1 if f.bits == 5 else 3)).permute(1, 0, 3, 2) << 4
    codes = values(codes.reshape(outputs, -1), name, f)[:n, :k]
    words = section(f.record - at).view(records, -1, outputs).permute(2, 0, 1)[:n]
    words = words.clone(memory_format=torch.contiguous_format)  # which contiguous() leaves alone where it is one column
    d, m = _scales(words, name)
    pieces = k // PIECE
    return codes, d.reshape(n, -1, d.shape[-1])[:, :pieces], None if m is None else m.reshape(n, -1)[:, :pieces]


def _shifts(count, bits, device):
    return torch.arange(count, device=device, dtype=torch.int32) * bits


def _scale_bytes(name):
    """Of a record, without those of a K-format's own scales."""
    return {"q4_1": 32, "q5_1": 32, "iq4_xs": 8, "int4_g128": 4, "uint4_g128": 8}.get(name, 16)


def _codes(codes, name):
    """Sections of codes (records, outputs, 8, 32)."""
    def joined(fields, kind):
        total = torch.zeros_like(fields[0][0], dtype=torch.int32)
        for value, shift in fields:
            total |= value.int() << shift
        return total.to(kind)

    pieces = [codes[:, :, i] for i in range(PIECES)]
    if name == "q8_0":
        return [torch.stack([joined([(pieces[4 * p + b], 8 * b) for b in range(4)], torch.int32) for p in range(2)], 1)]
    sections = [joined([(c & 15, 4 * i) for i, c in enumerate(pieces)], torch.int32)]
    if EVERY[name].bits in (5, 6):
        kind, places = (torch.uint8, Q5_AT) if EVERY[name].bits == 5 else (torch.int16, Q6_AT)
        sections.append(joined([(c >> 4, at) for c, at in zip(pieces, places, strict=True)], kind))
    return sections


def _scales(words, name):
    """d (N, records, 8, groups) and m (N, records, 8) or None, of words (N, records, W) int32."""
    n, records, _ = words.shape
    halves = words.view(torch.float16).float()
    if name in ("q4_0", "q5_0", "q8_0", "iq4_nl"):
        return halves[..., None], None
    if name in ("q4_1", "q5_1"):
        return halves[..., 0::2, None], halves[..., 1::2]
    if name == "int4_g128":
        return halves.repeat_interleave(4, -1)[..., None], None
    if name == "uint4_g128":
        d = halves[..., 0::2]
        m = -d * (words >> 16 & 0xFFFF).float()
        return d.repeat_interleave(4, -1)[..., None], m.repeat_interleave(4, -1)
    small = words[..., 1:].contiguous().view(torch.uint8)
    if name == "iq4_xs":
        d = words[..., :1].contiguous().view(torch.float32)[..., None]
        return d * small.view(torch.int8)[..., None].float(), None
    if name == "q6_k":
        signed = small.view(torch.int8).view(n, records, 2, 8).transpose(2, 3).float()
        return words[..., :1].contiguous().view(torch.float32)[..., None] * signed, None
    return halves[..., :1, None] * small[..., 0::2, None].float(), halves[..., 1:2] * small[..., 1::2].float()
