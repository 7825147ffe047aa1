"""Guesses from the text so far, how many of them pay, and what steps cost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlcgen.runtime.draft import ROOT, Draft
from mlcgen.runtime.ngram import SIZES, NgramIndex
from mlcgen.runtime.step_cost import Acceptance, StepCost


def searched(tokens: list[int], count: int) -> list[int]:
    """The same by search: after the last earlier place of the longest n-gram that is there twice."""
    for size in SIZES:
        places = [end for end in range(size, len(tokens)) if tokens[end - size : end] == tokens[-size:]]
        if len(tokens) >= size and places:
            longer = list(tokens)
            for at in range(places[-1], places[-1] + count):
                longer.append(longer[at])
            return longer[len(tokens) :]
    return []


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 40), max_size=8), st.integers(1, 9))
def test_ngrams(tokens: list[int], asked_at: list[int], count: int) -> None:
    """Whatever was asked for before."""
    index, tree = NgramIndex(), NgramIndex(branches=3)
    for length in sorted({min(at, len(tokens)) for at in asked_at} | {len(tokens)}):
        expected = searched(tokens[:length], count)
        assert index.propose(tokens[:length], count) == ([expected] if expected else [])
        chains = tree.propose(tokens[:length], count)
        assert chains[:1] == ([expected] if expected else [])
        assert len({chain[0] for chain in chains}) == len(chains) <= 3
        assert all(len(chain) == count for chain in chains)


def test_branches_are_where_the_text_went_on_differently() -> None:
    text = [1, 2, 5, 1, 2, 6, 1, 2, 7, 1, 2]
    assert NgramIndex(branches=2).propose(text, 3) == [[7, 1, 2], [6, 1, 2]]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=6), st.integers(1, 3))
def test_a_merged_draft_has_the_chains_as_its_paths(chains: list[list[int]], num_known: int) -> None:
    draft = Draft.merged(chains)
    paths, masks = [], draft.masks(num_known)
    assert masks[:num_known] == [0] * num_known
    for node in range(len(draft)):
        path, at = [], node
        while at != ROOT:
            assert masks[num_known + node] >> (num_known + at) & 1
            path.append(at)
            at = draft.parents[at]
        assert draft.depths[node] == len(path)
        assert bin(masks[num_known + node]).count("1") == num_known + len(path)
        paths.append([draft.tokens[at] for at in reversed(path)])
    assert sorted(map(tuple, paths)) == sorted({tuple(chain[: i + 1]) for chain in chains for i in range(len(chain))})
    for chain in chains:
        node_or_none: int | None = ROOT
        for token in chain:
            assert node_or_none is not None
            node_or_none = draft.child(node_or_none, token)
    assert draft.is_chain == (len(draft) == max(draft.depths, default=0))


def test_drafts_grow_where_they_are_right_and_end_where_they_are_not() -> None:
    right, wrong = Acceptance(), Acceptance()
    drafted = 0
    for _ in range(60):
        if length := right.length(8, 0.2):
            right.record(length, length)
        if length := wrong.length(8, 0.2):
            drafted += length
            wrong.record(length, 0)
    assert right.length(8, 0.2) == 8
    assert drafted < 25
    for _ in range(60):  # and begin again where they have become right
        if length := wrong.length(8, 0.2):
            wrong.record(length, length)
    assert wrong.length(8, 0.2) > 2


def test_what_costs_as_much_as_it_gives_is_not_drafted() -> None:
    acceptance = Acceptance()
    assert acceptance.length(8, 1.0) == 1  # to see
    assert [acceptance.length(8, 1.0) for _ in range(Acceptance.PAUSE)] == [0] * Acceptance.PAUSE


@pytest.mark.parametrize("slope", [0.0, 0.1, 1.0])
def test_step_cost(slope: float) -> None:
    cost, random = StepCost(), np.random.default_rng(1)
    assert cost.of_another(1) == StepCost.UNKNOWN
    for _ in range(50):
        cost.record(1, 1.0)
    assert cost.of_another(1) == StepCost.UNKNOWN, "steps of one size tell nothing"
    for _ in range(200):
        tokens = int(random.integers(1, 9))
        cost.record(tokens, 1 + slope * (tokens - 1) + random.normal(0, 0.01))
    assert cost.of_another(1) == pytest.approx(max(slope, 0.01), abs=0.02)
