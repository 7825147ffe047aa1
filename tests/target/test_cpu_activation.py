"""The RMS norm and the SwiGLU gate before a product, alone: the product is with the identity matrix."""

from collections.abc import Callable

import numpy as np
import pytest

from mlcgen.formats import F32, TILE
from mlcgen.targets.base import Linear
from mlcgen.targets.cpu_kernels import linear

from .cpu_build import assert_close, build, every_float_isa, normal, unset
from .reference import rms_norm, silu_mul

EPS = 1e-5
every_width = pytest.mark.parametrize("width", [576, 50, 7])  # whole vectors; a narrower last one; less than a vector


def alone(mcpu: str, width: int, **before: object) -> Callable[..., np.ndarray]:
    kernel = build(mcpu, lambda isa: linear(Linear(F32, width, width, **before), isa))
    tiles = -(-width // TILE)
    identity = np.zeros((tiles, width, TILE), np.float32)
    identity[np.arange(width) // TILE, np.arange(width), np.arange(width) % TILE] = 1

    def run(x: np.ndarray, *norm_weight: np.ndarray) -> np.ndarray:
        out = unset(len(x), width)
        kernel(x, *norm_weight, identity, out)
        return out

    return run


@every_float_isa
@every_width
def test_rms_norm(mcpu: str, width: int) -> None:
    rng = np.random.default_rng(width)
    run = alone(mcpu, width, norm_eps=EPS)
    for rows in (1, 5, 30):
        x, weight = normal(rng, rows, width), normal(rng, width)
        assert_close(run(x, weight), rms_norm(x, weight, EPS), 5e-7)


def test_rms_norm_of_zeros_is_zero() -> None:
    out = alone("x86-64", 48, norm_eps=EPS)(np.zeros((1, 48), np.float32), np.ones(48, np.float32))
    np.testing.assert_array_equal(out, 0)


@every_float_isa
@every_width
def test_silu_mul(mcpu: str, width: int) -> None:
    rng = np.random.default_rng(width)
    run = alone(mcpu, width, is_gated=True)
    for rows in (1, 5, 30):
        gate_up = normal(rng, rows, 2 * width)
        assert_close(run(gate_up), silu_mul(gate_up), 5e-7)


@every_float_isa
def test_exponential_keeps_its_accuracy_and_saturates(mcpu: str) -> None:
    """silu(gate) * 1 = gate * sigmoid(gate): relative error over the whole range of the gate."""
    gate = np.linspace(-200, 200, 1024, dtype=np.float32)[None]
    gate_up = np.concatenate([gate, np.ones_like(gate)], axis=1)
    out = alone(mcpu, 1024, is_gated=True)(gate_up)
    inside = gate > -80
    with np.errstate(over="ignore"):
        expected = silu_mul(gate_up)
    np.testing.assert_allclose(out[inside], expected[inside], rtol=5e-7, atol=1e-30)
    assert np.all(np.abs(out[~inside]) < 1e-30)
