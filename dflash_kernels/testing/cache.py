"""Paged caches in every layout that engines use, poisoned, with guard pages on both sides; and a rotary table."""

import torch

# (num_pages, P, Hkv, D) seen from: contiguous pages; heads before rows; K and V of a page side by side; a slot pool.
LAYOUTS = ("nhd", "hnd", "interleaved", "slots")
GUARD_PAGES = 1


def poisoned_storage(layout: str, layers: int, num_pages: int, page_size: int, kv_heads: int, dim: int,
                     dtype: torch.dtype) -> torch.Tensor:
    """One allocation for the K and V of all layers, filled with NaN.

    A NaN that is gone was overwritten; a NaN in a result was read.

    Parameters
    ----------
    layout : str
        One of `LAYOUTS`.
    layers, num_pages, page_size, kv_heads, dim : int
        Sizes. Guard pages are added on both sides of num_pages.
    dtype : torch.dtype
        Element type.

    Returns
    -------
    storage : torch.Tensor
        First dimension: layers.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels.testing import poisoned_storage
    >>> storage = poisoned_storage("nhd", 1, 4, 16, 2, 64, torch.float32)
    >>> storage.shape, bool(storage.isnan().all())
    (torch.Size([1, 2, 6, 16, 2, 64]), True)
    """
    pages = num_pages + 2 * GUARD_PAGES
    shape = {"interleaved": (pages, 2, page_size, kv_heads, dim), "hnd": (2, pages, kv_heads, page_size, dim)}
    return torch.full((layers, *shape.get(layout, (2, pages, page_size, kv_heads, dim))), float("nan"), dtype=dtype)


def cache_views(storage: torch.Tensor, layout: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Views of a poisoned storage without its guard pages.

    Parameters
    ----------
    storage : torch.Tensor
        Returned by `poisoned_storage`.
    layout : str
        The layout it was made with.

    Returns
    -------
    views : list of (k, v)
        One pair per layer, each (num_pages, P, Hkv, D).

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels.testing import cache_views, poisoned_storage
    >>> storage = poisoned_storage("hnd", 1, 4, 16, 2, 64, torch.float32)
    >>> [(k.shape, v.shape) for k, v in cache_views(storage, "hnd")]
    [(torch.Size([4, 16, 2, 64]), torch.Size([4, 16, 2, 64]))]
    """
    if layout == "interleaved":
        pairs = [(layer[:, 0], layer[:, 1]) for layer in storage]
    elif layout == "hnd":
        pairs = [(layer[0].transpose(1, 2), layer[1].transpose(1, 2)) for layer in storage]
    else:
        pairs = [(layer[0], layer[1]) for layer in storage]
    return [tuple(t[GUARD_PAGES:-GUARD_PAGES] for t in pair) for pair in pairs]


def rotary_table(rotary_dim: int, max_pos: int, theta: float = 1e4) -> torch.Tensor:
    """A table of cosines and sines for rotary embedding.

    Parameters
    ----------
    rotary_dim : int
        R, even.
    max_pos : int
        Number of rows.
    theta : float
        Base of the frequencies.

    Returns
    -------
    table : (max_pos, R) float32
        [cos | sin] of position * theta^(-2i / R).

    Examples
    --------
    >>> from dflash_kernels.testing import rotary_table
    >>> rotary_table(4, 2)[0].tolist()
    [1.0, 1.0, 0.0, 0.0]
    """
    frequencies = theta ** (-torch.arange(0, rotary_dim, 2).float() / rotary_dim)
    angle = torch.outer(torch.arange(max_pos).float(), frequencies)
    return torch.cat([angle.cos(), angle.sin()], dim=1)
