"""Runs the WGSL kernels through wgpu, as a launch plan would, on whatever device is there."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from mlcgen.runtime.sizes import evaluate
from mlcgen.targets.device_kernel import Code, DeviceKernel, Launch

BUFFERS = ("tensor", "part", "scratch")  # kinds of arguments; no kernel here has counters
# What WebGPU promises of every device: with these, modules that need more are refused.
DEFAULT_LIMITS = {
    "max-storage-buffers-per-shader-stage": 8,
    "max-compute-workgroup-storage-size": 16384,
    "max-compute-invocations-per-workgroup": 256,
    "max-compute-workgroup-size-x": 256,
}
GUARD = 64  # words behind each array, which no kernel may change


def _device() -> Any:
    """Of this session; the test is skipped, with the reason, where nothing runs WGSL."""
    device, reason = _find_device()
    return device or pytest.skip(reason)


@functools.cache
def _find_device() -> tuple[Any, str]:
    try:
        import wgpu

        adapter = wgpu.gpu.request_adapter_sync(power_preference="high-performance")
        features = ["shader-f16"] if "shader-f16" in adapter.features else []
        return adapter.request_device_sync(required_features=features, required_limits=DEFAULT_LIMITS), ""
    except ImportError:
        return None, "wgpu is not installed"
    except RuntimeError as error:
        return None, f"wgpu finds no adapter: {error}"


@functools.cache
def _generated(kernel: DeviceKernel) -> Code:
    return kernel.generate([p.dtype for p in kernel.params])


@functools.cache
def _pipeline(text: str, name: str) -> Any:
    device = _device()
    module = device.create_shader_module(code=text)
    return device.create_compute_pipeline(layout="auto", compute={"module": module, "entry_point": name})


def has_f16() -> bool:
    return "shader-f16" in _device().features


def run(kernel: DeviceKernel, arrays: Sequence[np.ndarray], symbols: Mapping[str, int]) -> list[str]:
    """Launch a kernel on its arguments, outputs included; returns the names of the functions that ran."""
    device = _device()
    import wgpu

    symbols = {"has_f16": 0, **symbols}
    code = _generated(kernel)
    variant = next(v for v in code.variants if evaluate(v.when, symbols))
    usage = wgpu.BufferUsage.STORAGE | wgpu.BufferUsage.COPY_SRC
    tensors = [device.create_buffer_with_data(data=_guarded(array), usage=usage) for array in arrays]
    scratch_words = np.full(max(evaluate(code.scratch, symbols) // 4, 4), np.nan, np.float32)
    scratch = device.create_buffer_with_data(data=scratch_words, usage=usage)
    encoder = device.create_command_encoder()
    for launch in variant.launches:
        pipeline = _pipeline(code.functions[launch.function], launch.function)
        resources = [_resource(arg, tensors, scratch) for arg in launch.args if arg[0] in BUFFERS]
        resources += [{"buffer": b, "offset": 0, "size": b.size} for b in _numbers(device, launch, symbols)]
        entries = [{"binding": i, "resource": resource} for i, resource in enumerate(resources)]
        group = device.create_bind_group(layout=pipeline.get_bind_group_layout(0), entries=entries)
        grid = [evaluate(size, symbols) for size in launch.grid]
        assert max(grid) <= 65535, launch.function
        compute = encoder.begin_compute_pass()
        compute.set_pipeline(pipeline)
        compute.set_bind_group(0, group)
        compute.dispatch_workgroups(*grid)
        compute.end()
    device.queue.submit([encoder.finish()])
    for array, buffer in zip(arrays, tensors, strict=True):
        _read(buffer, array)
    return [launch.function for launch in variant.launches]


def _resource(arg: Sequence[Any], tensors: Sequence[Any], scratch: Any) -> dict[str, Any]:
    kind, value = arg
    if kind == "part":
        index, offset, size = value
        assert offset + size <= tensors[index].size - 4 * GUARD
        return {"buffer": tensors[index], "offset": offset, "size": size}
    buffer = tensors[value] if kind == "tensor" else scratch
    return {"buffer": buffer, "offset": 0, "size": buffer.size}


def _guarded(array: np.ndarray) -> np.ndarray:
    assert array.flags.c_contiguous
    data = array.view(np.uint8).reshape(-1)
    return np.concatenate([data, np.full(-len(data) % 4 + 4 * GUARD, 0xA5, np.uint8)])


def _read(buffer: Any, array: np.ndarray) -> None:
    device = _device()
    data = np.frombuffer(device.queue.read_buffer(buffer), np.uint8)
    assert (data[array.nbytes :] == 0xA5).all(), "a kernel wrote behind an array"
    array.reshape(-1).view(np.uint8)[:] = data[: array.nbytes]


def _numbers(device: Any, launch: Launch, symbols: Mapping[str, int]) -> list[Any]:
    """The uniform buffer of a launch, if it takes numbers."""
    import wgpu

    words = b""
    for kind, value in launch.args:
        if kind == "float32":
            words += np.float32(value).tobytes()
        elif kind not in BUFFERS:
            words += np.dtype(kind).type(evaluate(value, symbols)).tobytes()
    if not words:
        return []
    words += bytes(-len(words) % 16)
    return [device.create_buffer_with_data(data=words, usage=wgpu.BufferUsage.UNIFORM)]


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """||actual - expected|| / ||expected||; infinite for a NaN."""
    error = np.linalg.norm(actual.astype(np.float64) - expected) / np.linalg.norm(expected)
    return float(error) if np.isfinite(error) else float("inf")
