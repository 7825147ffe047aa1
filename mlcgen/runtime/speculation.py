"""Guesses at the tokens that follow, to be verified in one step, and how many of them pay (Leviathan et al., 2023).

A draft is a list of tokens. Each is compared with what the sampler chooses from the model's logits at its place; the
first that differs is replaced by that choice, and the rest dropped. So the text is distributed as without drafts, and
with a seed it is the same.
"""

from collections.abc import Sequence

__all__ = ["MAX_ROWS", "Acceptance", "NgramDrafter", "StepCost"]

MAX_ROWS = 128  # rows of logits of a step with drafts: any artifact and device can be asked for so many

SIZES = (4, 3, 2)  # tokens of the n-grams that are looked up, the longest first


class NgramDrafter:
    """What followed the last tokens where they were in the text before (prompt lookup); one sequence's."""

    def __init__(self) -> None:
        self._ends: list[dict[tuple[int, ...], int]] = [{} for _ in SIZES]  # n-gram -> the place after its last one
        self._num_indexed = 0

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """Up to `count` tokens to follow `tokens`, which begin with those of the last call."""
        self._index(tokens)
        for size, ends in zip(SIZES, self._ends, strict=True):
            start = ends.get(tuple(tokens[-size:]))
            if start is not None:
                draft = list(tokens[start : start + count])
                period = len(draft)
                return [draft[i % period] for i in range(count)] if start + count > len(tokens) else draft
        return []

    def _index(self, tokens: Sequence[int]) -> None:
        """All n-grams but those at the very end, which nothing follows yet."""
        for end in range(self._num_indexed + 1, len(tokens)):
            for size, ends in zip(SIZES, self._ends, strict=True):
                if end >= size:
                    ends[tuple(tokens[end - size : end])] = end
        self._num_indexed = max(self._num_indexed, len(tokens) - 1)


class Acceptance:
    """How often one sequence's drafts are right, and from that how long the next one should be."""

    DECAY = 0.9
    PAUSE = 8  # steps without a draft after those that did not pay; then one token is tried

    def __init__(self) -> None:
        self._accepted, self._drafted = 1.5, 2.0  # tokens, older ones counting less; a hopeful beginning
        self._pause = 0

    def length(self, most: int, cost: float) -> int:
        """Tokens to draft: as long as the chance that all so far are right is worth a further token's cost.

        cost: seconds that one more token adds to a step, relative to a step with one.
        """
        if self._pause:
            self._pause -= 1
            return 0
        rate, chance, count = self._accepted / self._drafted, 1.0, 0
        while count < most and (chance := chance * rate) > cost:
            count += 1
        if not count:
            self._pause = self.PAUSE
            return min(most, 1)
        return count

    def record(self, drafted: int, accepted: int) -> None:
        """Of a draft, those before the first wrong one were accepted; those after it tell nothing."""
        judged = min(accepted + 1, drafted)
        self._accepted = self._accepted * self.DECAY + accepted
        self._drafted = self._drafted * self.DECAY + judged


class StepCost:
    """Seconds of a decoding step as a straight line over its tokens, from the steps that were made."""

    DECAY = 0.98
    UNKNOWN = 0.15  # of the first step's time, until steps of different sizes were seen

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self._sizes: set[int] = set()

    def record(self, num_tokens: int, seconds: float) -> None:
        """One step. The first of a size is left out: devices prepare something for it."""
        if num_tokens not in self._sizes:
            self._sizes.add(num_tokens)
            return
        self._weight = self._weight * self.DECAY + 1
        self._x = self._x * self.DECAY + num_tokens
        self._y = self._y * self.DECAY + seconds
        self._xx = self._xx * self.DECAY + num_tokens**2
        self._xy = self._xy * self.DECAY + num_tokens * seconds

    def of_another(self, num_tokens: int) -> float:
        """What a further token adds, relative to a step with `num_tokens`; between 0.01 and 1."""
        variance = self._weight * self._xx - self._x**2
        if variance < 1e-3 * max(self._x**2, 1e-9):
            return self.UNKNOWN
        slope = (self._weight * self._xy - self._x * self._y) / variance
        step = self._y / self._weight + slope * (num_tokens - self._x / self._weight)
        return min(max(slope / max(step, 1e-9), 0.01), 1.0)
