"""Per-head RMSNorm followed by a rotary embedding, and the scatter of K/V rows to cache slots."""

import torch

from ._fp8 import quantised
from ._wide import wide


def norm_rope(x, weight, cos_sin, positions, eps, interleaved, round_each):
    """x (T, heads, D) normed over D (weight None: not) and rotated; a row whose position is outside the table is NaN.

    round_each: the normed value takes x's dtype before it is rotated.
    """
    h = wide(x)
    if weight is not None:
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * wide(weight)
        if round_each:
            h = wide(h.to(x.dtype))
    if cos_sin is None:
        return h.to(x.dtype)
    known = in_table(positions, cos_sin)
    table = wide(cos_sin)[positions.where(known, 0)][:, None]
    cos, sin = table.chunk(2, dim=-1)
    rotary, rest = h[..., :cos_sin.shape[1]], h[..., cos_sin.shape[1]:]
    a, b = (rotary[..., 0::2], rotary[..., 1::2]) if interleaved else rotary.chunk(2, dim=-1)
    turned = [a * cos - b * sin, b * cos + a * sin]
    rotary = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat([rotary, rest], -1).where(known[:, None, None], float("nan")).to(x.dtype)


def in_table(positions, cos_sin):
    """(T,) bool: positions that the table has; all of them when there is no table."""
    if cos_sin is None:
        return torch.ones_like(positions, dtype=torch.bool)
    return (positions >= 0) & (positions < cos_sin.shape[0])


def scatter(cache, slots, rows, keep, scale):
    """cache (num_pages, P, Hkv, D) takes rows[t] at slot slots[t] where keep[t] and the slot exists. scale: an fp8
    cache's, or None."""
    num_pages, page_size = cache.shape[:2]
    keep = keep & (slots >= 0) & (slots < num_pages * page_size)
    slots, rows = slots[keep], rows[keep]
    if cache.dtype == torch.float8_e4m3fn:
        cache, rows = cache.view(torch.uint8), quantised(rows, scale).view(torch.uint8)
    cache[slots // page_size, slots % page_size] = rows.to(cache.dtype)


def qk_norm_rope(qkv, positions, cos_sin, q_weight, k_weight, k_cache, v_cache, k_scale, v_scale, slots, num_heads,
                 num_kv_heads, head_dim, eps, interleaved, round_each):
    heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, head_dim))
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    for part, weight in ((q, q_weight), (k, k_weight)):
        part.copy_(norm_rope(part, weight, cos_sin, positions, eps, interleaved, round_each))
    if k_cache is not None:
        keep = in_table(positions, cos_sin)
        scatter(k_cache, slots, k, keep, k_scale)
        scatter(v_cache, slots, v, keep, v_scale)
