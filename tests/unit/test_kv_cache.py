"""Pages are never lost, never handed out twice, never freed twice."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mlcgen.runtime.kv_cache import BlockTable, PagePool, num_pages_for


class PoolMachine(RuleBasedStateMachine):
    """A pool against a plain dict of reference counts."""

    @initialize(num_pages=st.integers(0, 12))
    def create(self, num_pages: int) -> None:
        self.pool = PagePool(num_pages)
        self.held: dict[int, int] = {}

    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        pages = self.pool.allocate(data.draw(st.integers(0, self.pool.num_free)))
        assert len(set(pages)) == len(pages)
        assert not set(pages) & set(self.held)
        assert set(pages) <= set(range(self.pool.num_pages))
        self.held |= dict.fromkeys(pages, 1)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.held)))
        self.pool.share([page])
        self.held[page] += 1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.held)))
        self.pool.free([page])
        self.held[page] -= 1
        if not self.held[page]:
            del self.held[page]

    @rule(data=st.data())
    def free_twice(self, data: st.DataObject) -> None:
        free = sorted(set(range(self.pool.num_pages)) - set(self.held))
        if free:
            with pytest.raises(AssertionError, match="double free"):
                self.pool.free([data.draw(st.sampled_from(free))])

    @invariant()
    def counts_agree(self) -> None:
        assert self.pool.num_free == self.pool.num_pages - len(self.held)
        assert all(self.pool.num_references(page) == count for page, count in self.held.items())


TestPool = PoolMachine.TestCase


def test_allocating_more_than_is_free_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="allocate 3 of 2"):
        PagePool(2).allocate(3)


def test_sharing_a_free_page_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="share of free page 1"):
        PagePool(2).share([1])


@given(st.integers(0, 5000), st.integers(1, 256))
def test_num_pages_for(num_tokens: int, page_size: int) -> None:
    pages = num_pages_for(num_tokens, page_size)
    assert (pages - 1) * page_size < num_tokens <= pages * page_size or num_tokens == pages == 0


@given(st.lists(st.lists(st.integers(0, 1000), max_size=30), max_size=6))
def test_block_table_is_a_list(pieces: list[list[int]]) -> None:
    table, expected = BlockTable(), []
    for piece in pieces:
        table.extend(piece)
        expected += piece
        assert table.pages.tolist() == expected
    assert len(table) == len(expected)
    assert table.clear() == expected
    assert len(table) == 0


def test_stack_pads_with_zeros() -> None:
    short, long = BlockTable(), BlockTable()
    short.extend([7])
    long.extend([3, 1, 2])
    short.extend([9])
    short.clear()  # entries left behind must not show
    short.extend([5])
    stacked = BlockTable.stack([short, long])
    assert stacked.dtype == np.int32
    assert stacked.tolist() == [[5, 0, 0], [3, 1, 2]]


@given(st.integers(1, 256), st.integers(0, 600), st.integers(1, 600), st.randoms(use_true_random=False))
def test_slots_follow_the_table(page_size: int, start: int, count: int, random) -> None:  # type: ignore[no-untyped-def]
    pages = random.sample(range(2000), num_pages_for(start + count, page_size))
    table = BlockTable()
    table.extend(pages)
    span = range(start, start + count)
    assert table.slots(span, page_size) == [pages[p // page_size] * page_size + p % page_size for p in span]
