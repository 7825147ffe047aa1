"""low_rank of WebGPU's devices against NumPy: parts and ranks off the tiles, any mix of adapters."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mlcgen.adapter_layout import AdapterLimits
from mlcgen.errors import UnsupportedError
from mlcgen.targets.base import LowRank
from mlcgen.targets.webgpu_kernels import low_rank
from mlcgen.targets.webgpu_kernels.low_rank import FEW_TOKENS

from .low_rank import BATCHES, EPS, SLOTS, stored, worst_error
from .reference import rms_norm
from .webgpu_build import run

LIMITS = AdapterLimits(16, SLOTS, "float16")


def check(spec: LowRank, batches: Sequence[list[int]], is_decode: int = 0) -> list[str]:
    """The last function that ran for each batch."""
    rng, names = np.random.default_rng(), []
    kernel = low_rank(spec)
    buffers, matrices = stored(spec, rng)
    for slots in batches:
        n, width = len(slots), sum(spec.out_features)
        x = rng.standard_normal((n, spec.in_features)).astype(np.float32) * np.float32(spec.in_features**-0.5)
        weight = rng.uniform(0.5, 2, spec.in_features).astype(np.float32)
        before = rng.standard_normal((n, width)).astype(np.float32)
        inner = x if spec.norm_eps is None else rms_norm(x, weight, EPS)
        y, out = before.copy(), np.full((n, width // 2), np.nan, np.float32)
        arrays = [x, *([weight] if spec.norm_eps is not None else []), np.array(slots, np.int32), *buffers, y]
        names.append(run(kernel, [*arrays, *[out] * spec.gates_result], {"n": n, "is_decode": is_decode})[-1])
        found = out if spec.gates_result else y
        error = worst_error(found, spec, inner, np.array(slots), matrices, before)
        assert error < 1e-6, slots
        unchanged = slice(None) if spec.gates_result else np.array(slots) < 0
        np.testing.assert_array_equal(y[unchanged], before[unchanged])
    return names


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_low_rank(dtype: str) -> None:
    names = check(LowRank(96, (64, 32, 32), AdapterLimits(16, SLOTS, dtype)), BATCHES)
    assert [name.endswith("_8") for name in names] == [len(slots) > FEW_TOKENS for slots in BATCHES]
    (name,) = check(LowRank(96, (64, 32, 32), LIMITS), [[0, 1, -1, 1] * 10], is_decode=1)
    assert name.endswith("_1")


@pytest.mark.parametrize("norm_eps", [None, EPS])
def test_gate_and_up(norm_eps: float | None) -> None:
    check(LowRank(64, (48, 48), AdapterLimits(8, SLOTS, "float16"), norm_eps, gates_result=True), BATCHES)


SIZES: list[tuple[int, tuple[int, ...], int]] = [
    *((36, (5, 83, 16), 3), (100, (1,), 1), (4, (20, 20), 20), (64, (33,), 70), (1500, (600, 300), 16)),
]
AROUND: dict[str, dict[str, Any]] = {"plain": {}, "norm": {"norm_eps": EPS}, "swiglu": {"gates_result": True}}


@pytest.mark.parametrize(("width", "parts", "rank"), SIZES, ids=str)
@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_sizes_off_the_tiles(width: int, parts: tuple[int, ...], rank: int, around: dict[str, Any]) -> None:
    """Columns that no share or invocation has whole, and features of several workgroups."""
    if "gates_result" in around:
        parts = parts[:1] * 2
    spec = replace(LowRank(width, parts, AdapterLimits(rank, SLOTS, "float16")), **around)
    check(spec, [*BATCHES[:3], BATCHES[5]])


def test_sizes_that_have_no_vectors() -> None:
    with pytest.raises(UnsupportedError, match="sizes that 4 divides, not 37"):
        low_rank(LowRank(37, (16,), LIMITS))
