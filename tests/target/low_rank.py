"""Adapters for low_rank's kernels, and NumPy's result."""

import numpy as np

from mlcgen.adapter_layout import ProjectionGroup
from mlcgen.targets.base import LowRank

from .reference import silu_mul, tiled

EPS = 1e-5
SLOTS = 3
# Slots of tokens: of one adapter, of several, of none.
BATCHES = [
    [0],
    [-1],
    [2, -1, 0],
    [1] * 8,
    [1] * 9,
    [0] * 7 + [1] * 9 + [-1] * 8 + [2] * 20 + [-1, 0, 1, 2],
    [-1] * 20,
    list(np.random.default_rng(0).integers(-1, SLOTS, 21)),
]


def stored(
    spec: LowRank, rng: np.random.Generator
) -> tuple[list[np.ndarray], list[list[tuple[np.ndarray, np.ndarray]]]]:
    """(lora_a and lora_b, the A and B of each part that they mean, for each slot)"""
    limits, width = spec.limits, spec.in_features

    def matrix(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(limits.dtype)

    matrices = [
        [(matrix(limits.rank, width), matrix(n, limits.rank)) for n in spec.out_features] for _ in range(limits.slots)
    ]
    a = np.stack([tiled(np.concatenate([a for a, _ in parts])) for parts in matrices])
    b = np.stack([np.concatenate([tiled(b) for _, b in parts]) for parts in matrices])
    group = ProjectionGroup(("p",) * len(spec.out_features), spec.in_features, spec.out_features)
    assert (a.shape, b.shape) == (group.a_shape(limits), group.b_shape(limits))
    return [a, b], matrices


def expected(spec: LowRank, x: np.ndarray, slots: np.ndarray, matrices: list, y: np.ndarray) -> np.ndarray:
    result = y.astype(np.float64)
    for t, slot in enumerate(slots):
        if slot >= 0:
            parts = [
                x[t].astype(np.float64) @ a.T.astype(np.float64) @ b.T.astype(np.float64) for a, b in matrices[slot]
            ]
            result[t] += np.concatenate(parts)
    return result


def worst_error(
    found: np.ndarray, spec: LowRank, x: np.ndarray, slots: np.ndarray, matrices: list, y: np.ndarray, eps: float = 0
) -> float:
    """The largest error of a result, by the sum of what was added up, all signs alike; eps: of the result's type."""
    wanted = expected(spec, x, slots, matrices, y)
    magnitudes = [[(np.abs(a), np.abs(b)) for a, b in parts] for parts in matrices]
    size = expected(spec, np.abs(x), slots, magnitudes, np.abs(y))
    if spec.gates_result:
        (gate, up), (gate_size, up_size) = (np.split(each, 2, axis=-1) for each in (wanted, size))
        wanted = silu_mul(wanted)
        size = gate_size * np.abs(up) * 1.1 + np.abs(gate) * up_size  # SiLU's slope is 1.1 at most
    rounding = eps * np.maximum(np.abs(wanted), 2**-14)  # below that float16 has a fixed step
    return float(np.max((np.abs(found - wanted) - rounding) / size))
