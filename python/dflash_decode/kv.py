"""Pages: who owns which, and the caches that they index. Host side only."""

from dataclasses import dataclass

import torch

from dflash_kernels import PagedKV

NO_PAGE = -1  # fills unused page-table entries: prepare_block gives no slot there, and a stray read is loud


class OutOfPages(RuntimeError):
    """No room now; there may be when a request leaves."""


@dataclass(frozen=True)
class CacheShape:
    """What one model keeps for a token: layers x kv_heads x head_dim keys, and as many values."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device | str = "cpu"

    def allocate(self, num_pages: int, page_size: int) -> list[PagedKV]:
        # (page, head, row, dim) in memory: a head's keys of one page are one stretch for the attention to stream.
        shape = (num_pages, self.kv_heads, page_size, self.head_dim)
        k, v = (torch.empty((self.layers, *shape), dtype=self.dtype, device=self.device).transpose(2, 3)
                for _ in range(2))
        return [PagedKV(k[i], v[i]) for i in range(self.layers)]


class PagePool:
    """num_pages pages of page_size tokens. A page holds the same tokens in every layer's cache of every model that
    shares the pool, so the target and its drafter have one page table and one slot per token."""

    def __init__(self, num_pages: int, page_size: int = 16):
        for name, value in (("num_pages", num_pages), ("page_size", page_size)):
            if type(value) is not int or value < 1:
                raise ValueError(f"PagePool: {name} must be an integer of at least 1; got {value!r}")
        self.num_pages, self.page_size = num_pages, page_size
        # Lowest ids first out, so that a short run touches little memory.
        self._free = list(range(num_pages - 1, -1, -1))
        self._owned: set[int] = set()

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def allocate(self, tokens: int) -> list[int]:
        """Pages for `tokens` tokens, all or none. Raises OutOfPages."""
        need = self.pages_for(tokens)
        if need > len(self._free):
            raise OutOfPages(f"PagePool: {tokens} tokens need {need} pages of {self.page_size}; "
                             f"{len(self._free)} of {self.num_pages} are free")
        pages = [self._free.pop() for _ in range(need)]
        self._owned.update(pages)
        return pages

    def free(self, pages: list[int]) -> None:
        """Takes pages back. Raises ValueError for a page that is not out."""
        for page in pages:
            if page not in self._owned:
                raise ValueError(f"PagePool: page {page} must be allocated to be freed; got a free one")
            self._owned.remove(page)
            self._free.append(page)

    @staticmethod
    def table_row(pages: list[int], max_pages: int) -> torch.Tensor:
        """(max_pages,) int32: the pages in token order, then NO_PAGE."""
        row = torch.full((max_pages,), NO_PAGE, dtype=torch.int32)
        row[:len(pages)] = torch.tensor(pages, dtype=torch.int32)
        return row
