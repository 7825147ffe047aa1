"""low_rank of the CPU target, against NumPy: parts and ranks off the tiles, blocks of one adapter, mixed ones, none."""

from dataclasses import replace

import numpy as np
import pytest

from mlcgen.adapter_layout import AdapterLimits
from mlcgen.targets.base import LowRank
from mlcgen.targets.cpu_kernels import low_rank

from .cpu_build import assert_close, build, compiles_for_aarch64, every_float_isa, normal
from .emulate import without_emulator
from .low_rank import BATCHES, EPS, SLOTS, expected, stored
from .reference import rms_norm, silu_mul


def check(mcpu: str, spec: LowRank, all_slots: list[list[int]]) -> None:
    kernel = build(mcpu, lambda isa: low_rank(spec, isa))
    rng = np.random.default_rng(spec.in_features)
    buffers, matrices = stored(spec, rng)
    for slots in all_slots:
        n, k = len(slots), spec.in_features
        x, weight = normal(rng, n, 2 * k if spec.is_gated else k), normal(rng, k)
        y = normal(rng, n, sum(spec.out_features))
        inner = rms_norm(x, weight, EPS) if spec.norm_eps is not None else silu_mul(x) if spec.is_gated else x
        wanted = expected(spec, inner, np.array(slots), matrices, y)
        before = y.copy()
        kernel(x, *([weight] if spec.norm_eps is not None else []), np.array(slots, np.int32), *buffers, y)
        assert_close(y, wanted, 3e-6)
        none = np.array(slots) < 0
        np.testing.assert_array_equal(y[none], before[none])


@every_float_isa
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_low_rank(mcpu: str, dtype: str) -> None:
    check(mcpu, LowRank(96, (64, 32, 32), AdapterLimits(16, SLOTS, dtype)), BATCHES)


@every_float_isa
@pytest.mark.parametrize("around", [{"norm_eps": EPS}, {"is_gated": True}], ids=["norm", "gate"])
def test_what_stands_before_it(mcpu: str, around: dict[str, object]) -> None:
    check(mcpu, replace(LowRank(64, (48, 48), AdapterLimits(8, SLOTS, "float16")), **around), BATCHES)


@every_float_isa
@pytest.mark.parametrize(
    ("width", "parts", "rank"),
    [(37, (5, 83, 16), 3), (100, (1,), 1), (5, (20, 20), 20), (64, (33,), 64)],
    ids=str,
)
def test_sizes_off_the_tiles(mcpu: str, width: int, parts: tuple[int, ...], rank: int) -> None:
    check(mcpu, LowRank(width, parts, AdapterLimits(rank, SLOTS, "float32")), BATCHES)


@every_float_isa
def test_few_tokens_that_all_threads_share(mcpu: str) -> None:
    check(mcpu, LowRank(512, (160, 80), AdapterLimits(64, SLOTS, "float16")), [[1], [0, -1], [2, 0, 1, 1, 1]])


@every_float_isa
def test_a_value_that_is_not_finite_spoils_its_row_and_no_other(mcpu: str) -> None:
    spec = LowRank(32, (16,), AdapterLimits(4, SLOTS, "float32"))
    kernel = build(mcpu, lambda isa: low_rank(spec, isa))
    rng = np.random.default_rng(1)
    buffers, _ = stored(spec, rng)
    for count in (1, 8, 11):
        x, y = normal(rng, count, 32), normal(rng, count, 16)
        x[0, 3] = np.nan
        kernel(x, np.zeros(count, np.int32), *buffers, y)
        assert not np.isfinite(y[0]).any()
        assert np.isfinite(y[1:]).all()


@without_emulator
def test_aarch64() -> None:
    spec = LowRank(40, (24, 8), AdapterLimits(5, 2, "float16"), norm_eps=EPS)
    compiles_for_aarch64([lambda isa: low_rank(spec, isa)])
