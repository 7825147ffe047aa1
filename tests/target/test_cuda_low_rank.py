"""low_rank of the CUDA target under the emulator, against NumPy: parts and ranks off the tiles, any mix of adapters."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mlcgen.adapter_layout import AdapterLimits
from mlcgen.targets.base import LowRank
from mlcgen.targets.cuda_kernels import low_rank
from mlcgen.targets.cuda_kernels.low_rank import FEW_TOKENS

from .cuda_build import as_dtype, as_float, poisoned, run
from .emulate_cuda import needs_compiler
from .low_rank import BATCHES, EPS, SLOTS, stored, worst_error
from .reference import rms_norm

pytestmark = needs_compiler

LIMITS = AdapterLimits(16, SLOTS, "float16")
TOLERANCE = 5e-7
ROUNDING = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8}


def many() -> list[int]:
    """More tokens than have blocks of their own: groups of one adapter, of several, of none."""
    mixed = np.random.default_rng().integers(-1, SLOTS, FEW_TOKENS - 40).tolist()
    return [*[1] * 19, *[-1] * 11, *[2] * 16, *mixed]


def check(spec: LowRank, batches: Sequence[list[int]], x_dtype: str = "float32", out_dtype: str = "float32") -> None:
    rng = np.random.default_rng()
    kernel = low_rank(spec)
    buffers, matrices = stored(spec, rng)
    for i, slots in enumerate(batches):
        n, width = len(slots), sum(spec.out_features)
        x = as_dtype(rng.standard_normal((n, spec.in_features)).astype(np.float32) * spec.in_features**-0.5, x_dtype)
        weight = rng.uniform(0.5, 2, spec.in_features).astype(np.float32)
        before = rng.standard_normal((n, width)).astype(np.float32)
        inner = as_float(x, x_dtype)
        inner = inner if spec.norm_eps is None else rms_norm(inner, weight, EPS)
        y, out = before.copy(), poisoned((n, width // 2), out_dtype)
        arrays = [x, *([weight] if spec.norm_eps is not None else []), np.array(slots, np.int32), *buffers, y]
        arrays += [out] * spec.gates_result
        dtypes = [p.dtype for p in kernel.params]
        dtypes[0] = x_dtype
        if spec.gates_result:
            dtypes[-1] = out_dtype
        run(kernel, arrays, {"n": n}, dtypes, "descending" if i % 2 else "ascending")
        found = as_float(out, out_dtype) if spec.gates_result else y
        error = worst_error(found, spec, inner, np.array(slots), matrices, before, ROUNDING[out_dtype])
        assert error < TOLERANCE, slots
        unchanged = slice(None) if spec.gates_result else np.array(slots) < 0
        np.testing.assert_array_equal(y[unchanged], before[unchanged])


@pytest.mark.parametrize("x_dtype", ["float32", "float16", "bfloat16"])
def test_low_rank(x_dtype: str) -> None:
    check(LowRank(96, (64, 32, 32), LIMITS), [*BATCHES, many()], x_dtype)


@pytest.mark.parametrize("out_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("norm_eps", [None, EPS])
def test_gate_and_up(norm_eps: float | None, out_dtype: str) -> None:
    spec = LowRank(64, (48, 48), AdapterLimits(8, SLOTS, "float16"), norm_eps, gates_result=True)
    check(spec, [*BATCHES, many()], out_dtype=out_dtype)


@pytest.mark.parametrize(
    ("width", "parts", "rank"),
    [(37, (5, 83, 16), 3), (100, (1,), 1), (5, (20, 20), 20), (64, (33,), 70), (1500, (600, 300), 16)],
    ids=str,
)
@pytest.mark.parametrize("around", [{}, {"norm_eps": EPS}, {"gates_result": True}], ids=["plain", "norm", "swiglu"])
def test_sizes_off_the_tiles(width: int, parts: tuple[int, ...], rank: int, around: dict[str, Any]) -> None:
    """Columns that no share or thread has whole, and features of several blocks."""
    if "gates_result" in around:
        parts = parts[:1] * 2
    check(replace(LowRank(width, parts, AdapterLimits(rank, SLOTS, "float16")), **around), [*BATCHES[:3], many()])


def test_a_value_that_is_not_finite_spoils_its_row_and_no_other() -> None:
    spec = LowRank(32, (16,), AdapterLimits(4, SLOTS, "float16"), EPS)
    rng = np.random.default_rng()
    buffers, _ = stored(spec, rng)
    for count in (1, 8, 11):
        x, y = (rng.standard_normal((count, size)).astype(np.float32) for size in (32, 16))
        x[0, 3] = np.nan
        run(low_rank(spec), [x, np.ones(32, np.float32), np.zeros(count, np.int32), *buffers, y], {"n": count})
        assert not np.isfinite(y[0]).any()
        assert np.isfinite(y[1:]).all()
