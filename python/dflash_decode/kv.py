"""Allocates pages to requests, and the caches that they index. Runs on the host only."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import torch

from dflash_kernels import PagedKV

from .prefixes import Prefixes

NO_PAGE = -1  # fills unused page-table entries: prepare_block gives no slot there, and a stray read is loud


_SHARE = 0.8  # of a GPU's free memory, for pages; steps, their graphs and kernels have the rest


class OutOfPages(RuntimeError):
    """No pages are free at the moment; a request that ends frees some."""


@dataclass(frozen=True)
class CacheShape:
    """A model's cache per token: layers x kv_heads x head_dim keys, and as many values."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device | str = "cpu"

    def page_bytes(self, page_size: int) -> int:
        return 2 * self.layers * self.kv_heads * page_size * self.head_dim * self.dtype.itemsize

    def allocate(self, num_pages: int, page_size: int) -> list[PagedKV]:
        """Allocates the caches. Raises ValueError if the device cannot hold them."""
        try:
            return PagedKV.allocate(self.layers, num_pages, page_size, self.kv_heads, self.head_dim, self.dtype,
                                    self.device)
        except (RuntimeError, MemoryError):
            needed = num_pages * self.page_bytes(page_size)
            raise ValueError(f"cache: num_pages x page_size (num_pages is room for max_batch requests of max_context "
                             f"tokens if not given) must fit into the memory of {self.device}; got {num_pages} x "
                             f"{page_size} tokens, which take {needed:,} bytes") from None


def default_pages(most: int, page_size: int, caches: Sequence[CacheShape]) -> int:
    """`most`, or as many pages as fit on the GPU in the caches of all models. On a CPU untouched pages cost nothing.
    Raises ValueError if a GPU has no room for one page."""
    device = torch.device(caches[0].device)
    if device.type != "cuda":
        return most
    # torch keeps what it has freed, and the driver does not count that as free.
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    page = sum(cache.page_bytes(page_size) for cache in caches)
    if free * _SHARE < page:
        raise ValueError(f"Decoder: num_pages must be what {device} has room for; got {free} free bytes, "
                         f"{_SHARE:g} of which hold no page of {page}")
    return min(most, int(free * _SHARE) // page)


class PagePool:
    """num_pages pages of page_size tokens. A page holds the same tokens in every layer's cache of every model that
    shares the pool, so the target and its drafter share one page table and one slot per token.

    most_kept: pages that no request uses, but whose tokens a later one may begin with.
    """

    def __init__(self, num_pages: int, page_size: int = 16, most_kept: int = 0):
        given = (("num_pages", num_pages, 1), ("page_size", page_size, 1), ("most_kept", most_kept, 0))
        for name, value, least in given:
            if type(value) is not int or value < least:
                raise ValueError(f"PagePool: {name} must be an integer of at least {least}; got {value!r}")
        self.num_pages, self.page_size, self.most_kept = num_pages, page_size, most_kept
        self.prefixes = Prefixes(page_size)
        self._out: set[int] = set()  # in use: an interrupt finds it as it was before or as it is after

    @property
    def free_pages(self) -> int:
        """Pages that no request uses."""
        return self.num_pages - len(self._out)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def allocate(self, tokens: int, begun: Sequence[int] = ()) -> list[int]:
        """Pages for `tokens` tokens, all or none. begun: the first of them, which have their tokens already. Raises
        OutOfPages."""
        used = self._out.union(begun)
        need, free = self.pages_for(tokens) - len(begun), self.num_pages - len(used)
        if need > free:
            raise OutOfPages(f"PagePool: {tokens} tokens need {need} pages of {self.page_size}; "
                             f"{free} of {self.num_pages} are free")
        self.prefixes.trim(min(self.most_kept, free - need), used)
        kept = self.prefixes.pages()
        # Lowest ids first, so that a short run touches little memory.
        fresh = list(islice((p for p in range(self.num_pages) if p not in used and p not in kept), need))
        self._out = used.union(fresh)
        return [*begun, *fresh]

    def keep(self, owned: Iterable[Sequence[int]]) -> None:
        """Frees every page that is in none of the lists. Raises ValueError for one outside the pool."""
        out = set(chain.from_iterable(owned))
        if out and not 0 <= min(out) <= max(out) < self.num_pages:
            raise ValueError(f"PagePool: pages must be of {self.num_pages}, to be kept; got {sorted(out)}")
        self._out = out
        self.prefixes.trim(self.most_kept, out)

    def forget(self) -> None:
        """Frees every page."""
        self._out = set()
        self.prefixes = Prefixes(self.page_size)

    @staticmethod
    def table_row(pages: list[int], max_pages: int) -> torch.Tensor:
        """(max_pages,) int32: the pages in token order, then NO_PAGE."""
        row = torch.full((max_pages,), NO_PAGE, dtype=torch.int32)
        row[:len(pages)] = torch.tensor(pages, dtype=torch.int32)
        return row
