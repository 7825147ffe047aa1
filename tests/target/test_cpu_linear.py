"""linear and embedding of the CPU target, against NumPy: every format, few and many rows, sizes off the tiles."""

import numpy as np
import pytest

from mlcgen.formats import BF16, F16, F32, Q4, Q8, WeightFormat, grouped
from mlcgen.targets.cpu_kernels import embedding, linear

from .cpu_build import assert_close, build, compiles_for_aarch64, every_isa, normal, unset
from .reference import random_weight

FORMATS = [F32, F16, BF16, Q8, Q4, grouped(4, 16), grouped(4, 32, has_minimum=True), grouped(8, 16, has_minimum=True)]
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
# One row, blocks of 4 and what remains, the change of path at 24, register tiles of 2, 6 and 14, two row blocks.
NUM_ROWS = (1, 2, 3, 4, 7, 23, 24, 28, 29, 55, 127, 270)


def check(mcpu: str, fmt: WeightFormat, n: int, k: int, bias: bool, num_rows: tuple[int, ...]) -> None:
    rng = np.random.default_rng(n * k)
    kernel = build(mcpu, lambda isa: linear(fmt, n, k, isa, bias))
    stored, matrix = random_weight(fmt, n, k, rng)
    for rows in num_rows:
        x, b, out = normal(rng, rows, k), normal(rng, n), unset(rows, n)
        kernel(x, *stored, *([b] if bias else []), out)
        expected = x.astype(np.float64) @ matrix.T.astype(np.float64)
        assert_close(out, expected + b if bias else expected)


@every_isa
@every_format
def test_linear(mcpu: str, fmt: WeightFormat) -> None:
    check(mcpu, fmt, n=83, k=96, bias=True, num_rows=NUM_ROWS)  # 6 tiles, the last of 3 columns


@every_isa
@pytest.mark.parametrize("fmt", [F32, Q4], ids=lambda fmt: fmt.name)
def test_linear_decodes_long_rows_in_several_panels(mcpu: str, fmt: WeightFormat) -> None:
    check(mcpu, fmt, n=40, k=9216 + 32, bias=True, num_rows=(1, 30))  # 3 tiles: the last panel holds one of 2


@every_isa
def test_linear_of_a_float_format_takes_any_k(mcpu: str) -> None:
    check(mcpu, F32, n=16, k=37, bias=False, num_rows=(1, 5, 26))


@every_isa
@every_format
def test_embedding(mcpu: str, fmt: WeightFormat) -> None:
    rng = np.random.default_rng(5)
    kernel = build(mcpu, lambda isa: embedding(fmt, 50, 96, isa))
    stored, table = random_weight(fmt, 50, 96, rng)
    for rows in (1, 9):
        ids, out = rng.integers(0, 50, rows, dtype=np.int32), unset(rows, 96)
        kernel(ids, *stored, out)
        assert_close(out, table[ids], 1e-7)


def test_aarch64() -> None:
    compiles_for_aarch64(
        [lambda isa, fmt=fmt: linear(fmt, 83, 96, isa, bias=True) for fmt in (F16, BF16, Q4, Q8)]
        + [lambda isa, fmt=fmt: embedding(fmt, 50, 96, isa) for fmt in (F16, Q4)]
    )
