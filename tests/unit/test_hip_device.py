"""HipDevice with a HIP runtime that needs no GPU (fake_hip.c)."""

import ctypes
import functools
import gc
import inspect
import re
import shutil
import struct
import subprocess
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mlcgen.errors import DeviceError, TargetError
from mlcgen.runtime import hip
from mlcgen.runtime.hip import HipDevice

from . import cuda_driver
from .cuda_driver import FakeDriver

SOURCE = Path(__file__).with_name("fake_hip.c")
MODULE = b"add(8,8,4) plain"


@functools.cache
def library(*options: str) -> Path:
    if not (command := cuda_driver._compiler()):
        pytest.skip("needs Linux, and a C compiler or the ziglang wheel")
    path = Path(cuda_driver._folder().name) / f"fake_hip{'_'.join(options)}.so"
    done = subprocess.run(
        [*command, *cuda_driver.OPTIONS, *options, str(SOURCE), "-o", str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return path


def find(monkeypatch: pytest.MonkeyPatch, libraries: dict[str, ctypes.CDLL]) -> None:
    """Let mlcgen.runtime.hip find these libraries only."""

    def load(name: str) -> ctypes.CDLL:
        if name not in libraries:
            raise OSError(f"{name}: cannot open shared object file")
        return libraries[name]

    monkeypatch.setattr(hip, "ctypes", SimpleNamespace(**{**vars(ctypes), "CDLL": load}))
    monkeypatch.setattr(hip, "_library", functools.cache(inspect.unwrap(hip._library)))


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str) -> FakeDriver:
    for name in ("FAKE_CUDA_MEMORY", "FAKE_CUDA_DEVICES", "FAKE_HIP_ARCH"):
        monkeypatch.delenv(name, raising=False)
    path = str(shutil.copy(library(*options), folder / "libamdhip64.so"))  # a copy has its own state
    find(monkeypatch, {"libamdhip64.so.6": ctypes.CDLL(path)})
    return FakeDriver(ctypes.CDLL(path), monkeypatch)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeDriver:
    return install(monkeypatch, tmp_path)


@pytest.fixture
def device(driver: FakeDriver) -> HipDevice:
    return HipDevice()


def live(driver: FakeDriver) -> dict[str, int]:
    """What was taken and not given back; HIP itself stays."""
    return {kind: count for kind, count in driver.live().items() if kind != "context"}


# The device


def test_the_fake_has_what_is_used(driver: FakeDriver) -> None:
    used = set(re.findall(r"\"?\b(hip[A-Z]\w+)\(|\.(hip[A-Z]\w+)", Path(hip.__file__).read_text()))
    names = {name for pair in used for name in pair if name}
    assert len(names) > 20
    assert [name for name in names if not hasattr(hip._library(), name)] == []


def test_what_the_device_is(driver: FakeDriver, device: HipDevice) -> None:
    driver.set(memory=1 << 40)
    assert hip.missing() is None
    assert device.name == "Fake GPU 90"
    assert device.memory() == (1 << 40, 1 << 40)
    assert device.symbols == {"has_f16": 0}
    assert device.largest_binding == 1 << 48


@pytest.mark.parametrize("options", [(), ("-DOLD",)], ids=["ROCm 6", "ROCm 5"])
@pytest.mark.parametrize("arch", ["90a", "942", "1100"])
def test_architecture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: tuple[str, ...], arch: str) -> None:
    install(monkeypatch, tmp_path, *options)
    monkeypatch.setenv("FAKE_HIP_ARCH", arch)
    assert hip.architecture() == f"gfx{arch}"
    assert hip.architecture(1) is None


def test_no_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    find(monkeypatch, {})
    assert hip.architecture() is None
    assert hip.missing() == "no HIP runtime (libamdhip64) is installed"
    with pytest.raises(TargetError, match=r"no HIP runtime \(libamdhip64\) is installed; run on another target"):
        HipDevice()


def test_no_gpu(driver: FakeDriver) -> None:
    driver.set(devices=0)
    assert hip.architecture() is None
    with pytest.raises(TargetError, match="the HIP runtime finds no GPU; run on another target"):
        HipDevice()


def test_a_runtime_that_does_not_start(driver: FakeDriver) -> None:
    driver.fail("hipInit", 3)
    assert hip.missing() == "the HIP runtime does not start: hipErrorNotInitialized (3)"


# Memory


def test_allocated_memory_is_zero(device: HipDevice) -> None:
    address = device.allocate(1000, "numbers")
    found = np.full(1000, 7, np.uint8)
    device.download(found, address)
    device.synchronize()
    assert not found.any()


def test_free_gives_back(driver: FakeDriver, device: HipDevice) -> None:
    before = device.memory()
    first, second = device.allocate(4096, "one"), device.allocate(0, "nothing")
    device.free(first)
    assert live(driver)["memory"] == 1
    device.free(second)
    assert device.memory() == before
    with pytest.raises(KeyError):
        device.free(second)


def test_out_of_memory(driver: FakeDriver, device: HipDevice) -> None:
    driver.set(memory=3 << 30)
    says = r"no room for the KV pages: 5\.00 GiB wanted, 3\.00 of 3\.00 GiB free; lower num_pages"
    with pytest.raises(DeviceError, match=says):
        device.allocate(5 << 30, "KV pages")
    with pytest.raises(DeviceError, match=r"no room for the weights: .*; quantize further"):
        device.allocate(5 << 30, "weights")
    device.allocate(1 << 20, "weights")  # it goes on


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("shape", [(1237,), (7, 3, 5), (0, 4)])
def test_round_trip(device: HipDevice, shape: tuple[int, ...], pinned: bool) -> None:
    array = np.random.default_rng(0).integers(-99, 99, shape, np.int32)
    address = device.allocate(array.nbytes, "one")
    sent, received = array.copy(), np.empty_like(array)
    if pinned:
        sent, received = (device.pinned(array.nbytes).view(array.dtype).reshape(shape) for _ in range(2))
        sent[...] = array
    device.upload(address, sent)
    device.download(received, address)
    device.synchronize()
    np.testing.assert_array_equal(received, array)


def test_copies_beyond_what_was_allocated(device: HipDevice) -> None:
    address = device.allocate(64, "numbers")
    with pytest.raises(DeviceError, match=r"^HIP: hipMemcpyHtoDAsync failed with hipErrorInvalidValue \(1\)$"):
        device.upload(address, np.zeros(65, np.uint8))
    with pytest.raises(DeviceError, match="hipMemcpyDtoHAsync failed with hipErrorInvalidValue"):
        device.download(device.pinned(64), address + 1)


def test_marks(driver: FakeDriver, device: HipDevice) -> None:
    address, held = device.allocate(64, "numbers"), device.pinned(64)
    device.synchronize()
    for which in (0, 1):
        device.download(held, address)
        device.mark(which)
    assert driver.pending == 4
    device.wait(0)
    assert driver.pending == 2  # what came after the mark goes on
    device.wait(1)
    assert driver.pending == 0


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


def test_launch(driver: FakeDriver, device: HipDevice) -> None:
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
        "launch plain grid 1 1 7 block 1024 1 1 shared 0 attributes; args ?",
        "launch add grid 1 1 1 block 32 1 1 shared 0 attributes; args 8 8 4",
    ]
    assert driver.logged("run") == ["run add", "run plain", "run add"]


@pytest.mark.parametrize("grid", [(0, 1, 1), (1, 65536, 1), (1 << 24, 1, 1)])
def test_launches_that_cannot_be(device: HipDevice, grid: tuple[int, ...]) -> None:
    device.load(MODULE, ["add"])
    says = rf"launch of add with grid {re.escape(str(grid))}, 256 threads, 0 bytes failed with hipErrorInvalidValue"
    with pytest.raises(DeviceError, match=says):
        device.launch("add", grid, 256, 0, numbers(0, 0, 0))


def test_a_function_that_is_not_there(device: HipDevice) -> None:
    with pytest.raises(DeviceError, match=r"hipModuleGetFunction\(ad\) failed with hipErrorNotFound"):
        device.load(MODULE, ["add", "ad"])


def test_kernels_of_another_gpu(driver: FakeDriver, device: HipDevice) -> None:
    driver.fail("hipModuleLoadData", 209)
    with pytest.raises(DeviceError, match=r"not for this GPU \(gfx90a\); compile the model for it"):
        device.load(MODULE, ["add"])


# Graphs


def recorded(driver: FakeDriver, device: HipDevice) -> tuple[Any, npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """A graph that adds what is in a pinned array to a sum on the device, and writes it to another array."""
    driver.kernels["add"] = add
    device.load(MODULE, ["add"])
    to, source = device.allocate(16, "sum"), device.allocate(16, "inputs")
    given, found = (device.pinned(16).view(np.int32) for _ in range(2))
    given[:], found[:] = 1, -1
    with device.capture() as graph:
        device.upload(source, given)
        device.launch("add", (1, 1, 1), 32, 0, numbers(to, source, 4))
        device.download(found, to)
    return graph, given, found


def test_a_graph_sees_new_content(driver: FakeDriver, device: HipDevice) -> None:
    graph, given, found = recorded(driver, device)
    device.synchronize()
    assert list(found) == [-1] * 4  # nothing was run
    given[:] = [1, 2, 3, 4]
    device.launch_graph(graph)
    device.synchronize()
    assert list(found) == [1, 2, 3, 4]
    given[:] = 10
    device.launch_graph(graph)
    device.launch_graph(graph)
    device.synchronize()
    assert list(found) == [21, 22, 23, 24]
    assert live(driver)["executable"] == 1
    assert "graph" not in live(driver)  # what was only needed to make it


def test_an_error_while_recording(driver: FakeDriver, device: HipDevice) -> None:
    address, held = device.allocate(64, "numbers"), device.pinned(64)
    with pytest.raises(ZeroDivisionError), device.capture():
        device.upload(address, held[: 1 // 0])
    with pytest.raises(DeviceError, match="hipErrorStreamCaptureUnsupported"), device.capture():
        device.synchronize()
    assert "graph" not in live(driver)
    device.upload(address, held)  # it goes on
    device.synchronize()


# Failures


def capture(device: HipDevice) -> None:
    with device.capture():
        pass


def begun(device: HipDevice) -> dict[str, Any]:
    """Something of everything."""
    device.load(MODULE, ["plain"])
    address, held = device.allocate(64, "numbers"), device.pinned(64)
    with device.capture() as graph:
        device.upload(address, held)
    return {"address": address, "held": held, "graph": graph}


CALLS: dict[str, Callable[[HipDevice, dict[str, Any]], object]] = {
    "hipDeviceGetName": lambda d, _: d.name,
    "hipMemGetInfo": lambda d, _: d.memory(),
    "hipMalloc": lambda d, _: d.allocate(64, "numbers"),
    "hipMemsetD8Async": lambda d, _: d.allocate(64, "numbers"),
    "hipFree": lambda d, b: d.free(b["address"]),
    "hipHostMalloc": lambda d, _: d.pinned(64),
    "hipMemcpyHtoDAsync": lambda d, b: d.upload(b["address"], b["held"]),
    "hipMemcpyDtoHAsync": lambda d, b: d.download(b["held"], b["address"]),
    "hipEventRecord": lambda d, _: d.mark(1),
    "hipEventSynchronize": lambda d, _: d.wait(0),
    "hipStreamSynchronize": lambda d, _: d.synchronize(),
    "hipModuleLoadData": lambda d, _: d.load(MODULE, ["plain"]),
    "hipModuleGetFunction": lambda d, _: d.load(MODULE, ["plain"]),
    "hipModuleLaunchKernel": lambda d, _: d.launch("plain", (1, 1, 1), 32, 0, []),
    "hipStreamBeginCapture": lambda d, _: capture(d),
    "hipStreamEndCapture": lambda d, _: capture(d),
    "hipGraphInstantiate": lambda d, _: capture(d),
    "hipGraphLaunch": lambda d, b: d.launch_graph(b["graph"]),
}
MAKING = ["hipStreamCreateWithFlags", "hipEventCreateWithFlags"]


@pytest.mark.parametrize("function", CALLS)
def test_each_failure_is_told(driver: FakeDriver, device: HipDevice, function: str) -> None:
    given = begun(device)
    driver.fail(function, 700)
    name = "launch of plain" if function == "hipModuleLaunchKernel" else function
    with pytest.raises(DeviceError, match=rf"^HIP: {name}.* failed with hipErrorIllegalAddress \(700\)"):
        CALLS[function](device, given)


@pytest.mark.parametrize("function", MAKING)
def test_a_start_that_fails_gives_back(driver: FakeDriver, function: str) -> None:
    driver.fail(function, 999, nth=2 if function == "hipEventCreateWithFlags" else 1)
    with pytest.raises(DeviceError, match=rf"^HIP: {function} failed with hipErrorUnknown \(999\)"):
        HipDevice()
    gc.collect()
    assert live(driver) == {}


def test_all_calls_are_tested() -> None:
    text = Path(hip.__file__).read_text()
    checked = set(re.findall(r"_check\(\s*f?\"(hip[A-Za-z0-9]+)", text)) | {"hipModuleLaunchKernel"}
    assert checked == {*CALLS, *MAKING}


# Giving back


def test_all_is_given_back(driver: FakeDriver) -> None:
    device = HipDevice()
    begun(device)
    device.allocate(100, "numbers")
    gone = weakref.ref(device)
    del device
    gc.collect()
    assert gone() is None
    assert live(driver) == {}
    assert driver.pending == 0


def test_pinned_memory_stays_while_it_is_used(driver: FakeDriver) -> None:
    device = HipDevice()
    array = device.pinned(100)
    array[:] = 7
    view = array.view(np.int32)[3:].reshape(2, 11)
    del device, array
    gc.collect()
    assert (view == 0x07070707).all()
    del view
    gc.collect()
    assert live(driver) == {}


def test_what_was_started_ends_before_memory_goes(driver: FakeDriver) -> None:
    driver.kernels["add"] = add
    device = HipDevice()
    device.load(MODULE, ["add"])
    address = device.allocate(1 << 16, "numbers")
    for _ in range(3):
        device.launch("add", (1, 1, 1), 32, 0, numbers(address, address, 1 << 14))
    del device
    gc.collect()
    assert len(driver.logged("run")) == 3
    assert live(driver) == {}


def test_another_thread_may_use_it(device: HipDevice) -> None:
    """AsyncEngine's does."""
    found: list[npt.NDArray[np.uint8]] = []

    def use() -> None:
        array = np.ones(64, np.uint8)
        device.download(array, device.allocate(64, "numbers"))
        device.synchronize()
        found.append(array)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert not found[0].any()


def test_a_graph_keeps_the_device(driver: FakeDriver) -> None:
    device = HipDevice()
    graph = begun(device)["graph"]
    again = weakref.ref(device)
    del device
    gc.collect()
    found = again()
    assert found is not None
    found.launch_graph(graph)
    found.synchronize()
    del found, graph
    gc.collect()
    assert live(driver) == {}
