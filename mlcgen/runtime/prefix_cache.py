"""Pages that sequences with the same beginning share: a tree of full pages, by the tokens in them (as in vLLM).

A page is a node, and its children are the pages that came after it in some sequence. Whoever holds a page holds those
before it, but for pages behind a model's window, and pages are freed from a sequence's end, so a node is mostly reused
before its parent. Where it is not, its children are forgotten with it: what is found in the tree is whole.
"""

import itertools
from array import array
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf

from mlcgen.runtime.kv_cache import PagePool

__all__ = ["ROOT", "PrefixCache", "new_roots"]

ROOT = -1
_Key = tuple[int, bytes]  # the page before it, or a root, and its tokens


def new_roots() -> Iterator[int]:
    """Of trees beside the one of ROOT, each once."""
    return itertools.count(ROOT - 1, -1)


class PrefixCache:
    """Knows which page of the pool holds which tokens after which others. Tokens are compared, not their hashes."""

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self._pool, self._page_size = pool, page_size
        self._pages: dict[_Key, int] = {}
        self._keys: dict[int, _Key] = {}  # by page
        self._children: dict[int, set[int]] = {}  # of pages that have some
        pool.on_reuse = self._forget

    def __len__(self) -> int:
        """Pages in the tree."""
        return len(self._keys)

    def find(self, tokens: SequenceOf[int], root: int = ROOT) -> list[int]:
        """The pages that hold the beginning of `tokens`, as many as there are. root: see `add`."""
        pages: list[int] = []
        node, size = root, self._page_size
        for start in range(0, len(tokens) - size + 1, size):
            page = self._pages.get((node, _packed(tokens[start : start + size])))
            if page is None:
                break
            pages.append(page)
            node = page
        return pages

    def add(self, parent: int, tokens: SequenceOf[int], page: int) -> int:
        """Remember a full page that comes after `parent`, or first after a root; returns the page with these contents.

        It is another one where two sequences computed the same; the caller then holds that one in its place. A root is
        a negative number: sequences of one root have the same keys and values for the same tokens.
        """
        key = (parent, _packed(tokens))
        found = self._pages.get(key)
        if found is not None:
            return found
        self._pages[key] = page
        self._keys[page] = key
        self._children.setdefault(parent, set()).add(page)
        self._pool.keep(page)
        return page

    def clear(self) -> None:
        """Forget everything: contents of pages cannot be relied on."""
        for page in self._keys:
            self._pool.drop(page)
        self._pages.clear()
        self._keys.clear()
        self._children.clear()

    def _forget(self, page: int) -> None:
        """A page's contents go, and with them what those of its children mean."""
        siblings = self._children[self._keys[page][0]]
        siblings.remove(page)
        if not siblings:
            del self._children[self._keys[page][0]]
        lost = [page]
        for each in lost:
            del self._pages[self._keys.pop(each)]
            lost += self._children.pop(each, ())
        for child in lost[1:]:
            self._pool.drop(child)


def _packed(tokens: SequenceOf[int]) -> bytes:
    return array("i", tokens).tobytes()
