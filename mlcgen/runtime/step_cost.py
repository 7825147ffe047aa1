"""What a step's tokens cost, and how often guesses are right: measured while the engine runs."""

import math

__all__ = ["Acceptance", "StepCost"]


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
        slope = self._slope()
        return self.UNKNOWN if slope is None else min(max(slope / max(self.seconds(num_tokens), 1e-9), 0.01), 1.0)

    def seconds(self, num_tokens: int) -> float:
        """Of a step with so many tokens; infinite until one was seen."""
        if not self._weight:
            return math.inf
        return self._y / self._weight + (self._slope() or 0.0) * (num_tokens - self._x / self._weight)

    def _slope(self) -> float | None:
        """None: all steps were of about one size."""
        variance = self._weight * self._xx - self._x**2
        if variance < 1e-3 * max(self._x**2, 1e-9):
            return None
        return (self._weight * self._xy - self._x * self._y) / variance
