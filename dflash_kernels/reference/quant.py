"""Weights in blocks of 4 to 8 bits: the packed layout (csrc/cpu/quant.h), and products by integer dot products.

    W[n, k] = d * (q - offset) + m     d, m for each output and piece of 32 k (q6_k: of 16)
    x[k]    = 2^e * xq[k]              e for each row and piece
    sum    += d * 2^e (q - offset) . xq,  sum += m * 2^e (sum of xq)      for every piece in order, in float32
"""

import torch

from ..formats import EXACT, FORMATS, NAMES, packed_bytes
from . import quant_gpu
from ._blocks import PIECE, split, values

OUTPUTS = 16
LOWEST, HIGHEST = -100, 100  # exponents e


def pack(rows, name):
    """(N, bytes of a row) uint8, as a file has them -> (ceil(N/16), bytes) uint8; zeros fill the last 16."""
    f = FORMATS[name]
    n, k = rows.shape[0], rows.shape[1] // f.bytes * f.block
    padded = torch.nn.functional.pad(rows, (0, 0, 0, -n % OUTPUTS))
    codes, scales, head = split(padded.view(padded.shape[0], -1, f.bytes), name)
    codes = codes.contiguous().view(torch.int32).view(-1, OUTPUTS, k // PIECE, 8)  # four k move as one
    codes = codes.permute(0, 2, 3, 1).contiguous().view(torch.uint8).unflatten(-1, (OUTPUTS, 4))
    blocks, pieces = codes.shape[:2]  # block, piece, register, output, k
    parts = [codes.reshape(blocks, pieces, -1)]
    if name != "q8_0":
        parts = [((codes[:, :, 0::2] & 15) | (codes[:, :, 1::2] << 4)).reshape(blocks, pieces, -1)]
    if f.bits == 5:
        parts.append(_planes(codes >> 4, 8, 1).flatten(2))
    if name == "q6_k":
        parts.append(torch.cat([_planes(codes[:, :, h:h + 4] >> 4, 4, 2).flatten(2) for h in (0, 4)], 2))
    # (outputs, pieces, groups, bytes) -> (block, piece, group, output, byte)
    scales = scales.view(blocks, OUTPUTS, pieces, *scales.shape[2:]).permute(0, 2, 3, 1, 4)
    packed = torch.cat([*parts, scales.reshape(blocks, pieces, -1)], 2)
    if head is not None:
        head = head.view(blocks, OUTPUTS, k // 256, -1, 2).permute(0, 2, 3, 1, 4).reshape(blocks, k // 256, -1)
        packed = torch.cat([head, packed.view(blocks, k // 256, -1)], 2)
    return packed.reshape(blocks, -1)


def quantize(weight, name):
    """(N, K) -> (N, bytes of a row) uint8, as llama.cpp rounds: q8_0 to 127 steps of the largest magnitude of 32, q4_0
    to 8 steps with the sign of the largest."""
    w = weight.float().unflatten(-1, (-1, PIECE))
    if name == "q8_0":
        d = w.abs().amax(-1, keepdim=True) / 127
        codes = torch.round(w / torch.where(d > 0, d, 1.0)).to(torch.int8).view(torch.uint8)
    else:
        d = w.gather(-1, w.abs().argmax(-1, keepdim=True)) / -8
        codes = (torch.floor(w / torch.where(d != 0, d, 1.0) + 8.5)).clamp(0, 15).to(torch.uint8)
        codes = codes[..., :16] | codes[..., 16:] << 4
    return torch.cat([d.half().view(torch.uint8), codes], -1).flatten(1)


def _planes(codes, registers, bits):
    """Bits of `registers` registers side by side in one byte."""
    plane = torch.zeros_like(codes[:, :, 0])
    for r in range(registers):
        plane |= (codes[:, :, r] & ((1 << bits) - 1)) << (r * bits)
    return plane


def unpack(data, name, n, k):
    """Codes less the offset (N, K) int16, d (N, pieces, scales in a piece) and m (N, pieces) float32; m None: no
    minimum. Of either layout: a GPU's has three dimensions."""
    if data.dim() == 3:
        return quant_gpu.unpack(data, name, n, k)
    f = FORMATS[name]
    assert data.shape[1] == packed_bytes(f, k)
    blocks, pieces, head = data.shape[0], k // PIECE, None
    if f.block == 256:
        records = data.view(blocks, k // 256, -1)
        size = 64 if name in ("q4_k", "q5_k") else 32
        head = records[..., :size].reshape(blocks, k // 256, 1, -1, OUTPUTS, 2).view(torch.float16)[..., 0].float()
        data = records[..., size:].reshape(blocks, pieces, -1)
    else:
        data = data.view(blocks, pieces, -1)
    nibbles = data[..., :256].view(blocks, pieces, 4, 1, 64)
    codes = torch.cat([nibbles & 15, nibbles >> 4], 3) if name != "q8_0" else data[..., :512]
    codes, at = codes.reshape(blocks, pieces, 8, 64), 256 if name != "q8_0" else 512
    if f.bits == 5:
        codes = codes | torch.stack([data[..., 256:320] >> r & 1 for r in range(8)], 2) << 4
        at = 320
    if name == "q6_k":
        planes = data[..., 256:384].view(blocks, pieces, 2, 1, 64)
        codes = codes | torch.cat([planes >> s & 3 for s in (0, 2, 4, 6)], 3).reshape(blocks, pieces, 8, 64) << 4
        at = 384
    codes = codes.view(blocks, pieces, 8, OUTPUTS, 4).permute(0, 3, 1, 2, 4).reshape(-1, k)
    scales = data[..., at:].contiguous()
    if head is None:
        scales = scales.view(blocks, pieces, -1, OUTPUTS, 2).view(torch.float16)[..., 0].float()
    else:
        scales = scales.view(torch.int8 if size == 32 else torch.uint8).view(blocks, k // 256, 8, -1, OUTPUTS).float()
        scales = (scales * head).view(blocks, pieces, -1, OUTPUTS)
    scales = scales.permute(0, 3, 1, 2).reshape(-1, pieces, scales.shape[2])[:n]
    one_of_two = name in ("q4_1", "q5_1", "q4_k", "q5_k")
    return values(codes, name, f)[:n], scales[..., :1] if one_of_two else scales, \
        scales[..., 1] if one_of_two else None


def widen(data, name, n, k):
    """The weight (N, K) in float32."""
    codes, d, m = unpack(data, name, n, k)
    values = d[..., None] * codes.view(n, k // PIECE, d.shape[2], -1).float()
    return (values.reshape(n, k // PIECE, PIECE) + (0 if m is None else m[..., None])).reshape(n, k)


def round_rows(x):
    """Rows (T, K) as integers (T, pieces, 32) and exponents (T, pieces): the largest magnitude of a piece becomes 64 to
    127. NaN, where a piece has an element that is not finite or is above 2^106."""
    x = x.float().unflatten(-1, (-1, PIECE))
    top = x.abs().view(torch.int32).amax(-1) >> 16
    e = (((top + 1) >> 7) - 133).clamp(min=LOWEST)
    q = torch.round(x * torch.exp2(-e.float())[..., None])
    return torch.where((e > HIGHEST)[..., None], torch.nan, q), e


def sums(x, data, name, n):
    """x W^T (T, N) in float32."""
    k = x.shape[-1]
    codes, d, m = unpack(data, name, n, k)
    q, e = round_rows(x)
    halves = d.shape[2]
    dots = torch.einsum("tphi,nphi->tnph", q.unflatten(-1, (halves, PIECE // halves)).double(),
                        codes.view(n, -1, halves, PIECE // halves).double())
    power = torch.exp2(e.clamp(max=HIGHEST).double())
    total = torch.zeros(x.shape[0], n, dtype=torch.float32, device=x.device)
    for p in range(k // PIECE):
        for h in range(halves):
            total = (total.double() + d[:, p, h].double() * (dots[:, :, p, h] * power[:, p, None])).float()
        if m is not None:
            total = (total.double() + m[:, p].double() * (q[:, p].sum(-1).double() * power[:, p])[:, None]).float()
    return total


def name_of(number):
    return NAMES[number % EXACT]
