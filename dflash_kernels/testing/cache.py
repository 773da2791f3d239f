"""Paged caches in every layout that engines use, poisoned, with guard pages on both sides; and a rotary table."""

import torch

# (num_pages, P, Hkv, D) seen from: contiguous pages; heads before rows; K and V of a page side by side; a slot pool.
LAYOUTS = ("nhd", "hnd", "interleaved", "slots")
GUARD_PAGES = 1


def poisoned_storage(layout: str, layers: int, num_pages: int, page_size: int, kv_heads: int, dim: int,
                     dtype: torch.dtype) -> torch.Tensor:
    """One allocation for all layers' K and V, all NaN: a NaN that went away was written, one that spread was read."""
    pages = num_pages + 2 * GUARD_PAGES
    shape = {"interleaved": (pages, 2, page_size, kv_heads, dim), "hnd": (2, pages, kv_heads, page_size, dim)}
    return torch.full((layers, *shape.get(layout, (2, pages, page_size, kv_heads, dim))), float("nan"), dtype=dtype)


def cache_views(storage: torch.Tensor, layout: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each layer's (k, v), (num_pages, P, Hkv, D) views of a poisoned_storage without its guard pages."""
    if layout == "interleaved":
        pairs = [(layer[:, 0], layer[:, 1]) for layer in storage]
    elif layout == "hnd":
        pairs = [(layer[0].transpose(1, 2), layer[1].transpose(1, 2)) for layer in storage]
    else:
        pairs = [(layer[0], layer[1]) for layer in storage]
    return [tuple(t[GUARD_PAGES:-GUARD_PAGES] for t in pair) for pair in pairs]


def rotary_table(rotary_dim: int, max_pos: int, theta: float = 1e4) -> torch.Tensor:
    """(max_pos, rotary_dim) float32: [cos | sin] of position * theta^(-2i / rotary_dim)."""
    frequencies = theta ** (-torch.arange(0, rotary_dim, 2).float() / rotary_dim)
    angle = torch.outer(torch.arange(max_pos).float(), frequencies)
    return torch.cat([angle.cos(), angle.sin()], dim=1)
