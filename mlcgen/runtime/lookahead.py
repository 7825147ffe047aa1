"""Guesses from the model's own wrong guesses: Jacobi iteration and the n-grams that it leaves behind.

A step computes a likely token after each guess too. Those after wrong guesses are the next guesses (Jacobi decoding,
Santilli et al., 2023), and what followed what among them is kept, to be tried where the same token comes again
(lookahead decoding, Fu et al., 2024).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from mlcgen.runtime.draft import Draft
from mlcgen.runtime.request import Request

__all__ = ["LookaheadDrafter"]

NGRAM = 4  # tokens that are kept after a token


@dataclass
class _Guesses:
    """Of one sequence."""

    window: list[int]  # the last iteration's guesses at the tokens that come
    followers: dict[int, tuple[tuple[int, ...], ...]] = field(default_factory=dict)  # by the token before


class LookaheadDrafter:
    """branches: guesses at one place: the window, and so many less one n-grams that followed the last token before."""

    token_seconds = 0.0

    def __init__(self, branches: int = 1) -> None:
        self._branches = branches
        self._guesses: dict[Request, _Guesses] = {}

    def propose(self, counts: Mapping[Request, int]) -> dict[Request, Draft]:
        """See Drafter.propose."""
        return {request: self._propose(request, count) for request, count in counts.items()}

    def _propose(self, request: Request, count: int) -> Draft:
        tokens = request.tokens
        if request not in self._guesses:  # any guess does to begin with; the text's words are likelier than others
            self._guesses[request] = _Guesses(tokens[-count:])
        guesses = self._guesses[request]
        window = (guesses.window + tokens[-count:])[:count]
        return Draft.merged([*(ngram[:count] for ngram in guesses.followers.get(tokens[-1], ())), window])

    def observe(self, request: Request, draft: Draft, tokens: list[int]) -> None:
        """See Drafter.observe."""
        guesses = self._guesses.get(request)
        if guesses is None:
            return
        after = _longest_path(draft)  # nodes
        found = [tokens[0], *(tokens[1 + node] for node in after)]  # the next iteration, from the first place on
        num_right = next((i for i, node in enumerate(after) if draft.tokens[node] != found[i]), len(after))
        guesses.window = found[num_right + 1 :]
        for i in range(num_right, len(found) - 1):
            self._keep(guesses, found[i], tuple(found[i + 1 : i + 1 + NGRAM]))

    def _keep(self, guesses: _Guesses, token: int, ngram: tuple[int, ...]) -> None:
        known = tuple(other for other in guesses.followers.get(token, ()) if other[0] != ngram[0])
        guesses.followers[token] = (ngram, *known)[: self._branches - 1]

    def forget(self, request: Request) -> None:
        """See Drafter.forget."""
        self._guesses.pop(request, None)


def _longest_path(draft: Draft) -> list[int]:
    """Nodes from the first to the deepest one, of equals the last."""
    depths = draft.depths
    node = max(range(len(depths)), key=lambda at: (depths[at], at))
    path: list[int] = []
    while node >= 0:
        path.append(node)
        node = draft.parents[node]
    return path[::-1]
