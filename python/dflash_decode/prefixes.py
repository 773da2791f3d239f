"""Pages of prompts and answers, for later requests that begin with the same tokens."""

import hashlib
from array import array
from collections.abc import Collection, Iterator, Sequence


class Prefixes:
    """Which page has which tokens after which others. Full pages alone, which nothing writes any more."""

    def __init__(self, page_size: int):
        self._page_size = page_size
        # By a digest of all tokens up to the page's end, least recently used first. A page is used with those before
        # it, and counts as older than they, so that none outlasts the pages without which it cannot be found.
        self._pages: dict[bytes, int] = {}

    def find(self, tokens: Sequence[int], salt: str = "") -> list[int]:
        """The pages that have the first of these tokens, as many as are known."""
        pages: list[int] = []
        for key in (keys := list(self._keys(tokens, salt))):
            if (page := self._pages.get(key)) is None:
                break
            pages.append(page)
        self._use(keys, pages)
        return pages

    def add(self, tokens: Sequence[int], pages: Sequence[int], salt: str = "") -> None:
        """Keeps the full ones of the pages that have these tokens, but for those that others have already."""
        keys = list(self._keys(tokens, salt))
        self._use(keys, [self._pages.get(key, page) for key, page in zip(keys, pages, strict=False)])

    def trim(self, most: int, used: Collection[int]) -> None:
        """Forgets pages, least recently used first, until at most so many are in no request's use."""
        idle = [key for key, page in self._pages.items() if page not in used]
        for key in idle[:max(len(idle) - most, 0)]:
            del self._pages[key]

    def pages(self) -> set[int]:
        return set(self._pages.values())

    def _use(self, keys: Sequence[bytes], pages: Sequence[int]) -> None:
        for key, page in reversed(list(zip(keys, pages, strict=False))):
            self._pages.pop(key, None)
            self._pages[key] = page

    def _keys(self, tokens: Sequence[int], salt: str) -> Iterator[bytes]:
        size = self._page_size
        key = hashlib.sha256(salt.encode("utf-8", "surrogatepass")).digest()
        for end in range(size, len(tokens) + 1, size):
            key = hashlib.sha256(key + array("q", tokens[end - size:end]).tobytes()).digest()
            yield key
