"""Runs the kernels of the CUDA target under the emulator, as a launch plan would."""

from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np

from mlcgen.runtime.sizes import evaluate
from mlcgen.targets.device_kernel import DeviceKernel, Launch

from .emulate_cuda import Argument, Order, compile_kernel

BITS = {"bfloat16": np.uint16}  # NumPy's arrays of bfloat16 are their bits


def run(
    kernel: DeviceKernel,
    arrays: Sequence[np.ndarray],
    symbols: Mapping[str, int],
    dtypes: Sequence[str] | None = None,
    order: Order = "ascending",
) -> list[str]:
    """Launch a kernel on its arguments, outputs included; returns the names of the functions that ran."""
    code = kernel.generate(dtypes or [p.dtype for p in kernel.params])
    variant = next(v for v in code.variants if evaluate(v.when, symbols))
    scratch = np.full(max(evaluate(code.scratch, symbols), 16), 0xFF, np.uint8)
    counters = np.zeros(max(evaluate(code.counters, symbols) // 4, 4), np.uint32)
    includes = "".join(f'#include "{name}"\n' for name in code.includes)
    for launch in variant.launches:
        emulated = compile_kernel(includes + code.functions[launch.function], launch.function)
        grid = tuple(evaluate(size, symbols) for size in launch.grid)
        args = _arguments(launch, arrays, scratch, counters, symbols)
        emulated(grid, launch.block, args, evaluate(launch.shared, symbols), order)
    assert not counters.any()
    return [launch.function for launch in variant.launches]


def _arguments(
    launch: Launch,
    arrays: Sequence[np.ndarray],
    scratch: np.ndarray,
    counters: np.ndarray,
    symbols: Mapping[str, int],
) -> list[Argument]:
    args: list[Argument] = []
    for kind, value in launch.args:
        if kind == "tensor":
            args.append(arrays[value])
        elif kind == "scratch":
            args.append(scratch[evaluate(value, symbols) :])
        elif kind in ("counters", "null"):
            args.append(counters if kind == "counters" else None)
        else:
            args.append(np.float32(value) if kind == "float32" else np.dtype(kind).type(evaluate(value, symbols)))
    return args


def as_dtype(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values in a kernel's type."""
    if dtype == "bfloat16":
        return values.astype(ml_dtypes.bfloat16).view(np.uint16)
    return np.ascontiguousarray(values.astype(dtype))


def as_float(array: np.ndarray, dtype: str) -> np.ndarray:
    return (array.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else array).astype(np.float32)


def poisoned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return as_dtype(np.full(shape, np.nan, np.float32), dtype)


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """||actual - expected|| / ||expected||; infinite for a NaN."""
    error = np.linalg.norm(actual.astype(np.float64) - expected) / np.linalg.norm(expected)
    return float(error) if np.isfinite(error) else float("inf")
