"""A distribution over tokens, and the rule by which a guess drawn from one becomes a draw from another."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Distribution", "draw_index", "verified"]

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
# Tokens that share one sum in a first pass over the vocabulary.
BLOCK = 256


@dataclass(frozen=True)
class Distribution:
    """Probabilities up to a factor; tokens that are not named have none."""

    ids: Int64 | None  # (n,) token ids; None: all of them, in order
    weights: Float32  # (n,)

    def draw(self, uniform: float) -> int:
        """A token, by a random number in [0, 1)."""
        return self._id(draw_index(self.weights, uniform))

    def dense(self, vocab_size: int) -> npt.NDArray[np.float64]:
        """(vocab,) probabilities."""
        probabilities = np.zeros(vocab_size)
        probabilities[slice(None) if self.ids is None else self.ids] = self.weights
        return probabilities / probabilities.sum()

    def _id(self, index: int) -> int:
        return index if self.ids is None else int(self.ids[index])


def verified(target: Distribution, guess: int, proposal: Distribution, vocab_size: int, random: Any) -> int:
    """A token distributed as `target`, which is as often as possible the `guess`, itself drawn from `proposal`.

    The guess stands with the probability min(1, p / q); otherwise a token is drawn from what p has more than q
    (Leviathan et al., 2023, section 2.3 and theorem 1).
    """
    p, q = target.dense(vocab_size), proposal.dense(vocab_size)
    if random.random() * q[guess] < p[guess]:
        return guess
    rest = np.maximum(p - q, 0.0)
    if not rest.sum():  # p and q are the same but for rounding
        return guess if p[guess] else target.draw(random.random())
    return draw_index(rest.astype(np.float32), random.random())


def draw_index(weights: Float32, uniform: float) -> int:
    """Index drawn in proportion to `weights` (n,), by inversion of their running sum at `uniform` in [0, 1).

    Blocks first, then inside one block: a running sum over all of a vocabulary would cost ten times as much.
    """
    sums = np.add.reduceat(weights, np.arange(0, len(weights), BLOCK))
    cumulative = np.cumsum(sums, dtype=np.float64)
    target = uniform * cumulative[-1]
    block = _first_above(cumulative, target)
    start = block * BLOCK
    within = np.cumsum(weights[start : start + BLOCK], dtype=np.float64)
    return start + _first_above(within, target - (cumulative[block - 1] if block else 0.0))


def _first_above(cumulative: npt.NDArray[np.float64], target: float) -> int:
    return min(int(cumulative.searchsorted(target, side="right")), len(cumulative) - 1)  # rounding may reach the end
