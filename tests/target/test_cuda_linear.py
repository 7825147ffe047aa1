"""linear of the CUDA target under the emulator, against NumPy: every format, few and many tokens, odd sizes."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from mlcgen.formats import BF16, F16, Q4, Q8, WeightFormat, grouped
from mlcgen.targets.base import Linear
from mlcgen.targets.cuda_kernels import linear
from mlcgen.targets.cuda_kernels.code import operand_type

from .cuda_build import as_dtype, as_float, poisoned, relative_error, run
from .emulate_cuda import needs_compiler
from .reference import random_weight, rms_norm, silu_mul

pytestmark = needs_compiler

linear_module = sys.modules["mlcgen.targets.cuda_kernels.linear"]  # the package has a function of this name

EPS = 1e-5
FORMATS = [F16, BF16, Q8, Q4, grouped(4, 32, has_minimum=True), grouped(8, 16), grouped(8, 32, has_minimum=True)]


def check(spec: Linear, num_tokens: tuple[int, ...], out_dtype: str = "float32", x_dtype: str = "") -> None:
    rng = np.random.default_rng([spec.out_features, spec.in_features])
    kernel, operand = linear(spec, "sm_80"), operand_type(spec.fmt)
    stored, matrix = random_weight(spec.fmt, spec.out_features, spec.in_features, rng)
    if not spec.fmt.is_grouped:  # the device holds them row by row
        stored = [np.ascontiguousarray(stored[0].transpose(0, 2, 1).reshape(-1, spec.in_features))]
    x_dtype = x_dtype or ("float32" if spec.norm_eps is not None else operand)
    for n in num_tokens:
        x = rng.standard_normal((n, spec.in_features)).astype(np.float32)
        weight = rng.uniform(0.5, 2, spec.in_features).astype(np.float32)
        bias = rng.standard_normal(spec.out_features).astype(np.float32)
        width = spec.out_features // 2 if spec.gates_result else spec.out_features
        residual = rng.standard_normal((n, width)).astype(np.float32)
        given = as_dtype(x, x_dtype)
        out = poisoned((n, width), out_dtype)
        arrays = [given, *([weight] if spec.norm_eps is not None else []), *stored]
        arrays += [*([bias] if spec.has_bias else []), *([residual] if spec.has_residual else []), out]
        dtypes = [p.dtype for p in kernel.params]
        dtypes[0], dtypes[-1] = x_dtype, out_dtype
        run(kernel, arrays, {"n": n}, dtypes, "descending" if n % 2 else "ascending")
        inner = as_float(given, x_dtype)
        inner = rms_norm(inner, weight, EPS) if spec.norm_eps is not None else inner
        expected = inner.astype(np.float64) @ matrix.T + (bias if spec.has_bias else 0)
        expected = silu_mul(expected) if spec.gates_result else expected
        expected = expected + residual if spec.has_residual else expected
        tolerance = 6e-3 if "bfloat16" in (operand, out_dtype) else 1e-3
        assert relative_error(as_float(out, out_dtype), expected) < tolerance, n


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_linear(fmt: WeightFormat) -> None:
    check(Linear(fmt, 83, 96, has_bias=True), (1, 5, 16, 70))


@pytest.mark.parametrize("fmt", [F16, Q4], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize(
    "around",
    [
        {"norm_eps": EPS},
        {"norm_eps": EPS, "gates_result": True},
        {"gates_result": True, "has_bias": True},
        {"has_residual": True, "has_bias": True},
    ],
    ids=["norm", "norm and gate", "gate and bias", "residual and bias"],
)
def test_what_stands_around_a_linear(fmt: WeightFormat, around: dict[str, bool]) -> None:
    spec = replace(Linear(fmt, 160, 352), **around)
    check(spec, (1, 4, 6), "float32" if spec.has_residual else "float16")


def test_more_tokens_than_a_block_takes_at_once() -> None:
    check(Linear(Q4, 32, 64), (8, 9, 17, 33, 65, 130))


@pytest.mark.parametrize("k", [40, 8, 576])
def test_columns_that_do_not_fill_a_chunk(k: int) -> None:
    check(Linear(F16, 48, k, norm_eps=EPS), (1, 9))
    check(Linear(BF16, 48, k), (3,), "bfloat16")


def test_float32_tokens_are_rounded_by_a_kernel_before() -> None:
    check(Linear(Q8, 32, 64), (1, 3), x_dtype="float32")


@pytest.mark.parametrize("fmt", [Q4, Q8, grouped(4, 32, has_minimum=True)], ids=lambda fmt: fmt.name)
def test_bulk_copies(fmt: WeightFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "BULK_ARCHS", ("sm_80",))
    check(Linear(fmt, 96, 800, norm_eps=EPS, gates_result=True), (1, 3))
    check(Linear(fmt, 80, 320, has_residual=True), (4,))
