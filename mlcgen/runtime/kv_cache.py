"""KV-cache pages by number: who holds which page, and where a token's key and value go. Knows no device."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from mlcgen.runtime.executor import Int32

__all__ = ["BlockTable", "PagePool", "num_pages_for", "stretches"]


def num_pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that `num_tokens` tokens fill, the last one perhaps in part."""
    return -(-num_tokens // page_size)


def stretches(pages: Sequence[int], places: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first page, first place, count) of pages that are neighbours, in order, and whose places are too."""
    begin = 0
    for i in range(1, len(pages) + 1):
        if i == len(pages) or (pages[i] - pages[begin], places[i] - places[begin]) != (i - begin, i - begin):
            yield pages[begin], places[begin], i - begin
            begin = i


class PagePool:
    """The pages of one memory, with a count of how many sequences hold each.

    Freed pages are handed out again last-in first-out, so that a small load stays in a small, warm part of the pool.
    A page that is `kept` is free too when nobody holds it, but it is handed out only where no other is left, the one
    that was freed first before all others; `on_reuse` is then told that its contents go.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.on_reuse: Callable[[int], None] | None = None
        self._references = [0] * num_pages
        self._is_kept = [False] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._idle: dict[int, None] = {}  # kept pages that nobody holds, in the order in which they were freed

    @property
    def num_free(self) -> int:
        """Pages that can be allocated."""
        return len(self._free) + len(self._idle)

    @property
    def num_idle(self) -> int:
        """Of the free ones, those whose contents are kept."""
        return len(self._idle)

    def allocate(self, count: int = 1) -> list[int]:
        """Take `count` free pages, each held once. The caller has checked `num_free`."""
        assert 0 <= count <= self.num_free, f"allocate {count} of {self.num_free} free pages"
        pages = [self._free.pop() if self._free else self._reuse() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Hold pages once more, or again where they are kept; each holder frees them once."""
        for page in pages:
            if not self._references[page]:
                assert page in self._idle, f"share of free page {page}"
                del self._idle[page]
            self._references[page] += 1

    def free(self, pages: Iterable[int]) -> None:
        """Let go of pages; those that nobody holds any more can be allocated again, the last ones first."""
        for page in reversed(list(pages)):
            assert self._references[page] > 0, f"double free of page {page}"
            self._references[page] -= 1
            if self._references[page]:
                continue
            if self._is_kept[page]:
                self._idle[page] = None
            else:
                self._free.append(page)

    def keep(self, page: int) -> None:
        """Keep the contents of a page that somebody holds for as long as there are others to hand out."""
        assert self._references[page] > 0, f"keep of free page {page}"
        self._is_kept[page] = True

    def drop(self, page: int) -> None:
        """Keep a page's contents no longer."""
        self._is_kept[page] = False
        if page in self._idle:
            del self._idle[page]
            self._free.append(page)

    def is_shared(self, page: int) -> bool:
        """Whether others need the contents of a page, so that a sequence which holds it must not write there."""
        return self._references[page] > 1 or self._is_kept[page]

    def num_references(self, page: int) -> int:
        return self._references[page]

    def _reuse(self) -> int:
        page = next(iter(self._idle))
        del self._idle[page]
        self._is_kept[page] = False
        if self.on_reuse is not None:
            self.on_reuse(page)
        return page


class BlockTable:
    """The pages of one sequence in token order, kept as an array so that a step copies rows, not lists."""

    __slots__ = ("_entries", "_length")

    def __init__(self) -> None:
        self._entries: Int32 = np.zeros(8, np.int32)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, block: int) -> int:
        return int(self._entries[block])

    def __setitem__(self, block: int, page: int) -> None:
        self._entries[block] = page

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
