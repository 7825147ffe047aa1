"""When guessing tokens pays: guesses are verified in one step, all of them together (Leviathan et al., 2023).

Each token of a draft is compared with what the sampler chooses from the model's logits at its place; the first that
differs is replaced by that choice, and the rest dropped. So the text is distributed as without drafts, and with a seed
it is the same.
"""

from collections.abc import Iterable, Mapping
from typing import Protocol

from mlcgen.runtime.draft import MAX_ROWS, MAX_TREE, Draft
from mlcgen.runtime.request import Request
from mlcgen.runtime.step_cost import StepCost

__all__ = ["Drafter", "Speculation"]


class Drafter(Protocol):
    """Guesses how sequences go on."""

    token_seconds: float  # what a guess after another costs; 0 where it costs next to nothing

    def propose(self, counts: Mapping[Request, int]) -> Mapping[Request, Draft]:
        """Drafts for some or all of the sequences: so many tokens one after the other, at most, and for each of these
        as many at its place as the drafter has branches."""
        ...

    def observe(self, request: Request, draft: Draft, tokens: list[int]) -> None:
        """What the model made of a draft: the likeliest token after the last one, then after each node."""
        ...

    def forget(self, request: Request) -> None:
        """The sequence has ended."""
        ...


class Speculation:
    """Drafts for the sequences of an engine: how long they should be, and how good they were."""

    def __init__(self, drafter: Drafter | None, max_draft: int, branches: int, limit: int) -> None:
        """limit: tokens of a sequence."""
        self.drafter = drafter
        self._max_draft, self._branches, self._limit = max_draft, branches, limit
        self._cost = StepCost()

    def draft(self, running: Iterable[Request]) -> None:
        """Guess what those that decode will say next."""
        decoding = [request for request in running if request.is_decoding and not request.is_ending]
        spare = MAX_ROWS - len(decoding)
        counts: dict[Request, int] = {}
        cost = self._cost_of_another(len(decoding))
        for request in decoding:
            if request.draft:
                request.draft = Draft()
            # The last token that is generated needs no keys and values, and is not guessed either.
            room = min(request.num_wanted, self._limit - request.num_tokens) - 1
            most = min(spare, room, MAX_TREE - 1 - request.num_behind)
            grammar = request.sampler.grammar
            if grammar is not None and (forced := grammar.forced()[: max(most, 0)]):
                request.draft = Draft.chain(forced)
                request.draft.is_forced = True
                spare -= len(forced)
            elif self.drafter is not None and request.search is None:
                longest = min(self._max_draft, most // self._branches)
                if longest > 0 and (length := request.acceptance.length(longest, cost)):
                    counts[request] = length
                    spare -= length * self._branches
        if counts and self.drafter is not None:
            for request, draft in self.drafter.propose(counts).items():
                grammar = request.sampler.grammar
                if grammar is not None:
                    draft = Draft.chain(draft.tokens[: grammar.validate(draft.trunk)])
                request.draft = draft

    def judge(self, request: Request, draft: Draft, num_accepted: int, tokens: list[int]) -> None:
        """A draft's nodes so many of which were right. tokens: as in Drafter.observe."""
        if self.drafter is not None and not draft.is_forced:
            request.acceptance.record(max(draft.depths), num_accepted)
            self.drafter.observe(request, draft, tokens)

    def forget(self, request: Request) -> None:
        if self.drafter is not None:
            self.drafter.forget(request)

    def measured(self, num_tokens: int, seconds: float) -> None:
        """A step in which all sequences decode."""
        self._cost.record(num_tokens, seconds)

    def _cost_of_another(self, num_tokens: int) -> float:
        """Of a token more in the step, its guess included, relative to a step without."""
        guess = self.drafter.token_seconds if self.drafter is not None else 0.0
        rows = self._branches * self._cost.of_another(num_tokens)
        return min(rows + guess / max(self._cost.seconds(num_tokens), 1e-9), 1.0)
