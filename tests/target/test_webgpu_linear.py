"""linear of WebGPU's devices against NumPy: every format, few and many tokens, odd sizes."""

from dataclasses import replace

import numpy as np
import pytest

from mlcgen.errors import UnsupportedError
from mlcgen.formats import BF16, F16, F32, Q4, Q8, WeightFormat, grouped
from mlcgen.targets.base import Linear
from mlcgen.targets.webgpu_kernels import code, linear

from .reference import random_weight, rms_norm, silu_mul
from .webgpu_build import has_f16, relative_error, run

EPS = 1e-5
FORMATS = [F32, F16, BF16, Q8, Q4, grouped(4, 64, has_minimum=True), grouped(8, 16, has_minimum=True)]
each_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)


def check(spec: Linear, num_tokens: tuple[int, ...], has_f16: int = 0, error: float = 2e-6) -> list[str]:
    """The last function that ran for each number of tokens."""
    kernel, names = linear(spec), []
    rng = np.random.default_rng([spec.out_features, spec.in_features])
    stored, matrix = random_weight(spec.fmt, spec.out_features, spec.in_features, rng)
    width = spec.out_features // 2 if spec.gates_result else spec.out_features
    for n in num_tokens:
        x = rng.standard_normal((n, spec.in_features)).astype(np.float32)
        weight = rng.uniform(0.5, 2, spec.in_features).astype(np.float32)
        bias = rng.standard_normal(spec.out_features).astype(np.float32)
        residual = rng.standard_normal((n, width)).astype(np.float32)
        out = np.full((n, width), np.nan, np.float32)
        arrays = [x, *([weight] if spec.norm_eps is not None else []), *stored]
        arrays += [*([bias] if spec.has_bias else []), *([residual] if spec.has_residual else []), out]
        names.append(run(kernel, arrays, {"n": n, "has_f16": has_f16})[-1])
        inner = rms_norm(x, weight, EPS) if spec.norm_eps is not None else x
        expected = inner.astype(np.float64) @ matrix.T + (bias if spec.has_bias else 0)
        expected = silu_mul(expected) if spec.gates_result else expected
        expected = expected + residual if spec.has_residual else expected
        assert relative_error(out, expected) < error, n
    return names


@each_format
def test_linear(fmt: WeightFormat) -> None:
    """83 rows fill no tile, 192 columns no whole number of rounds."""
    num_tokens = (1, 2, 8, 9, 32, 33, 130) if fmt == Q4 else (1, 3, 70)
    names = check(Linear(fmt, 83, 192, has_bias=True), num_tokens)
    if fmt == Q4:
        assert [name.split("_")[1] for name in names] == ["1", "4", "4", "4", "4", "64", "64"]


@pytest.mark.parametrize("fmt", [F16, Q8, Q4, grouped(8, 16, has_minimum=True)], ids=lambda fmt: fmt.name)
def test_half_precision(fmt: WeightFormat) -> None:
    """Sums of 32 columns are rounded to 11 bits."""
    if not has_f16():
        pytest.skip("this device has no f16")
    names = check(Linear(fmt, 168, 224, has_bias=True, gates_result=True), (33, 64, 130), 1, 2e-3)
    assert all(name.startswith("linear_64_half_") for name in names)
    check(Linear(fmt, 83, 192, norm_eps=EPS, has_residual=True), (40, 70), 1, 2e-3)


@pytest.mark.parametrize("fmt", [BF16, Q4], ids=lambda fmt: fmt.name)
def test_more_rows_than_a_buffer_may_hold(fmt: WeightFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches of 128 rows and fewer make the product together."""
    spec = Linear(fmt, 403, 224, norm_eps=EPS, has_bias=True, has_residual=True)
    monkeypatch.setattr(code, "MOST_BYTES", 140 * 224 * fmt.bits // 8)
    names = check(spec, (1, 5, 70))
    kernel = linear(spec).generate([])
    assert [len(variant.launches) for variant in kernel.variants[:3]] == [4, 4, 5]  # the last one's norm comes first
    assert len(set(names)) == 3
    assert len(linear(replace(spec, out_features=416, gates_result=True)).generate([]).variants[0].launches) == 1


def test_bfloat16_stays_in_single_precision() -> None:
    """Half precision has no room for its exponents."""
    assert check(Linear(BF16, 16, 64), (40, 130), 1) == ["linear_64_bf16_16x64"] * 2


@pytest.mark.parametrize(
    ("fmt", "around"),
    [
        (grouped(4, 32, has_minimum=True), {"norm_eps": EPS, "has_residual": True, "has_bias": True}),  # 8 buffers
        (Q4, {"norm_eps": EPS, "gates_result": True, "has_bias": True}),
        (F16, {"norm_eps": EPS, "gates_result": True, "has_residual": True}),
        (F16, {"has_residual": True, "has_bias": True}),
    ],
    ids=["norm, residual and bias", "norm, gate and bias", "norm, gate and residual", "residual and bias"],
)
def test_what_stands_around_a_linear(fmt: WeightFormat, around: dict[str, object]) -> None:
    """168 rows: gate and up are 84 each, and so begin at other rows of a tile."""
    check(replace(Linear(fmt, 168, 352), **around), (1, 5, 40))


def test_columns_that_do_not_fill_a_tile() -> None:
    check(Linear(BF16, 48, 40, norm_eps=EPS), (1, 9, 40))
    check(Linear(BF16, 48, 8), (9, 40))


def test_more_columns_than_a_round_of_256_invocations() -> None:
    check(Linear(Q8, 16, 2080, norm_eps=EPS), (2,))


def test_small_and_large_tokens_under_a_norm() -> None:
    rng = np.random.default_rng(2)
    stored, matrix = random_weight(F16, 32, 64, rng)
    x = rng.standard_normal((3, 64)).astype(np.float32) * np.array([[1], [1e-4], [300]], np.float32)
    weight, out = np.ones(64, np.float32), np.full((3, 32), np.nan, np.float32)
    run(linear(Linear(F16, 32, 64, norm_eps=EPS)), [x, weight, *stored, out], {"n": 3})
    for token, expected in zip(out, rms_norm(x, weight, EPS) @ matrix.T, strict=True):
        assert relative_error(token, expected) < 2e-6


def test_sizes_that_there_is_no_kernel_for() -> None:
    with pytest.raises(UnsupportedError, match="not 41"):
        linear(Linear(Q4, 82, 64, gates_result=True))
    with pytest.raises(UnsupportedError, match="gates_results"):
        linear(Linear(Q4, 64, 64, is_gated=True))
