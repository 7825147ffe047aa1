"""linear and embedding of the CPU target, against NumPy: every format, few and many rows, sizes off the tiles."""

import functools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from mlcgen.formats import BF16, F16, F32, Q4, Q8, WeightFormat, grouped, with_int8_activations
from mlcgen.targets.base import Linear
from mlcgen.targets.cpu_kernels import embedding, linear

from .cpu_build import (
    EVERY_ISA,
    HAS_BF16_UNITS,
    assert_close,
    build,
    every_float_isa,
    every_isa,
    every_isa_and,
    normal,
    unset,
)
from .reference import random_weight, rms_norm, round_activations, silu_mul

GROUPED = [Q8, Q4, grouped(4, 16), grouped(4, 32, has_minimum=True), grouped(8, 16, has_minimum=True)]
FORMATS = [F32, F16, BF16, *GROUPED]
INT8_FORMATS = [with_int8_activations(fmt) for fmt in GROUPED]
EPS = 1e-5
# One row, blocks of 4 and what remains, the changes of path, register tiles of 2, 4, 6 and 14, two row blocks.
NUM_ROWS = (1, 2, 3, 4, 7, 8, 11, 12, 13, 15, 19, 23, 24, 28, 29, 55, 64, 127, 270)


def check(kernel: Callable[..., None], spec: Linear, num_rows: tuple[int, ...], tolerance: float) -> None:
    n, k, fmt = spec.out_features, spec.in_features, spec.fmt
    rng = np.random.default_rng(n * k)
    stored, matrix = random_weight(fmt, n, k, rng)
    for rows in num_rows:
        x, out = normal(rng, rows, 2 * k if spec.is_gated else k), unset(rows, n)
        norm_weight, bias, residual = normal(rng, k), normal(rng, n), normal(rng, rows, n)
        before = [norm_weight] if spec.norm_eps is not None else []
        after = [*([bias] if spec.has_bias else []), *([residual] if spec.has_residual else [])]
        kernel(x, *before, *stored, *after, out)
        inner = rms_norm(x, norm_weight, EPS) if spec.norm_eps is not None else silu_mul(x) if spec.is_gated else x
        expected = inner.astype(np.float64) @ matrix.T.astype(np.float64)
        if fmt.int8_activations:  # many rows may keep more than 8 bits
            rounded = round_activations(inner, fmt.group) @ matrix.T.astype(np.float64)
            expected = closest(out - sum(after), rounded, expected)
        assert_close(out, sum(after, start=expected), tolerance)


def closest(actual: np.ndarray, *candidates: np.ndarray) -> np.ndarray:
    return min(candidates, key=lambda candidate: np.abs(actual - candidate).max())


@functools.cache
def native(mcpu: str, spec: Linear) -> Callable[..., None]:
    return build(mcpu, lambda isa: linear(spec, isa))


def check_native(mcpu: str, spec: Linear, num_rows: tuple[int, ...]) -> None:
    check(native(mcpu, spec), spec, num_rows, tolerance_of(mcpu, spec.fmt))


def odd(fmt: WeightFormat) -> Linear:
    """6 tiles, the last of 3 columns."""
    return Linear(fmt, 83, 96, has_bias=True)


def tolerance_of(mcpu: str, fmt: WeightFormat) -> float:
    """float32 sums; a value at the border of two steps may round the other way; bfloat16 units round both operands."""
    if fmt.int8_activations:
        return 1e-2 if mcpu in HAS_BF16_UNITS else 2e-3
    return 6e-3 if mcpu in HAS_BF16_UNITS and fmt.name not in ("f32", "f16") else 3e-6


@every_isa_and(FORMATS + INT8_FORMATS)
def test_linear(mcpu: str, fmt: WeightFormat) -> None:
    check_native(mcpu, odd(fmt), NUM_ROWS)


@every_isa_and(GROUPED)
def test_few_rows_are_as_exact_as_float32(mcpu: str, fmt: WeightFormat) -> None:
    check(native(mcpu, odd(fmt)), odd(fmt), (1, 2, 3, 5, 7), 3e-6)


@pytest.mark.parametrize("mcpu", [param for param in EVERY_ISA if param.values[0] in HAS_BF16_UNITS])
@pytest.mark.parametrize("fmt", [BF16, Q4, with_int8_activations(Q8)], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("width", [64, 80])  # pairs of tiles; an odd number of them
def test_linear_in_whole_tiles(mcpu: str, fmt: WeightFormat, width: int) -> None:
    for around in ({"has_bias": True}, {"has_residual": True, "is_gated": True}, {"norm_eps": EPS}):
        rows = (1, 7, 8, 15, 16, 17, 31, 32, 33, 48, 64, 65, 270)
        check_native(mcpu, replace(Linear(fmt, width, 160), **around), rows)


# What makes the rows with each of the units that multiply them; what is added to the sums is the same for all.
AROUND = {
    "norm": ({"norm_eps": EPS}, [Q4]),
    "norm and bias": ({"norm_eps": EPS, "has_bias": True}, [F32, with_int8_activations(Q4)]),
    "gate and residual": ({"is_gated": True, "has_residual": True}, [F32, Q4, with_int8_activations(Q4)]),
    "bias and residual": ({"has_residual": True, "has_bias": True}, [Q4]),
}


@every_isa
@pytest.mark.parametrize(
    ("around", "fmt"),
    [
        pytest.param(around, fmt, id=f"{name}-{fmt.name}")
        for name, (around, formats) in AROUND.items()
        for fmt in formats
    ],
)
def test_what_stands_around_a_linear(mcpu: str, fmt: WeightFormat, around: dict[str, object]) -> None:
    spec = replace(Linear(fmt, 83, 160), **around)
    check_native(mcpu, spec, (1, 3, 13, 30))


@every_isa_and([F32, Q4, with_int8_activations(Q4)])
def test_linear_decodes_long_rows_in_several_panels(mcpu: str, fmt: WeightFormat) -> None:
    width = 32 * 1024 + 32 if fmt.int8_activations else 9216 + 32
    spec = Linear(fmt, 48, width, has_residual=True)  # 3 tiles: the last panel holds one of 2
    check_native(mcpu, spec, (1, 30))


@every_float_isa
def test_linear_of_a_float_format_takes_any_k(mcpu: str) -> None:
    check_native(mcpu, Linear(F32, 16, 37), (1, 5, 26))


@every_isa_and([with_int8_activations(Q4), with_int8_activations(Q8)])
def test_int8_activations_of_zeros_and_of_the_largest_sums(mcpu: str, fmt: WeightFormat) -> None:
    kernel, n, k = native(mcpu, odd(fmt)), odd(fmt).out_features, odd(fmt).in_features
    stored, _ = random_weight(fmt, n, k, np.random.default_rng(0))
    stored[0][...] = 255  # the largest codes
    largest = float((1 << fmt.bits) - 1 - fmt.zero_point)
    for rows in (1, 16):
        for value in (0.0, 3.0, -3.0):
            x, out = np.full((rows, k), value, np.float32), unset(rows, n)
            kernel(x, *stored, np.zeros(n, np.float32), out)
            scales = stored[1].astype(np.float64).sum(1).reshape(1, -1)[:, :n] * 32
            assert_close(out, np.repeat(scales * largest * value, rows, 0), 1e-2 if mcpu in HAS_BF16_UNITS else 1e-5)


@every_isa_and(FORMATS + INT8_FORMATS)
def test_a_value_that_is_not_finite_spoils_its_row_and_no_other(mcpu: str, fmt: WeightFormat) -> None:
    """The engine tells of a broken model by its logits, so no kernel may turn NaN into a number."""
    kernel, n, k = native(mcpu, odd(fmt)), odd(fmt).out_features, odd(fmt).in_features
    stored, _ = random_weight(fmt, n, k, np.random.default_rng(0))
    for rows in (1, 3, 70):
        for value in (np.nan, np.inf, -np.inf):
            for column in (0, 17, k - 1):
                x, out = np.ones((rows, k), np.float32), unset(rows, n)
                x[-1, column] = value
                kernel(x, *stored, np.zeros(n, np.float32), out)
                assert not np.isfinite(out[-1]).any()
                assert np.isfinite(out[:-1]).all()


@every_isa_and(FORMATS)
def test_embedding(mcpu: str, fmt: WeightFormat) -> None:
    rng = np.random.default_rng(5)
    kernel = build(mcpu, lambda isa: embedding(fmt, 50, 96, isa))
    stored, table = random_weight(fmt, 50, 96, rng)
    for rows in (1, 9):
        ids, out = rng.integers(0, 50, rows, dtype=np.int32), unset(rows, 96)
        kernel(ids, *stored, out)
        assert_close(out, table[ids], 1e-7)
