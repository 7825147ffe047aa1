"""CudaDevice, and what stands on it, with a driver that needs no GPU."""

import base64
import ctypes
import gc
import os
import re
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mlcgen.errors import DeviceError, TargetError
from mlcgen.runtime import cuda, device_weights, target_choice
from mlcgen.runtime.cuda import CudaDevice
from mlcgen.runtime.device_weights import make_random_weights, upload_weights
from mlcgen.runtime.load_plan import load_plan
from mlcgen.runtime.target_choice import cannot_run, choose_target, not_taken

from .cuda_driver import FakeDriver, install, replace_loader

MODULE = b"add(8,8,4) plain small(8)+1024 mapped(128,8)"
OVERLAPPING = " 6=1"


# cuda.py keeps some of what it took; remove the marks together with the reason.
@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeDriver:
    return install(monkeypatch, tmp_path)


@pytest.fixture
def device(driver: FakeDriver) -> CudaDevice:
    return CudaDevice()


def test_the_fake_has_what_is_used(driver: FakeDriver) -> None:
    used = set(re.findall(r"\.(cu[A-Z]\w+)", Path(cuda.__file__).read_text()))
    assert len(used) > 30
    assert [name for name in used if not hasattr(cuda._driver(), name)] == []


# The device


def test_what_the_device_is(driver: FakeDriver) -> None:
    driver.set(arch=120, memory=1 << 40)
    device = CudaDevice()
    assert device.name == "Fake GPU 120"
    assert device.memory() == (1 << 40, 1 << 40)
    assert cuda.compute_capability() == "sm_120"
    assert cuda.missing() is None


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_loader(monkeypatch, {})
    assert cuda.compute_capability() is None
    assert cuda.missing() == "no NVIDIA driver (libcuda.so.1) is installed"
    with pytest.raises(TargetError, match=r"no NVIDIA driver \(libcuda.so.1\) is installed; run on another target"):
        CudaDevice()


def test_no_gpu(driver: FakeDriver) -> None:
    driver.set(devices=0)
    assert cuda.compute_capability() is None
    with pytest.raises(TargetError, match="the NVIDIA driver finds no GPU; run on another target"):
        CudaDevice()


def test_a_driver_that_does_not_start(driver: FakeDriver) -> None:
    driver.fail("cuInit", 803)
    assert cuda.compute_capability() is None
    driver.fail("cuInit", 803)
    assert "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH (803)" in str(cuda.missing())


def test_a_driver_that_is_too_old(driver: FakeDriver) -> None:
    driver.set(version=12080)
    assert cuda.missing() == "the NVIDIA driver is for CUDA 12.8; install 580 or later"
    with pytest.raises(TargetError, match=r"for CUDA 12\.8; install 580 or later"):
        CudaDevice()


def test_no_such_gpu(driver: FakeDriver) -> None:
    with pytest.raises((TargetError, DeviceError), match="cuDeviceGet failed with CUDA_ERROR_INVALID_DEVICE"):
        CudaDevice(1)


# Memory


def test_allocated_memory_is_zero(device: CudaDevice) -> None:
    address = device.allocate(1000, "numbers")
    found = np.full(1000, 7, np.uint8)
    device.download(found, address)
    device.synchronize()
    assert not found.any()


def test_nothing_can_be_allocated(driver: FakeDriver, device: CudaDevice) -> None:
    assert device.allocate(0, "nothing") != device.allocate(0, "nothing")
    assert driver.live()["memory"] == 2


def test_free_gives_back(driver: FakeDriver, device: CudaDevice) -> None:
    before = device.memory()
    first, second = device.allocate(4096, "one"), device.allocate(512, "two")
    assert device.memory()[0] == before[0] - 4608
    device.free(first)
    assert driver.live()["memory"] == 1
    device.free(second)
    assert device.memory() == before
    with pytest.raises(KeyError):
        device.free(second)


def test_out_of_memory(driver: FakeDriver, device: CudaDevice) -> None:
    driver.set(memory=3 << 30)
    for _ in range(4):  # nothing is touched until somebody waits
        device.allocate(1 << 20, "weights")
    driver.set(memory=(3 << 30) + (4 << 20))
    with pytest.raises(DeviceError) as caught:
        device.allocate(5 << 30, "KV pages")
    text = str(caught.value)
    assert "no room for the KV pages: 5.00 GiB wanted, 3.00 of 3.00 GiB free; lower num_pages" in text
    device.allocate(1 << 20, "weights")  # it goes on
    assert driver.live()["memory"] == 5


@pytest.mark.parametrize(
    "array",
    [
        np.arange(1, dtype=np.uint8),
        np.arange(1237, dtype=np.int32),
        np.arange(7 * 3 * 5, dtype=np.float16).reshape(7, 3, 5),
        np.zeros((0, 4), np.float32),
    ],
    ids=lambda a: f"{a.dtype}-{a.shape}",
)
@pytest.mark.parametrize("pinned", [False, True])
def test_round_trip(device: CudaDevice, array: npt.NDArray[Any], pinned: bool) -> None:
    address, elsewhere = device.allocate(array.nbytes, "one"), device.allocate(array.nbytes, "two")
    sent, received = array.copy(), np.empty_like(array)
    if pinned:
        sent, received = (device.pinned(array.nbytes).view(array.dtype).reshape(array.shape) for _ in range(2))
        sent[...] = array
    device.upload(address, sent)
    if array.nbytes:
        device.copy(elsewhere, address, array.nbytes)
    device.download(received, elsewhere)
    device.synchronize()
    np.testing.assert_array_equal(received, array)


def test_ordinary_memory_may_change_after_its_upload(device: CudaDevice) -> None:
    address, array = device.allocate(64, "numbers"), np.arange(16, dtype=np.int32)
    device.upload(address, array)
    array[:] = 0
    device.download(array, address)
    device.synchronize()
    assert list(array) == list(range(16))


def test_no_calls_for_empty_arrays(driver: FakeDriver, device: CudaDevice) -> None:
    empty = np.zeros(0, np.float32)
    device.upload(12345, empty)
    device.download(empty, 12345)
    assert not driver.logged("cuMemcpyHtoDAsync_v2")
    assert not driver.logged("cuMemcpyDtoHAsync_v2")


def test_copies_beyond_what_was_allocated(device: CudaDevice) -> None:
    address, array = device.allocate(64, "numbers"), np.zeros(65, np.uint8)
    held = device.pinned(64)
    for start in (
        lambda: device.upload(address, array),
        lambda: device.upload(address + 64, array[:1]),
        lambda: device.download(array, address),
        lambda: device.download(held, address + 1),
        lambda: device.copy(address, address + 32, 33),
    ):
        with pytest.raises(DeviceError, match="CUDA_ERROR_INVALID_VALUE"):
            start()


def test_freed_memory_is_not_there(device: CudaDevice) -> None:
    address = device.allocate(64, "numbers")
    device.free(address)
    with pytest.raises(DeviceError, match="cuMemcpyHtoDAsync failed with CUDA_ERROR_INVALID_VALUE"):
        device.upload(address, np.zeros(1))


def test_marks(driver: FakeDriver, device: CudaDevice) -> None:
    address, held = device.allocate(64, "numbers"), device.pinned(64)
    device.wait(0)  # before the first mark there is nothing to wait for
    device.synchronize()
    device.download(held, address)
    device.mark(0)
    device.download(held, address)
    device.mark(1)
    assert driver.pending == 4
    device.wait(0)
    assert driver.pending == 2  # what came after the mark goes on
    device.mark(0)
    device.wait(0)
    assert driver.pending == 0
    device.wait(1)


# Kernels


def add(grid: tuple[int, int, int], block: int, args: bytes) -> None:
    """to[:n] += from[:n]"""
    to, source, count = struct.unpack("<QQi", args)
    np.ctypeslib.as_array((ctypes.c_int32 * count).from_address(to))[:] += np.frombuffer(
        ctypes.string_at(source, count * 4), np.int32
    )


def numbers(*values: int) -> list[Any]:
    """Arguments of `add`."""
    return [ctypes.c_uint64(values[0]), ctypes.c_uint64(values[1]), ctypes.c_int32(values[2])]


def test_launch(driver: FakeDriver, device: CudaDevice) -> None:
    driver.kernels["add"] = add
    device.load(MODULE, ["add", "plain"])
    one, two = device.allocate(16, "one"), device.allocate(16, "two")
    device.upload(one, np.arange(4, dtype=np.int32))
    device.upload(two, np.full(4, 10, np.int32))
    device.launch("add", (3, 2, 1), 256, 4096, numbers(one, two, 4))
    device.launch("plain", [1, 1, 7], 1024, 0, [], overlaps=True)
    device.launch("add", (1, 1, 1), 32, 0, numbers(one, two, 3))
    found = np.zeros(4, np.int32)
    device.download(found, one)
    assert list(found) == [20, 21, 22, 13]
    assert driver.logged("launch") == [
        "launch add grid 3 2 1 block 256 1 1 shared 4096 attributes; args 8 8 4",
        f"launch plain grid 1 1 7 block 1024 1 1 shared 0 attributes{OVERLAPPING}; args ?",
        "launch add grid 1 1 1 block 32 1 1 shared 0 attributes; args 8 8 4",
    ]
    assert driver.logged("run") == ["run add", "run plain", "run add"]


@pytest.mark.parametrize(
    ("grid", "block", "shared"),
    [
        ((0, 1, 1), 32, 0),
        ((1, 65536, 1), 32, 0),
        ((1, 1, 1), 0, 0),
        ((1, 1, 1), 1025, 0),
        ((1, 1, 1), 32, 227 * 1024 + 1),
    ],
)
def test_launches_that_cannot_be(device: CudaDevice, grid: tuple[int, ...], block: int, shared: int) -> None:
    device.load(MODULE, ["add"])
    says = (
        rf"launch of add with grid {re.escape(str(grid))}, {block} threads, {shared} bytes .*CUDA_ERROR_INVALID_VALUE"
    )
    with pytest.raises(DeviceError, match=says):
        device.launch("add", grid, block, shared, numbers(0, 0, 0))


@pytest.mark.parametrize(("arch", "most"), [(80, 163 << 10), (89, 99 << 10), (90, 227 << 10)])
def test_each_function_may_have_all_shared_memory(driver: FakeDriver, arch: int, most: int) -> None:
    driver.set(arch=arch)
    device = CudaDevice()
    device.load(MODULE, ["small", "plain"])
    assert driver.logged("cuFuncSetAttribute") == [f"cuFuncSetAttribute 8 {size}" for size in (most - 1024, most)]
    device.launch("plain", (1, 1, 1), 32, most, [])
    device.launch("small", (1, 1, 1), 32, most - 1024, [ctypes.c_uint64(0)])
    with pytest.raises(DeviceError, match=f"launch of small .* {most - 1023} bytes"):
        device.launch("small", (1, 1, 1), 32, most - 1023, [ctypes.c_uint64(0)])


def test_a_function_that_is_not_there(device: CudaDevice) -> None:
    with pytest.raises(DeviceError, match=r"cuModuleGetFunction\(ad\) failed with CUDA_ERROR_NOT_FOUND"):
        device.load(MODULE, ["add", "ad"])


def test_no_machine_code(device: CudaDevice) -> None:
    with pytest.raises(DeviceError, match="cuModuleLoadData failed with CUDA_ERROR_INVALID_IMAGE"):
        device.load(b"", ["add"])


# Tensor maps


def test_tensor_map(driver: FakeDriver, device: CudaDevice) -> None:
    given: list[bytes] = []
    driver.kernels["mapped"] = lambda grid, block, args: given.append(args)
    device.load(MODULE, ["mapped"])
    address = device.allocate(1 << 16, "weights")
    made = device.tensor_map(address + 16, "float16", (64, 70, 3), (256, 20480), (32, 40, 1), 2)
    assert ctypes.sizeof(made) == 128
    assert device.tensor_map(address + 16, "float16", (64, 70, 3), (256, 20480), (32, 40, 1), 2) is made
    other = device.tensor_map(address, "float16", (64, 70, 3), (256, 20480), (32, 40, 1), 2)
    assert other is not made
    assert len(driver.logged("map")) == 2
    device.launch("mapped", (1, 1, 1), 32, 0, [made, ctypes.c_uint64(5)])
    device.synchronize()
    told = struct.unpack("<16Q", given[0][:128])
    assert told[:5] == (address + 16, 6, 3, 2, 2)  # float16, rank, 64 bytes, promotion to 128
    assert told[5:8] == (64, 70, 3)
    assert told[10:13] == (32, 40, 1)
    assert told[15] == 20480
    assert given[0][128:] == struct.pack("<Q", 5)


@pytest.mark.parametrize(("dtype", "number", "box"), [("uint32", 2, 8), ("float16", 6, 16), ("bfloat16", 9, 64)])
def test_types_of_tensor_maps(driver: FakeDriver, device: CudaDevice, dtype: str, number: int, box: int) -> None:
    device.tensor_map(device.allocate(4096, "one"), dtype, (128,), (), (box,), 0)
    device.tensor_map(device.allocate(4096, "two"), dtype, (128, 8, 1, 1, 1), (512,) * 4, (box, 1, 1, 1, 1), 0)
    assert driver.logged("map") == [f"map {number} rank {rank} dims 128.. box {box}.. swizzle 0" for rank in (1, 5)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"address": 8},
        {"strides": (24,)},
        {"box": (257, 1)},
        {"box": (0, 1)},
        {"box": (64, 1), "swizzle": 1},
        {"dims": (0, 8)},
        {"dims": (64,) * 6, "strides": (128,) * 5, "box": (8,) * 6},
    ],
    ids=str,
)
def test_tensor_maps_that_cannot_be(device: CudaDevice, wrong: dict[str, Any]) -> None:
    right: dict[str, Any] = {"address": 0, "dims": (64, 8), "strides": (128,), "box": (16, 4), "swizzle": 0}
    given = right | wrong
    given["address"] += device.allocate(4096, "weights")
    device.tensor_map(**(given | right | {"address": device.allocate(4096, "weights")}), dtype="float16")
    says = re.escape(f"cuTensorMapEncodeTiled of float16 {given['dims']} in boxes of {given['box']}")
    with pytest.raises(DeviceError, match=f"{says} failed with CUDA_ERROR_INVALID_VALUE"):
        device.tensor_map(**given, dtype="float16")


def test_not_all_tensor_maps_are_kept(device: CudaDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_MAX_MAPS", 4)
    address = device.allocate(4096, "weights")
    for length in range(1, 20):
        device.tensor_map(address, "float16", (64, length), (128,), (16, 1), 0)
        assert len(device._maps) <= 5


# Graphs


def recorded(driver: FakeDriver, device: CudaDevice) -> tuple[Any, npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """A graph that adds what is in a pinned array to a sum on the device, and writes it to another array."""
    driver.kernels["add"] = add
    device.load(MODULE, ["add"])
    to, source = device.allocate(16, "sum"), device.allocate(16, "inputs")
    given, found = (device.pinned(16).view(np.int32) for _ in range(2))
    given[:], found[:] = 1, -1
    with device.capture() as graph:
        device.upload(source, given)
        device.launch("add", (1, 1, 1), 32, 0, numbers(to, source, 4), overlaps=True)
        device.download(found, to)
    return graph, given, found


def test_a_graph_sees_new_content(driver: FakeDriver, device: CudaDevice) -> None:
    graph, given, found = recorded(driver, device)
    device.synchronize()
    assert list(found) == [-1] * 4  # nothing was run
    assert not driver.logged("run")
    given[:] = [1, 2, 3, 4]
    device.launch_graph(graph)
    device.synchronize()
    assert list(found) == [1, 2, 3, 4]
    given[:] = 10
    device.launch_graph(graph)
    device.launch_graph(graph)
    device.synchronize()
    assert list(found) == [21, 22, 23, 24]
    assert len(driver.logged("launch")) == 1
    assert len(driver.logged("run")) == 3
    assert driver.live()["executable"] == 1
    assert "graph" not in driver.live()  # what was only needed to make it


def test_a_graph_without_content(device: CudaDevice) -> None:
    with device.capture() as graph:
        pass
    device.launch_graph(graph)
    device.synchronize()


def wait_in_capture(device: CudaDevice) -> None:
    with device.capture():
        device._cuda.cuStreamSynchronize(device._stream)


def test_only_pinned_memory_in_graphs(device: CudaDevice) -> None:
    address, array = device.allocate(64, "numbers"), np.zeros(64, np.uint8)
    for start in (lambda: device.upload(address, array), lambda: device.download(array, address), device.synchronize):
        with pytest.raises(DeviceError, match="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"), device.capture():
            start()
    with pytest.raises(DeviceError, match="cuStreamEndCapture failed with CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"):
        wait_in_capture(device)
    device.upload(address, array)  # it goes on
    device.synchronize()


def test_an_error_while_recording(driver: FakeDriver, device: CudaDevice) -> None:
    address, held = device.allocate(64, "numbers"), device.pinned(64)
    with pytest.raises(ZeroDivisionError), device.capture():
        device.upload(address, held[: 1 // 0])
    held[:] = 3
    device.upload(address, held)
    held_too = device.pinned(64)
    device.download(held_too, address)
    device.synchronize()
    assert (held_too == 3).all()
    assert "executable" not in driver.live()


def test_a_graph_with_memory_that_was_freed(device: CudaDevice) -> None:
    address, held = device.allocate(64, "numbers"), device.pinned(64)
    with device.capture() as graph:
        device.upload(address, held)
    device.free(address)
    device.launch_graph(graph)
    with pytest.raises(DeviceError, match="cuStreamSynchronize failed with CUDA_ERROR_ILLEGAL_ADDRESS"):
        device.synchronize()
    with pytest.raises(DeviceError, match="cuMemAlloc failed with CUDA_ERROR_ILLEGAL_ADDRESS"):
        device.allocate(64, "more")  # after such an error nothing works


# Every call that fails


def begun(device: CudaDevice) -> dict[str, Any]:
    """What the calls below need."""
    device.load(MODULE, ["plain"])
    address, held = device.allocate(64, "numbers"), device.pinned(64)
    with device.capture() as graph:
        device.upload(address, held)
    return {"address": address, "held": held, "graph": graph}


def capture(device: CudaDevice) -> None:
    with device.capture():
        pass


CALLS: dict[str, Callable[[CudaDevice, dict[str, Any]], Any]] = {
    "cuDeviceGetName": lambda d, _: d.name,
    "cuDeviceGetAttribute": lambda d, _: d.load(b"*", []),
    "cuMemGetInfo_v2": lambda d, _: d.memory(),
    "cuMemAlloc_v2": lambda d, _: d.allocate(64, "more"),
    "cuMemsetD8Async": lambda d, _: d.allocate(64, "more"),
    "cuMemFree_v2": lambda d, b: d.free(b["address"]),
    "cuMemHostAlloc": lambda d, _: d.pinned(64),
    "cuMemcpyHtoDAsync_v2": lambda d, b: d.upload(b["address"], b["held"]),
    "cuMemcpyDtoHAsync_v2": lambda d, b: d.download(b["held"], b["address"]),
    "cuMemcpyDtoDAsync_v2": lambda d, b: d.copy(b["address"], b["address"] + 32, 32),
    "cuEventRecord": lambda d, _: d.mark(1),
    "cuEventSynchronize": lambda d, _: d.wait(0),
    "cuStreamSynchronize": lambda d, _: d.synchronize(),
    "cuModuleLoadData": lambda d, _: d.load(MODULE, ["plain"]),
    "cuModuleGetFunction": lambda d, _: d.load(MODULE, ["plain"]),
    "cuFuncGetAttribute": lambda d, _: d.load(MODULE, ["plain"]),
    "cuFuncSetAttribute": lambda d, _: d.load(MODULE, ["plain"]),
    "cuLaunchKernelEx": lambda d, _: d.launch("plain", (1, 1, 1), 32, 0, []),
    "cuTensorMapEncodeTiled": lambda d, b: d.tensor_map(b["address"], "float16", (8, 2), (16,), (8, 1), 0),
    "cuStreamBeginCapture_v2": lambda d, _: capture(d),
    "cuStreamEndCapture": lambda d, _: capture(d),
    "cuGraphInstantiateWithFlags": lambda d, _: capture(d),
    "cuGraphLaunch": lambda d, b: d.launch_graph(b["graph"]),
}
MAKING = ["cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuStreamCreate", "cuEventCreate"]


def named(function: str) -> str:
    return "launch of plain" if function == "cuLaunchKernelEx" else re.sub(r"(_v2|WithFlags)$", "", function)


@pytest.mark.parametrize("function", CALLS)
def test_each_failure_is_told(driver: FakeDriver, device: CudaDevice, function: str) -> None:
    given = begun(device)
    driver.fail(function, 700)
    with pytest.raises(
        DeviceError, match=rf"^CUDA: {named(function)}.* failed with CUDA_ERROR_ILLEGAL_ADDRESS \(700\)"
    ):
        CALLS[function](device, given)


@pytest.mark.parametrize("function", MAKING)
def test_each_failure_at_the_start_is_told(driver: FakeDriver, function: str) -> None:
    driver.fail(function, 999)  # an error that this driver has no name for
    with pytest.raises(DeviceError, match=rf"^CUDA: {function} failed with \? \(999\)"):
        CudaDevice()


def test_all_calls_are_tested() -> None:
    text = Path(cuda.__file__).read_text()
    checked = set(re.findall(r"_check\(\s*f?\"(cu[A-Za-z0-9]+)", text)) | {"launch of plain"}
    assert checked == {named(function) for function in [*CALLS, *MAKING]}


def test_another_thread_is_told(device: CudaDevice) -> None:
    """A thread has to make the context its own."""
    caught: list[str] = []

    def use() -> None:
        try:
            device.synchronize()
        except DeviceError as error:
            caught.append(str(error))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert caught == ["CUDA: cuStreamSynchronize failed with CUDA_ERROR_INVALID_CONTEXT (201)"]


# Giving back


def used(driver: FakeDriver) -> CudaDevice:
    device = CudaDevice()
    begun(device)
    device.allocate(100, "numbers")
    assert {kind: driver.live()[kind] for kind in ("memory", "pinned", "stream", "module", "context")} == {
        "memory": 2,
        "pinned": 1,
        "stream": 1,
        "module": 1,
        "context": 1,
    }
    return device


def test_all_is_given_back(driver: FakeDriver) -> None:
    device = used(driver)
    gone = weakref.ref(device)
    del device
    gc.collect()
    assert gone() is None
    assert driver.live() == {}
    assert driver.pending == 0


def test_nothing_is_left_to_the_context(driver: FakeDriver) -> None:
    """The context ends with its last user, which may be another library of this process."""
    used(driver)
    gc.collect()
    assert driver.logged("left:") == []


def test_two_devices_at_once(driver: FakeDriver) -> None:
    first, second = used(driver), CudaDevice()
    address = second.allocate(64, "numbers")
    del first
    gc.collect()
    assert driver.live() == {"memory": 1, "stream": 1, "event": 2, "context": 1}
    second.upload(address, np.zeros(64, np.uint8))
    second.synchronize()


def test_two_devices_one_after_the_other(driver: FakeDriver) -> None:
    for _ in range(2):
        device = CudaDevice()
        graph, given, found = recorded(driver, device)
        given[:] = 5
        device.launch_graph(graph)
        device.synchronize()
        assert list(found) == [5] * 4
        del device, graph, given, found
        gc.collect()
        assert driver.live() == {}


def test_pinned_memory_stays_while_it_is_used(driver: FakeDriver) -> None:
    device = used(driver)
    array = device.pinned(100)
    array[:] = 7
    view = array.view(np.int32)[3:].reshape(2, 11)
    del device, array
    gc.collect()
    assert driver.live()["pinned"] == 2
    assert (view == 0x07070707).all()
    del view
    gc.collect()
    assert driver.live() == {}


def test_a_graph_keeps_the_device(driver: FakeDriver) -> None:
    device = CudaDevice()
    graph = begun(device)["graph"]
    again, gone = weakref.ref(device), weakref.ref(graph)
    del device
    gc.collect()
    found = again()
    assert found is not None
    found.launch_graph(graph)
    found.synchronize()
    del found, graph
    gc.collect()
    assert (again(), gone()) == (None, None)
    assert driver.live() == {}


def test_what_was_started_ends_before_memory_goes(driver: FakeDriver) -> None:
    driver.kernels["add"] = add
    device = CudaDevice()
    device.load(MODULE, ["add"])
    address = device.allocate(1 << 16, "numbers")
    for _ in range(3):
        device.launch("add", (1, 1, 1), 32, 0, numbers(address, address, 1 << 14))
    del device
    gc.collect()
    assert len(driver.logged("run")) == 3
    assert driver.log.index("cuMemFree_v2") > max(i for i, line in enumerate(driver.log) if line == "run add")


def test_another_thread_gives_back(driver: FakeDriver) -> None:
    made: list[CudaDevice] = []
    thread = threading.Thread(target=lambda: made.append(used(driver)))
    thread.start()
    thread.join()
    made.clear()
    gc.collect()
    assert driver.live() == {}
    assert not [line for line in driver.logged("left:") if line.endswith(("memory", "pinned", "module", "stream"))]


def test_errors_do_not_keep_memory(driver: FakeDriver) -> None:
    device = used(driver)
    with pytest.raises(DeviceError):
        device.upload(1, np.zeros(8))
    driver.fail("cuStreamSynchronize", 700)
    del device
    gc.collect()
    assert driver.live() == {}


@pytest.mark.parametrize("function", MAKING)
def test_a_start_that_fails_gives_back(driver: FakeDriver, function: str) -> None:
    driver.fail(function, nth=2 if function == "cuEventCreate" else 1)
    with pytest.raises(DeviceError):
        CudaDevice()
    gc.collect()
    assert driver.live() == {}


def test_memory_that_cannot_be_zeroed_is_given_back(driver: FakeDriver) -> None:
    device, other = CudaDevice(), CudaDevice()
    driver.fail("cuMemsetD8Async")
    with pytest.raises(DeviceError):
        device.allocate(64, "numbers")
    del device
    gc.collect()
    assert "memory" not in driver.live()
    other.synchronize()


@pytest.mark.parametrize("function", ["cuGraphInstantiateWithFlags", "cuMemcpyHtoDAsync_v2"])
def test_recording_that_fails_gives_back(driver: FakeDriver, device: CudaDevice, function: str) -> None:
    address, held = device.allocate(64, "numbers"), device.pinned(64)
    driver.fail(function)
    with pytest.raises(DeviceError), device.capture():
        device.upload(address, held)
    assert "graph" not in driver.live()


AT_EXIT = """
import atexit
atexit.register(lambda: print(driver.fake_live(b"context"), driver.fake_live(b"pinned")))  # after all later ones
from mlcgen.runtime import cuda
driver, device = cuda._driver(), cuda.CudaDevice()
held = device.pinned(100)
"""


def test_a_device_is_there_until_the_process_ends(driver: FakeDriver, tmp_path: Path) -> None:
    """AsyncEngine's thread may still be in a step, which would crash."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", AT_EXIT], env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("1 1\n", "")


# Which target


def cuda_entry(arch: str) -> dict[str, Any]:
    return {"name": f"cuda:{arch}", "kind": "cuda", "arch": arch, "executor": "plan", "features": []}


CPU = {"name": "cpu:x86-64-v2", "kind": "cpu", "arch": "x86_64", "executor": "vm", "features": ["popcnt", "sse4.2"]}


@pytest.mark.parametrize(
    ("gpu", "arch", "runs"),
    [
        (90, "sm_90", True),
        (90, "sm_80", False),
        (90, "sm_89", False),
        (90, "compute_80", True),
        (90, "compute_90", True),
        (86, "sm_80", True),
        (86, "sm_86", True),
        (86, "sm_89", False),
        (86, "sm_90", False),
        (86, "compute_80", True),
        (86, "compute_90", False),
        (89, "sm_86", True),
        (100, "sm_90", False),
        (103, "sm_100", False),
        (120, "sm_120", True),
        (121, "sm_120", False),
        (120, "sm_90", False),
        (120, "compute_80", True),
        (75, "sm_80", False),
        (75, "compute_80", False),
    ],
)
def test_what_runs_where(driver: FakeDriver, gpu: int, arch: str, runs: bool) -> None:
    driver.set(arch=gpu)
    assert cannot_run(cuda_entry(arch)) == (None if runs else f"needs {arch}, this GPU is sm_{gpu}")


@pytest.mark.parametrize(
    ("gpu", "best"),
    [(90, "sm_90"), (80, "sm_80"), (86, "sm_86"), (89, "sm_86"), (100, "compute_80"), (120, "compute_80")],
)
@pytest.mark.parametrize("order", [1, -1])
def test_the_newest_machine_code_wins(driver: FakeDriver, gpu: int, best: str, order: int) -> None:
    driver.set(arch=gpu)
    entries = [CPU, *map(cuda_entry, ("sm_80", "sm_86", "sm_90", "compute_80"))][::order]
    assert choose_target(entries, "auto")["arch"] == best
    assert choose_target(entries, "cuda")["arch"] == best
    assert choose_target(entries, "cuda:compute_80")["arch"] == "compute_80"


def test_no_target_for_this_gpu(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(target_choice, "host_features", lambda: frozenset(["popcnt", "sse4.2"]))
    driver.set(arch=75)
    entries = [CPU, *map(cuda_entry, ("sm_80", "compute_80"))]
    assert choose_target(entries, "auto")["name"] == CPU["name"]
    says = r"\(cuda:sm_80: needs sm_80, this GPU is sm_75; cuda:compute_80: needs compute_80, .*\); compile it for this"
    with pytest.raises(TargetError, match=says):
        choose_target(entries, "cuda")
    with pytest.raises(TargetError, match=r"'cuda:sm_90' is not in this artifact; it has: cpu:x86-64-v2, cuda:sm_80"):
        choose_target(entries, "cuda:sm_90")


def test_targets_without_a_gpu(driver: FakeDriver) -> None:
    driver.set(devices=0)
    with pytest.raises(TargetError, match=r"\(cuda:sm_90: the NVIDIA driver finds no GPU\)"):
        choose_target([cuda_entry("sm_90")], "auto")


# Weights


def untile(grid: tuple[int, int, int], block: int, args: bytes) -> None:
    """For elements of two bytes."""
    source, to, columns = struct.unpack("<QQi", args)
    assert block == 256
    assert grid[0] == -(-columns // 64)
    tiles = np.frombuffer(ctypes.string_at(source, grid[1] * columns * 32), np.uint16).reshape(grid[1], columns, 16)
    ctypes.memmove(to, tiles.transpose(0, 2, 1).tobytes(), tiles.nbytes)


def spec(shape: list[int], dtype: str, is_tiled: bool = False) -> dict[str, Any]:
    return {"shape": shape, "dtype": dtype, "is_tiled": is_tiled}


SPECS = {
    "norm": spec([37], "float32"),
    "wide": spec([2, 70, 16], "float16", True),
    "codes": spec([5, 13], "uint8"),
    "narrow": spec([1, 3, 16], "uint16", True),
    "scales": spec([9, 4], "float16"),
}
WEIGHTS_MODULE = b"untile_2(8,8,4) untile_4(8,8,4) " + b" ".join(
    name.encode() + b"(8,8,4,4,4)" for name in device_weights.FUNCTIONS if name.startswith("random")
)


@pytest.mark.parametrize("chunk", [64, 1 << 20])
def test_upload_weights(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(device_weights, "CHUNK", chunk)
    driver.kernels["untile_2"] = untile
    device = CudaDevice()
    device.load(WEIGHTS_MODULE, device_weights.FUNCTIONS)
    random = np.random.default_rng(0)
    weights = {
        name: random.integers(0, 255, np.prod(held["shape"]) * device_weights.ITEM_BYTES[held["dtype"]], np.uint8)
        .view(held["dtype"])
        .reshape(held["shape"])
        for name, held in SPECS.items()
    }
    addresses = upload_weights(device, SPECS, weights)
    assert list(addresses) == list(SPECS)
    assert driver.pending == 0
    for name, array in weights.items():
        is_tiled = SPECS[name]["is_tiled"]
        expected = array.transpose(0, 2, 1).tobytes() if is_tiled else array.tobytes()
        found = np.zeros(array.nbytes, np.uint8)
        device.download(found, addresses[name])
        assert found.tobytes() == expected, name
    assert driver.live()["memory"] == len(SPECS)  # the place for tiles was given back
    del device
    gc.collect()
    assert driver.live() == {}


def test_weights_beyond_memory(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_weights, "CHUNK", 4096)
    driver.set(memory=4096)
    device = CudaDevice()
    with pytest.raises(DeviceError, match="no room for the weights"):
        upload_weights(device, {"w": spec([5000], "uint8")}, {"w": np.zeros(5000, np.uint8)})
    del device
    gc.collect()
    assert driver.live() == {}


def test_random_weights(driver: FakeDriver) -> None:
    given: dict[str, tuple[Any, ...]] = {}

    def kernel(name: str) -> Callable[..., None]:
        return lambda grid, block, args: given.update({name: struct.unpack("<QqffI", args)})

    driver.kernels |= {name: kernel(name) for name in device_weights.FUNCTIONS}
    device = CudaDevice()
    device.load(WEIGHTS_MODULE, device_weights.FUNCTIONS)
    specs = {"norm": spec([37], "float32"), "codes": spec([5, 13], "uint8"), "w.scale": spec([9, 4], "float16")}
    found = make_random_weights(device, specs)
    assert given["random_float32"] == (found["norm"], 37, 1.0, 0.0, 0)
    assert given["random_uint8"] == (found["codes"], 65, 0.0, np.float32(0.02), 1)
    assert given["random_float16"] == (found["w.scale"], 36, np.float32(0.004), np.float32(0.0005), 2)


def test_no_room_for_pages(driver: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = {
        "module": base64.b64encode(b"*").decode(),
        **{"kernels": {}, "weights": {"w": spec([1 << 20], "uint8")}, "storages": [1 << 20], "scratch": 0},
        **{"pages": {"layers": 2}, "tensors": [{"storage": 0}], "output": 0, "steps": []},
    }
    monkeypatch.setattr("mlcgen.runtime.plan.read_plan", lambda file: plan)
    monkeypatch.setattr("mlcgen.runtime.plan.check_fit", lambda *checked: None)
    manifest = {"kv": {"num_layers": 2, "num_kv_heads": 2, "page_size": 16, "head_dim": 64, "dtype": "float16"}}
    driver.set(memory=2 << 20)
    with pytest.raises(DeviceError, match=r"90% of the GPU's 0\.0 GiB leave no room for KV pages"):
        load_plan("cuda", tmp_path / "plan.json", manifest, None, None, 1, 0.9)
    gc.collect()
    assert driver.live() == {}


def test_why_the_others_were_not_taken(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(target_choice, "host_features", lambda: frozenset(["popcnt", "sse4.2"]))
    driver.set(arch=90)
    entries = [CPU, *map(cuda_entry, ("sm_90", "sm_80"))]
    assert not_taken(entries, "cuda:sm_90") == {
        CPU["name"]: "slower here, as a rule",
        "cuda:sm_80": "needs sm_80, this GPU is sm_90",
    }
