"""What the tree finds is whole, whatever pages were handed out again."""

from mlcgen.runtime.kv_cache import PagePool
from mlcgen.runtime.prefix_cache import ROOT, PrefixCache


def test_children_of_a_page_that_is_reused_are_forgotten() -> None:
    """A sequence with a window lets go of its first pages before the others."""
    pool = PagePool(4)
    cache = PrefixCache(pool, page_size=1)
    first, second, third = pool.allocate(3)
    node = ROOT
    for token, page in enumerate((first, second, third)):
        assert cache.add(node, [token], page) == page
        node = page
    assert cache.find([0, 1, 2]) == [first, second, third]
    pool.free([first])
    assert pool.allocate(2)[1] == first  # there is no other
    assert len(cache) == 0
    assert cache.add(ROOT, [7], first) == first
    assert cache.find([7, 1]) == [first]  # not what came after token 0
    assert cache.find([0, 1]) == []
    pool.free([second, third])
    assert pool.num_free == 2
    assert pool.num_idle == 0


def test_a_child_that_nobody_holds_is_free_as_any_page() -> None:
    pool = PagePool(3)
    cache = PrefixCache(pool, page_size=1)
    first, second = pool.allocate(2)
    cache.add(first, [1], second)
    cache.add(ROOT, [0], first)
    pool.free([first])
    pool.free([second])
    assert pool.num_idle == 2
    taken = pool.allocate(2)
    assert first in taken
    assert pool.num_free == 1
    assert pool.num_idle == 0
    assert cache.find([0, 1]) == []
