"""Guesses from the text itself: what followed the last tokens where they were before (prompt lookup)."""

from collections.abc import Mapping, Sequence

from mlcgen.runtime.draft import Draft
from mlcgen.runtime.request import Request

__all__ = ["NgramDrafter", "NgramIndex"]

SIZES = (4, 3, 2)  # tokens of the n-grams that are looked up, the longest first


class NgramDrafter:
    """branches: places to go on from, at most; where they differ, the draft is a tree."""

    token_seconds = 0.0

    def __init__(self, branches: int = 1) -> None:
        self._branches = branches
        self._indexes: dict[Request, NgramIndex] = {}

    def propose(self, counts: Mapping[Request, int]) -> dict[Request, Draft]:
        """See Drafter.propose."""
        drafts = {}
        for request, count in counts.items():
            index = self._indexes.setdefault(request, NgramIndex(self._branches))
            drafts[request] = Draft.merged(index.propose(request.tokens, count))
        return drafts

    def observe(self, request: Request, draft: Draft, tokens: list[int]) -> None:
        """See Drafter.observe. Nothing is to be learnt: right tokens become part of the text."""

    def forget(self, request: Request) -> None:
        """See Drafter.forget."""
        self._indexes.pop(request, None)


class NgramIndex:
    """Where the n-grams of one text were last."""

    def __init__(self, branches: int = 1) -> None:
        self._branches = branches
        # n-gram -> the places after its last ones, the latest first
        self._ends: list[dict[tuple[int, ...], tuple[int, ...]]] = [{} for _ in SIZES]
        self._num_indexed = 0

    def propose(self, tokens: Sequence[int], count: int) -> list[list[int]]:
        """Up to `count` tokens each to follow `tokens`, which begin with those of the last call; the best first."""
        self._index(tokens)
        starts: dict[int, int] = {}  # by the first token: one that is repeated is no other guess
        for size, ends in zip(SIZES, self._ends, strict=True):
            for start in ends.get(tuple(tokens[-size:]), ()):
                if len(starts) < self._branches:
                    starts.setdefault(tokens[start], start)
        return [_continued(tokens, start, count) for start in starts.values()]

    def _index(self, tokens: Sequence[int]) -> None:
        """All n-grams but those at the very end, which nothing follows yet."""
        for end in range(self._num_indexed + 1, len(tokens)):
            for size, ends in zip(SIZES, self._ends, strict=True):
                if end >= size:
                    ngram = tuple(tokens[end - size : end])
                    ends[ngram] = (end, *ends.get(ngram, ())[: self._branches - 1])
        self._num_indexed = max(self._num_indexed, len(tokens) - 1)


def _continued(tokens: Sequence[int], start: int, count: int) -> list[int]:
    """What follows from `start` on; where the text ends before, what is there is repeated."""
    known = list(tokens[start : start + count])
    return [known[i % len(known)] for i in range(count)]
