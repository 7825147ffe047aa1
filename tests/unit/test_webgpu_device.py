"""WebgpuDevice on whatever device is there: memory, order, recorded steps, and what it refuses."""

import ctypes
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mlcgen.errors import ArtifactError, DeviceError, TargetError
from mlcgen.runtime import webgpu
from mlcgen.runtime.webgpu import LAUNCHES, WebgpuDevice

needs_device = pytest.mark.skipif(webgpu.missing() is not None, reason=str(webgpu.missing()))

# y[i] = x[i] * factor + offset, for the first n.
SCALE = """
@group(0) @binding(0) var<storage, read_write> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;
struct Numbers { n: i32, factor: f32, offset: f32 }
@group(0) @binding(2) var<uniform> numbers: Numbers;
@compute @workgroup_size(64)
fn scale(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let i = group.x * 64u + thread;
  if (i < u32(numbers.n)) { y[i] = x[i] * numbers.factor + numbers.offset; }
}
"""
DOUBLE = """
@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;
@compute @workgroup_size(1)
fn double(@builtin(workgroup_id) group: vec3<u32>) { y[group.x] = 2.0 * x[group.x]; }
"""
BROKEN = "@compute @workgroup_size(1) fn broken() { let x: i32 = 1.5; }"


@pytest.fixture(scope="module")
def device() -> Iterator[WebgpuDevice]:
    device = WebgpuDevice()
    texts = {"scale": SCALE, "double": DOUBLE, "broken": BROKEN}
    device.load(json.dumps(texts).encode(), list(texts))
    yield device
    device.synchronize()


def held(device: WebgpuDevice, values: np.ndarray, room: int = 0) -> int:
    address = device.allocate(values.nbytes + room, "tests")
    device.upload(address, values)
    return address


def read(device: WebgpuDevice, address: int, count: int) -> np.ndarray:
    found = np.full(count, np.nan, np.float32)
    device.download(found, address)
    device.synchronize()
    return found


def scale(device: WebgpuDevice, x: int, y: int, n: int, factor: float, offset: float = 0.0) -> None:
    args = [ctypes.c_uint64(x), ctypes.c_uint64(y), ctypes.c_int32(n), ctypes.c_float(factor), ctypes.c_float(offset)]
    device.launch("scale", (-(-n // 64), 1, 1), 64, 0, args)


def random(count: int) -> np.ndarray:
    return np.random.default_rng().standard_normal(count).astype(np.float32)


@needs_device
def test_memory_starts_as_zeros_and_keeps_what_it_is_given(device: WebgpuDevice) -> None:
    values = random(1000)
    address = device.allocate(8000, "tests")
    assert address % 256 == 0
    assert not read(device, address, 2000).any()
    device.upload(address + 4000, values)
    np.testing.assert_array_equal(read(device, address, 2000), np.concatenate([np.zeros(1000, np.float32), values]))


@needs_device
def test_odd_sizes(device: WebgpuDevice) -> None:
    """WebGPU copies whole words; what pads the last one may not reach past the array's memory."""
    data = np.arange(7, dtype=np.uint8)
    address = device.allocate(7, "tests")
    device.upload(address, data)
    found = np.zeros(7, np.uint8)
    device.download(found, address)
    device.synchronize()
    np.testing.assert_array_equal(found, data)


@needs_device
def test_several_downloads(device: WebgpuDevice) -> None:
    """The last of them needs more room than the first ones had."""
    arrays = [random(n) for n in (3, 100, 5000)]
    addresses = [held(device, array) for array in arrays]
    found = [np.zeros_like(array) for array in arrays]
    for to, address in zip(found, addresses, strict=True):
        device.download(to, address)
    device.synchronize()
    for to, array in zip(found, arrays, strict=True):
        np.testing.assert_array_equal(to, array)


@needs_device
@pytest.mark.parametrize("count", [1, 600])
def test_copies_within_the_device(device: WebgpuDevice, count: int) -> None:
    """Also within one buffer; what is uploaded afterwards is not copied."""
    values = random(count)
    address, other = held(device, values, room=4 * count + 2560), device.allocate(4 * count, "tests")
    device.copy(address + 2560, address, 4 * count)
    device.copy(other, address, 4 * count)
    device.upload(address, np.zeros(count, np.float32))
    np.testing.assert_array_equal(read(device, address + 2560, count), values)
    np.testing.assert_array_equal(read(device, other, count), values)
    assert not read(device, address, count).any()


@needs_device
def test_marks(device: WebgpuDevice) -> None:
    """Two steps under way, each with its copies, again and again; what comes after the marks is not lost."""
    address, found = held(device, np.zeros(2, np.float32)), np.zeros((2, 2), np.float32)
    with device.capture() as graph:
        scale(device, address, address, 2, 1.0, 1.0)
    device.launch_graph(graph)
    device.download(found[0], address)
    device.mark(0)
    for step in range(1, 6):
        device.launch_graph(graph)
        device.download(found[step % 2], address)
        device.mark(step % 2)
        device.wait(1 - step % 2)
        assert (found[1 - step % 2] == step).all()
    last = np.zeros(2, np.float32)
    device.download(last, address)
    device.synchronize()
    assert (last == 6).all()
    assert (found[1] == 6).all(), "also those of marks"
    device.wait(1)  # there is nothing to wait for


@needs_device
@pytest.mark.parametrize("n", [1, 64, 1000])
def test_launch(device: WebgpuDevice, n: int) -> None:
    x = random(n)
    source, to = held(device, x), device.allocate(4 * n + 4, "tests")
    scale(device, source, to, n, 3.0, 1.0)
    np.testing.assert_allclose(read(device, to, n + 1), [*(x * 3 + 1), 0], rtol=1e-6)


@needs_device
def test_addresses_inside_of_an_allocation(device: WebgpuDevice) -> None:
    x = random(256)
    source, to = held(device, x), device.allocate(2048, "tests")
    scale(device, source + 512, to + 256, 64, 1.0)
    found = read(device, to, 512)
    np.testing.assert_array_equal(found[64:128], x[128:192])
    assert not found[:64].any()
    assert not found[128:].any()


@needs_device
def test_copies_and_launches_keep_their_order(device: WebgpuDevice) -> None:
    a, b = random(64), random(64)
    source, first, second = held(device, a), device.allocate(256, "tests"), device.allocate(256, "tests")
    scale(device, source, first, 64, 2.0)
    device.upload(source, b)  # the launch before has seen `a`
    scale(device, source, second, 64, 2.0)
    scale(device, second, source, 64, 2.0)
    np.testing.assert_allclose(read(device, first, 64), 2 * a)
    np.testing.assert_allclose(read(device, second, 64), 2 * b)
    np.testing.assert_allclose(read(device, source, 64), 4 * b)


@needs_device
def test_more_launches_than_are_handed_over_at_once(device: WebgpuDevice) -> None:
    address = held(device, np.zeros(1, np.float32))
    for _ in range(LAUNCHES + 3):
        scale(device, address, address, 1, 1.0, 1.0)
    assert read(device, address, 1) == LAUNCHES + 3


@needs_device
def test_a_graph(device: WebgpuDevice) -> None:
    """It copies what its arrays hold when it is launched, and has numbers of its own."""
    host = random(64)
    source, middle, to = (device.allocate(256, "tests") for _ in range(3))
    with device.capture() as graph:
        device.upload(source, host)
        scale(device, source, middle, 64, 2.0)
        scale(device, middle, to, 64, 1.0, 1.0)
    assert not read(device, to, 64).any(), "recorded, not run"
    for _ in range(3):
        host[:] = random(64)
        device.launch_graph(graph)
        scale(device, source, middle, 64, 7.0)  # between two launches of it, other numbers
        np.testing.assert_allclose(read(device, to, 64), 2 * host + 1, rtol=1e-6)
    device.launch_graph(graph)
    device.launch_graph(graph)  # before the first has been waited for
    np.testing.assert_allclose(read(device, to, 64), 2 * host + 1, rtol=1e-6)


@needs_device
def test_free(device: WebgpuDevice) -> None:
    before, freed, after = (held(device, np.full(4, value, np.float32)) for value in (1, 2, 3))
    device.free(freed)
    assert read(device, before, 1) == 1
    assert read(device, after, 1) == 3
    with pytest.raises(DeviceError, match="is no memory of this device"):
        read(device, freed, 1)


@needs_device
def test_kernels_that_are_none(device: WebgpuDevice) -> None:
    with pytest.raises(DeviceError, match="does not take the kernel broken"):
        device.launch("broken", (1, 1, 1), 1, 0, [])
    address = ctypes.c_uint64(held(device, random(4)))
    number = ctypes.c_int32(1)
    for args in ([address], [address] * 3, [address, address, number], []):
        with pytest.raises(DeviceError, match="gives the kernel double other arguments"):
            device.launch("double", (1, 1, 1), 1, 0, args)


@needs_device
def test_larger_than_any_buffer(device: WebgpuDevice) -> None:
    with pytest.raises(DeviceError, match=r"no room for the weights: 1048576.00 GiB wanted, .*quantize further"):
        device.allocate(1 << 50, "weights")
    with pytest.raises(DeviceError, match=r"no room for the KV pages: .*lower num_pages"):
        device.allocate(1 << 50, "KV pages")


@needs_device
def test_two_modules_with_a_function_of_one_name() -> None:
    device, values = WebgpuDevice(), random(8)
    device.load(json.dumps({"double": DOUBLE}).encode(), ["double"])
    device.load(json.dumps({"double": DOUBLE.replace("2.0", "3.0")}).encode(), ["double"], "second:")
    x, y = held(device, values), device.allocate(values.nbytes, "tests")
    for name, factor in (("second:double", 3), ("double", 2)):
        device.launch(name, (8, 1, 1), 1, 0, [ctypes.c_uint64(x), ctypes.c_uint64(y)])
        np.testing.assert_array_equal(read(device, y, 8), np.float32(factor) * values)


@needs_device
@pytest.mark.parametrize("module", [b"", b"[]", b"{}", b'{"scale": 5, "double": ""}', b"\xff"])
def test_modules_that_are_none(module: bytes) -> None:
    with pytest.raises(ArtifactError, match="compile"):
        WebgpuDevice().load(module, ["scale", "double"])


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    webgpu._adapter.cache_clear()
    monkeypatch.setitem(sys.modules, "wgpu", None)
    assert webgpu.missing() == "the package wgpu is not installed: pip install 'mlcgen[vulkan]'"
    assert webgpu.adapter() is None
    with pytest.raises(TargetError, match="wgpu is not installed"):
        WebgpuDevice()


def test_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu:
        @staticmethod
        def request_adapter_sync(**options: Any) -> Any:
            raise RuntimeError("no adapter")

    wgpu = pytest.importorskip("wgpu")
    webgpu._adapter.cache_clear()
    monkeypatch.setattr(wgpu, "gpu", Gpu)
    assert webgpu.missing() == (
        "WebGPU finds no device: no adapter; install a Vulkan driver (Debian: mesa-vulkan-drivers libvulkan1)"
    )
    monkeypatch.undo()
    webgpu._adapter.cache_clear()
