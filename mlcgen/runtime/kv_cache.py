"""KV-cache pages by number: who holds which page, and where a token's key and value go. Knows no device."""

from collections.abc import Iterable

import numpy as np

from mlcgen.runtime.executor import Int32

__all__ = ["BlockTable", "PagePool", "num_pages_for"]


def num_pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that `num_tokens` tokens fill, the last one perhaps in part."""
    return -(-num_tokens // page_size)


class PagePool:
    """The pages of one device, with a count of how many sequences hold each.

    Freed pages are handed out again last-in first-out, so that a small load stays in a small, warm part of the pool.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int = 1) -> list[int]:
        """Take `count` free pages, each held once. The caller has checked `num_free`."""
        assert 0 <= count <= len(self._free), f"allocate {count} of {len(self._free)} free pages"
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Hold pages once more; each holder frees them once."""
        for page in pages:
            assert self._references[page] > 0, f"share of free page {page}"
            self._references[page] += 1

    def free(self, pages: Iterable[int]) -> None:
        """Let go of pages; those that nobody holds any more can be allocated again."""
        for page in pages:
            assert self._references[page] > 0, f"double free of page {page}"
            self._references[page] -= 1
            if not self._references[page]:
                self._free.append(page)

    def num_references(self, page: int) -> int:
        return self._references[page]


class BlockTable:
    """The pages of one sequence in token order, kept as an array so that a step copies rows, not lists."""

    __slots__ = ("_entries", "_length")

    def __init__(self) -> None:
        self._entries: Int32 = np.zeros(8, np.int32)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def pages(self) -> Int32:
        """(blocks,) int32, a view that the next `extend` or `clear` outdates."""
        return self._entries[: self._length]

    def extend(self, pages: list[int]) -> None:
        length = self._length + len(pages)
        if length > len(self._entries):
            grown = np.zeros(max(length, 2 * len(self._entries)), np.int32)
            grown[: self._length] = self.pages
            self._entries = grown
        self._entries[self._length : length] = pages
        self._length = length

    def clear(self) -> list[int]:
        """Empty the table and return the pages it held."""
        pages: list[int] = self.pages.tolist()
        self._length = 0
        return pages

    def slots(self, positions: range, page_size: int) -> list[int]:
        """page * page_size + offset of each position."""
        return [int(self._entries[at // page_size]) * page_size + at % page_size for at in positions]

    @staticmethod
    def stack(tables: "list[BlockTable]") -> Int32:
        """(seqs, max_blocks) int32, unused entries 0."""
        stacked = np.zeros((len(tables), max([table._length for table in tables])), np.int32)
        for row, table in zip(stacked, tables, strict=True):
            row[: table._length] = table._entries[: table._length]
        return stacked
