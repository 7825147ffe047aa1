"""Norms and the SwiGLU gate of the CPU target, against NumPy."""

import numpy as np
import pytest

from mlcgen.targets.cpu_kernels import add_rms_norm, rms_norm, silu_mul

from .cpu_build import assert_close, build, compiles_for_aarch64, every_isa, normal, unset
from .reference import rms_norm as rms_norm_reference
from .reference import silu_mul as silu_mul_reference

EPS = 1e-5
WIDTHS = [576, 50, 7]  # whole vectors; a narrower last one; less than a vector


@every_isa
@pytest.mark.parametrize("hidden", WIDTHS)
def test_rms_norm(mcpu: str, hidden: int) -> None:
    rng = np.random.default_rng(hidden)
    kernel = build(mcpu, lambda isa: rms_norm(hidden, EPS, isa))
    for rows in (1, 5):
        x, weight, out = normal(rng, rows, hidden), normal(rng, hidden), unset(rows, hidden)
        kernel(x, weight, out)
        assert_close(out, rms_norm_reference(x, weight, EPS), 5e-7)


@every_isa
@pytest.mark.parametrize("hidden", WIDTHS)
def test_add_rms_norm(mcpu: str, hidden: int) -> None:
    rng = np.random.default_rng(hidden)
    kernel = build(mcpu, lambda isa: add_rms_norm(hidden, EPS, isa))
    for rows in (1, 5):
        x, residual, weight = normal(rng, rows, hidden), normal(rng, rows, hidden), normal(rng, hidden)
        out_sum, out_norm = unset(rows, hidden), unset(rows, hidden)
        kernel(x, residual, weight, out_sum, out_norm)
        np.testing.assert_array_equal(out_sum, x + residual)
        assert_close(out_norm, rms_norm_reference(x + residual, weight, EPS), 5e-7)


def test_rms_norm_of_zeros_is_zero() -> None:
    kernel, out = build("x86-64", lambda isa: rms_norm(48, EPS, isa)), unset(1, 48)
    kernel(np.zeros((1, 48), np.float32), np.ones(48, np.float32), out)
    np.testing.assert_array_equal(out, 0)


@every_isa
@pytest.mark.parametrize("features", WIDTHS)
def test_silu_mul(mcpu: str, features: int) -> None:
    rng = np.random.default_rng(features)
    kernel = build(mcpu, lambda isa: silu_mul(features, isa))
    for rows in (1, 5):
        gate_up, out = normal(rng, rows, 2 * features), unset(rows, features)
        kernel(gate_up, out)
        assert_close(out, silu_mul_reference(gate_up), 5e-7)


@every_isa
def test_exponential_keeps_its_accuracy_and_saturates(mcpu: str) -> None:
    """silu(gate) * 1 = gate * sigmoid(gate): relative error over the whole range of the gate."""
    gate = np.linspace(-200, 200, 4096, dtype=np.float32)[None]
    kernel, out = build(mcpu, lambda isa: silu_mul(4096, isa)), unset(1, 4096)
    kernel(np.concatenate([gate, np.ones_like(gate)], axis=1), out)
    inside = gate > -80
    with np.errstate(over="ignore"):
        expected = silu_mul_reference(np.concatenate([gate, np.ones_like(gate)], axis=1))
    np.testing.assert_allclose(out[inside], expected[inside], rtol=5e-7, atol=1e-30)
    assert np.all(np.abs(out[~inside]) < 1e-30)


def test_aarch64() -> None:
    compiles_for_aarch64(
        [lambda isa: rms_norm(50, EPS, isa), lambda isa: add_rms_norm(50, EPS, isa), lambda isa: silu_mul(50, isa)]
    )
