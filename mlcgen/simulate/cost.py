"""Seconds of a step by its shape, fitted to steps that were measured."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import numpy as np
import numpy.typing as npt

from mlcgen.errors import SimulationError

__all__ = ["MeasuredStep", "StepCost", "StepShape", "fit", "medians", "nonnegative_least_squares"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class StepShape:
    """What a step's time depends on. A sequence takes part with one token (a decode) or with several of its prompt."""

    tokens: int  # computed, over all sequences
    rows: int  # sequences whose next token is sampled
    cached: int = 0  # tokens that the sequences with one token attend to
    pairs: int = 0  # of a token and one that it attends to, in the sequences with several

    @staticmethod
    def of(parts: Iterable[tuple[int, int, bool]]) -> "StepShape":
        """parts: for each sequence (tokens in the cache before, tokens of the step, whether it samples)."""
        tokens = rows = cached = pairs = 0
        for before, count, samples in parts:
            tokens += count
            rows += samples
            if count == 1:
                cached += before + 1
            else:
                pairs += count * before + count * (count + 1) // 2
        return StepShape(tokens, rows, cached, pairs)


@dataclass(frozen=True)
class MeasuredStep:
    shape: StepShape
    seconds: float


@dataclass(frozen=True)
class StepCost:
    """A step's seconds: linear in all but its tokens; in these, a line that bends at every count that was measured.

    A step of few tokens is bound by the weights' memory and one of many by arithmetic, and kernels change in between,
    so no one line would do; that it never falls is all that is assumed.
    """

    fixed: float  # of a step of knots[0] tokens or fewer
    knots: tuple[int, ...]  # tokens at which the line bends
    slopes: tuple[float, ...]  # seconds per token beyond each
    row: float
    cached: float
    pair: float

    def seconds(self, shape: StepShape) -> float:
        return (
            self.fixed
            + self._of_tokens(shape.tokens)
            + self.row * shape.rows
            + self.cached * shape.cached
            + self.pair * shape.pairs
        )

    def errors(self, steps: Iterable[MeasuredStep]) -> list[float]:
        """Of each step, how far the fitted time is off, relative to the measured one."""
        return [abs(self.seconds(step.shape) / step.seconds - 1) for step in steps]

    def _of_tokens(self, tokens: int) -> float:
        total = 0.0
        for index in range(bisect_right(self.knots, tokens)):
            end = self.knots[index + 1] if index + 1 < len(self.knots) else tokens
            total += self.slopes[index] * (min(tokens, end) - self.knots[index])
        return total


def fit(steps: Sequence[MeasuredStep]) -> StepCost:
    """The non-negative coefficients with the least squares of relative errors.

    A coefficient that the steps say nothing of, apart from those before it, is 0. Raises SimulationError if there are
    too few steps to tell more tokens from fewer.
    """
    steps = medians(steps)
    knots = sorted({step.shape.tokens for step in steps})
    if len(knots) < 2:
        raise SimulationError(f"the {len(steps)} measured steps have not even two different counts of tokens")
    columns = np.array([_features(step.shape, knots) for step in steps], float)
    seconds = np.array([step.seconds for step in steps])
    chosen = _independent(columns)
    found = np.zeros(columns.shape[1])
    found[chosen] = nonnegative_least_squares(columns[:, chosen] / seconds[:, None], np.ones(len(steps)))
    fixed, *slopes, cached, pair, row = found.tolist()
    # Of the last knot nothing is known beyond: it goes on as it came.
    return StepCost(fixed, tuple(knots), (*slopes, slopes[-1]), row, cached, pair)


def medians(steps: Sequence[MeasuredStep]) -> list[MeasuredStep]:
    """One for each shape."""
    by_shape: dict[StepShape, list[float]] = {}
    for step in steps:
        by_shape.setdefault(step.shape, []).append(step.seconds)
    return [MeasuredStep(shape, median(seconds)) for shape, seconds in by_shape.items()]


def _features(shape: StepShape, knots: Sequence[int]) -> list[int]:
    """1, the tokens between each two knots, then those that the others are told from last."""
    ramps = [min(max(shape.tokens - start, 0), end - start) for start, end in pairwise(knots)]
    return [1, *ramps, shape.cached, shape.pairs, shape.rows]


def _independent(columns: Floats) -> list[int]:
    """Of the columns, those that are no combination of ones before them."""
    scaled = columns / np.maximum(np.linalg.norm(columns, axis=0), 1e-300)
    chosen: list[int] = []
    for column in range(columns.shape[1]):
        if np.linalg.matrix_rank(scaled[:, [*chosen, column]], tol=1e-6) > len(chosen):
            chosen.append(column)
    return chosen


def nonnegative_least_squares(a: Floats, b: Floats) -> Floats:
    """x >= 0 with the least |a x - b|: Lawson and Hanson, Solving Least Squares Problems (1974), chapter 23."""
    scale = np.linalg.norm(a, axis=0)
    a = a / scale
    x, active = np.zeros(a.shape[1]), np.zeros(a.shape[1], bool)
    for _ in range(10 * a.shape[1]):
        gradient = np.where(active, -np.inf, a.T @ (b - a @ x))
        best = int(gradient.argmax())
        if gradient[best] <= 1e-10:
            break
        active[best] = True
        while True:
            solution = np.zeros_like(x)
            solution[active] = np.linalg.lstsq(a[:, active], b, rcond=None)[0]
            negative = active & (solution <= 0)
            if not negative.any():
                break
            # As far towards it as all stay positive; those that reach 0 leave.
            share = (x[negative] / np.maximum(x[negative] - solution[negative], 1e-300)).min()
            x = x + share * (solution - x)
            active &= x > 1e-12
        x = solution
    result: Floats = x / scale
    return result
