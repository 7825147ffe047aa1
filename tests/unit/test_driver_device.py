"""What CudaDevice and HipDevice have in common, with drivers that need no GPU."""

import ctypes
import gc
import re
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mlcgen.errors import DeviceError
from mlcgen.runtime import driver_device
from mlcgen.runtime.driver_device import DriverDevice

from .fake_driver import MODULE, Cuda, FakeDriver, Hip, add, begun, numbers, recorded

DRIVERS = {"CUDA": Cuda(), "HIP": Hip()}


@pytest.fixture(params=DRIVERS)
def api(request: pytest.FixtureRequest) -> Cuda:
    return DRIVERS[request.param]


@pytest.fixture
def driver(api: Cuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeDriver:
    return api.install(monkeypatch, tmp_path)


@pytest.fixture
def device(api: Cuda, driver: FakeDriver) -> DriverDevice:
    return api.open()


def source(api: Cuda) -> str:
    """The text of what is tested here."""
    return Path(driver_device.__file__).read_text() + Path(str(api.module.__file__)).read_text()


def test_the_fake_has_what_is_used(api: Cuda, driver: FakeDriver) -> None:
    calls = re.findall(r'(?<!check\()"([A-Z][a-z]\w+)"', source(api))
    used = set(re.findall(rf'[".]({api.prefix}[A-Z]\w+)', source(api)))
    used |= {api.prefix + api.module._RENAMED.get(call, call) for call in calls}
    assert len(used) > 30
    assert [name for name in used if not hasattr(api.module._library(), name)] == []


# Memory


def test_allocated_memory_is_zero(device: DriverDevice) -> None:
    address = device.allocate(1000, "numbers")
    found = np.full(1000, 7, np.uint8)
    device.download(found, address)
    device.synchronize()
    assert not found.any()


def test_nothing_can_be_allocated(driver: FakeDriver, device: DriverDevice) -> None:
    before = device.memory()
    addresses = [device.allocate(0, "nothing") for _ in range(2)]
    assert addresses[0] != addresses[1]
    assert driver.live()["memory"] == 2
    for address in addresses:
        device.free(address)
    assert device.memory() == before


def test_free_gives_back(driver: FakeDriver, device: DriverDevice) -> None:
    before = device.memory()
    first, second = device.allocate(4096, "one"), device.allocate(512, "two")
    assert device.memory()[0] == before[0] - 4608
    device.free(first)
    assert driver.live()["memory"] == 1
    device.free(second)
    assert device.memory() == before
    with pytest.raises(KeyError):
        device.free(second)


def test_out_of_memory(driver: FakeDriver, device: DriverDevice) -> None:
    driver.set(memory=3 << 30)
    for _ in range(4):  # nothing is touched until somebody waits
        device.allocate(1 << 20, "weights")
    driver.set(memory=(3 << 30) + (4 << 20))
    says = r"no room for the KV pages: 5\.00 GiB wanted, 3\.00 of 3\.00 GiB free; lower num_pages"
    with pytest.raises(DeviceError, match=says):
        device.allocate(5 << 30, "KV pages")
    with pytest.raises(DeviceError, match=r"no room for the weights: .*; quantize further"):
        device.allocate(5 << 30, "weights")
    device.allocate(1 << 20, "weights")  # it goes on
    assert driver.live()["memory"] == 5


@pytest.mark.parametrize(
    "array",
    [
        np.arange(1, dtype=np.uint8),
        np.arange(-99, 1138, dtype=np.int32),
        np.arange(7 * 3 * 5, dtype=np.float16).reshape(7, 3, 5),
        np.zeros((0, 4), np.float32),
    ],
    ids=lambda a: f"{a.dtype}-{a.shape}",
)
@pytest.mark.parametrize("pinned", [False, True])
def test_round_trip(device: DriverDevice, array: npt.NDArray[Any], pinned: bool) -> None:
    address = device.allocate(array.nbytes, "numbers")
    sent, received = array.copy(), np.empty_like(array)
    if pinned:
        sent, received = (device.pinned(array.nbytes).view(array.dtype).reshape(array.shape) for _ in range(2))
        sent[...] = array
    device.upload(address, sent)
    device.download(received, address)
    device.synchronize()
    np.testing.assert_array_equal(received, array)


@pytest.mark.parametrize("num_bytes", [1, 210, 4948])
@pytest.mark.parametrize("pinned", [False, True])
def test_copy_within_the_device(device: DriverDevice, num_bytes: int, pinned: bool) -> None:
    address, elsewhere = device.allocate(num_bytes, "one"), device.allocate(num_bytes, "two")
    sent, received = (device.pinned(num_bytes) if pinned else np.zeros(num_bytes, np.uint8) for _ in range(2))
    sent[:] = np.arange(num_bytes) % 251
    device.upload(address, sent)
    device.copy(elsewhere, address, num_bytes)
    device.download(received, elsewhere)
    device.synchronize()
    np.testing.assert_array_equal(received, sent)


def test_copy_beyond_what_was_allocated(device: DriverDevice) -> None:
    address = device.allocate(64, "numbers")
    with pytest.raises(DeviceError, match=r"MemcpyDtoDAsync failed with \w*(?i:invalid_?value)"):
        device.copy(address, address + 32, 33)


def test_ordinary_memory_may_change_after_its_upload(device: DriverDevice) -> None:
    address, array = device.allocate(64, "numbers"), np.arange(16, dtype=np.int32)
    device.upload(address, array)
    array[:] = 0
    device.download(array, address)
    device.synchronize()
    assert list(array) == list(range(16))


def test_no_calls_for_empty_arrays(driver: FakeDriver, device: DriverDevice) -> None:
    empty = np.zeros(0, np.float32)
    device.upload(12345, empty)
    device.download(empty, 12345)
    assert not driver.logged("cuMemcpyHtoDAsync_v2")
    assert not driver.logged("cuMemcpyDtoHAsync_v2")


def test_copies_beyond_what_was_allocated(api: Cuda, device: DriverDevice) -> None:
    address, array = device.allocate(64, "numbers"), np.zeros(65, np.uint8)
    held = device.pinned(64)
    for call, start in (
        ("HtoD", lambda: device.upload(address, array)),
        ("HtoD", lambda: device.upload(address + 64, array[:1])),
        ("DtoH", lambda: device.download(array, address)),
        ("DtoH", lambda: device.download(held, address + 1)),
    ):
        says = rf"^{api.title}: {api.prefix}Memcpy{call}Async failed with {api.error('InvalidValue')} \(1\)$"
        with pytest.raises(DeviceError, match=says):
            start()


def test_freed_memory_is_not_there(api: Cuda, device: DriverDevice) -> None:
    address = device.allocate(64, "numbers")
    device.free(address)
    with pytest.raises(DeviceError, match=f"{api.prefix}MemcpyHtoDAsync failed with {api.error('InvalidValue')}"):
        device.upload(address, np.zeros(1))


def test_marks(driver: FakeDriver, device: DriverDevice) -> None:
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


@pytest.mark.parametrize("ahead", [0, 1])
def test_prefetches_run_beside_the_rest(driver: FakeDriver, device: DriverDevice, ahead: int) -> None:
    """A buffer is read, overwritten when that has ended, and read again when the new contents are there."""
    driver.set(ahead=ahead)
    address, found = device.allocate(64, "numbers"), [device.pinned(64) for _ in range(2)]
    held, released, loaded = device.pinned(64), device.fence(), device.fence()
    held[:] = 7
    device.download(found[0], address)
    device.reach(released)
    device.prefetch(address, held, released, loaded)
    device.hold(loaded)
    device.download(found[1], address)
    device.wait_for(loaded)
    held[:] = 8
    device.synchronize()
    assert (list(found[0]), list(found[1])) == ([0] * 64, [7] * 64)
    assert driver.live()["stream"] == 2


def test_a_fence_that_was_never_reached_is_passed(device: DriverDevice) -> None:
    fence = device.fence()
    device.hold(fence)
    device.wait_for(fence)
    device.prefetch(device.allocate(64, "numbers"), device.pinned(0), fence, fence)
    device.synchronize()


# Kernels


def test_launch(api: Cuda, driver: FakeDriver, device: DriverDevice) -> None:
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
        f"launch plain grid 1 1 7 block 1024 1 1 shared 0 attributes{api.overlaps}; args ?",
        "launch add grid 1 1 1 block 32 1 1 shared 0 attributes; args 8 8 4",
    ]
    assert driver.logged("run") == ["run add", "run plain", "run add"]


def test_two_modules_with_a_function_of_one_name(driver: FakeDriver, device: DriverDevice) -> None:
    device.load(b"plain(8) other", ["plain"])
    device.load(b"plain(4)", ["plain"], "second:")
    device.launch("second:plain", (1, 1, 1), 32, 0, [ctypes.c_int32(1)])
    device.launch("plain", (1, 1, 1), 32, 0, [ctypes.c_uint64(1)])
    assert [line.rpartition(" ")[2] for line in driver.logged("launch")] == ["4", "8"]


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
def test_launches_that_cannot_be(
    api: Cuda, device: DriverDevice, grid: tuple[int, ...], block: int, shared: int
) -> None:
    device.load(MODULE, ["add"])
    says = re.escape(f"launch of add with grid {grid}, {block} threads, {shared} bytes failed with ")
    with pytest.raises(DeviceError, match=says + api.error("InvalidValue")):
        device.launch("add", grid, block, shared, numbers(0, 0, 0))


def test_a_function_that_is_not_there(api: Cuda, device: DriverDevice) -> None:
    says = rf"{api.prefix}ModuleGetFunction\(ad\) failed with {api.error('NotFound')}"
    with pytest.raises(DeviceError, match=says):
        device.load(MODULE, ["add", "ad"])


def test_no_machine_code(api: Cuda, device: DriverDevice) -> None:
    with pytest.raises(DeviceError, match=f"{api.prefix}ModuleLoadData failed with {api.error('InvalidImage')}"):
        device.load(b"", ["add"])


# Graphs


def test_a_graph_sees_new_content(driver: FakeDriver, device: DriverDevice) -> None:
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


def test_a_graph_without_content(device: DriverDevice) -> None:
    graph = capture(device)
    device.launch_graph(graph)
    device.synchronize()


def wait_in_capture(device: DriverDevice) -> None:
    with device.capture():
        device._driver.function("StreamSynchronize")(device._stream)


def test_only_pinned_memory_in_graphs(api: Cuda, driver: FakeDriver, device: DriverDevice) -> None:
    address, array = device.allocate(64, "numbers"), np.zeros(64, np.uint8)
    for start in (lambda: device.upload(address, array), lambda: device.download(array, address), device.synchronize):
        with pytest.raises(DeviceError, match=api.error("StreamCaptureUnsupported")), device.capture():
            start()
    says = f"{api.prefix}StreamEndCapture failed with {api.error('StreamCaptureInvalidated')}"
    with pytest.raises(DeviceError, match=says):
        wait_in_capture(device)
    assert "graph" not in driver.live()
    device.upload(address, array)  # it goes on
    device.synchronize()


def test_an_error_while_recording(driver: FakeDriver, device: DriverDevice) -> None:
    address, held = device.allocate(64, "numbers"), device.pinned(64)
    with pytest.raises(ZeroDivisionError), device.capture():
        device.upload(address, held[: 1 // 0])
    held[:] = 3
    device.upload(address, held)
    held_too = device.pinned(64)
    device.download(held_too, address)
    device.synchronize()
    assert (held_too == 3).all()
    assert not {"graph", "executable"} & set(driver.live())


def test_a_graph_with_memory_that_was_freed(api: Cuda, device: DriverDevice) -> None:
    address, held = device.allocate(64, "numbers"), device.pinned(64)
    with device.capture() as graph:
        device.upload(address, held)
    device.free(address)
    device.launch_graph(graph)
    says = f"failed with {api.error('IllegalAddress')}"
    with pytest.raises(DeviceError, match=f"{api.prefix}StreamSynchronize {says}"):
        device.synchronize()
    with pytest.raises(DeviceError, match=f"{api.symbol('cuMemAlloc_v2').removesuffix('_v2')} {says}"):
        device.allocate(64, "more")  # after such an error nothing works


# Every call that fails


def capture(device: DriverDevice) -> Any:
    with device.capture() as graph:
        pass
    return graph


CALLS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {  # what makes a call, given what `begun` made
    "cuDeviceGetName": lambda d, _: d.name,
    "cuMemGetInfo_v2": lambda d, _: d.memory(),
    "cuMemAlloc_v2": lambda d, _: d.allocate(64, "more"),
    "cuMemsetD8Async": lambda d, _: d.allocate(64, "more"),
    "cuMemFree_v2": lambda d, b: d.free(b["address"]),
    "cuMemHostAlloc": lambda d, _: d.pinned(64),
    "cuMemcpyHtoDAsync_v2": lambda d, b: d.upload(b["address"], b["held"]),
    "cuMemcpyDtoDAsync_v2": lambda d, b: d.copy(b["address"], b["address"] + 32, 32),
    "cuMemcpyDtoHAsync_v2": lambda d, b: d.download(b["held"], b["address"]),
    "cuEventRecord": lambda d, _: d.mark(1),
    "cuEventSynchronize": lambda d, _: d.wait(0),
    "cuStreamSynchronize": lambda d, _: d.synchronize(),
    "cuStreamWaitEvent": lambda d, _: d.hold(d.fence()),
    "cuModuleLoadData": lambda d, _: d.load(MODULE, ["plain"]),
    "cuModuleGetFunction": lambda d, _: d.load(MODULE, ["plain"]),
    "cuLaunchKernelEx": lambda d, _: d.launch("plain", (1, 1, 1), 32, 0, []),
    "cuStreamBeginCapture_v2": lambda d, _: capture(d),
    "cuStreamEndCapture": lambda d, _: capture(d),
    "cuGraphInstantiateWithFlags": lambda d, _: capture(d),
    "cuGraphLaunch": lambda d, b: d.launch_graph(b["graph"]),
}
CUDA_CALLS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "cuDeviceGetAttribute": lambda d, _: d.load(b"*", []),
    "cuMemcpy3DAsync_v2": lambda d, b: d.upload_layers(b["address"], 32, b["held"].reshape(2, 1, 32)),
    "cuFuncGetAttribute": lambda d, _: d.load(MODULE, ["plain"]),
    "cuFuncSetAttribute": lambda d, _: d.load(MODULE, ["plain"]),
    "cuTensorMapEncodeTiled": lambda d, b: d.tensor_map(b["address"], "float16", (8, 2), (16,), (8, 1), 0),
}
MAKING = ["cuStreamCreate", "cuEventCreate"]
CUDA_MAKING = ["cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"]

each_call = pytest.mark.parametrize(
    ("api", "function"),
    [*(("CUDA", call) for call in CALLS | CUDA_CALLS), *(("HIP", call) for call in CALLS)],
    indirect=["api"],
)
each_making = pytest.mark.parametrize(
    ("api", "function"),
    [*(("CUDA", call) for call in MAKING + CUDA_MAKING), *(("HIP", call) for call in MAKING)],
    indirect=["api"],
)


def named(api: Cuda, function: str) -> str:
    return "launch of plain" if function == "cuLaunchKernelEx" else api.documented(function)


@each_call
def test_each_failure_is_told(api: Cuda, driver: FakeDriver, device: DriverDevice, function: str) -> None:
    given = begun(device)
    driver.fail(api.symbol(function), 700)
    says = rf"^{api.title}: {named(api, function)}.* failed with {api.error('IllegalAddress')} \(700\)"
    with pytest.raises(DeviceError, match=says):
        (CALLS | CUDA_CALLS)[function](device, given)


@each_making
def test_each_failure_at_the_start_is_told(api: Cuda, driver: FakeDriver, function: str) -> None:
    driver.fail(api.symbol(function), 999)  # an error that this driver has no name for
    says = f"{api.title}: {named(api, function)} failed with {api.unnamed_error} (999)"
    with pytest.raises(DeviceError, match=f"^{re.escape(says)}"):
        api.open()


def test_all_calls_are_tested(api: Cuda) -> None:
    calls = re.findall(r"(?:_call|_take|check|symbol)\(\s*[\"']([A-Z]\w+)", source(api))
    symbols = {api.prefix + api.module._RENAMED.get(call, call) for call in calls}
    symbols |= set(re.findall(r'error\(f?"(cu\w+)', source(api)))
    functions = {*CALLS, *MAKING} | ({*CUDA_CALLS, *CUDA_MAKING} if api.title == "CUDA" else set())
    checked = {symbol.removesuffix("_v2") for symbol in symbols} | {"launch of plain"}
    assert checked == {named(api, function) for function in functions}


# Giving back


def used(api: Cuda, driver: FakeDriver) -> DriverDevice:
    device = api.open()
    begun(device)
    device.allocate(100, "numbers")
    taken = {"memory": 2, "pinned": 1, "stream": 1, "event": 2, "module": 1, "executable": 1}
    assert driver.live() == taken | api.context
    return device


def test_all_is_given_back(api: Cuda, driver: FakeDriver) -> None:
    device = used(api, driver)
    gone = weakref.ref(device)
    del device
    gc.collect()
    assert gone() is None
    assert driver.live() == {}
    assert driver.pending == 0


def test_nothing_is_left_to_the_context(api: Cuda, driver: FakeDriver) -> None:
    """The context ends with its last user, which may be another library of this process."""
    used(api, driver)
    gc.collect()
    assert driver.logged("left:") == []


def test_all_modules_are_given_back(api: Cuda, driver: FakeDriver) -> None:
    device = used(api, driver)
    device.load(MODULE, ["add"])
    del device
    gc.collect()
    assert driver.live() == {}
    assert driver.logged("left:") == []


def test_two_devices_at_once(api: Cuda, driver: FakeDriver) -> None:
    first, second = used(api, driver), api.open()
    address = second.allocate(64, "numbers")
    del first
    gc.collect()
    assert driver.live() == {"memory": 1, "stream": 1, "event": 2} | api.context
    second.upload(address, np.zeros(64, np.uint8))
    second.synchronize()


def test_two_devices_one_after_the_other(api: Cuda, driver: FakeDriver) -> None:
    for _ in range(2):
        device = api.open()
        graph, given, found = recorded(driver, device)
        given[:] = 5
        device.launch_graph(graph)
        device.synchronize()
        assert list(found) == [5] * 4
        del device, graph, given, found
        gc.collect()
        assert driver.live() == {}


def test_pinned_memory_stays_while_it_is_used(api: Cuda, driver: FakeDriver) -> None:
    device = used(api, driver)
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


def test_a_graph_keeps_the_device(api: Cuda, driver: FakeDriver) -> None:
    device = api.open()
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


def test_what_was_started_ends_before_memory_goes(api: Cuda, driver: FakeDriver) -> None:
    driver.kernels["add"] = add
    device = api.open()
    device.load(MODULE, ["add"])
    address = device.allocate(1 << 16, "numbers")
    for _ in range(3):
        device.launch("add", (1, 1, 1), 32, 0, numbers(address, address, 1 << 14))
    del device
    gc.collect()
    assert len(driver.logged("run")) == 3
    assert driver.log.index("cuMemFree_v2") > max(i for i, line in enumerate(driver.log) if line == "run add")
    assert driver.live() == {}


def test_another_thread_gives_back(api: Cuda, driver: FakeDriver) -> None:
    made: list[DriverDevice] = []
    thread = threading.Thread(target=lambda: made.append(used(api, driver)))
    thread.start()
    thread.join()
    made.clear()
    gc.collect()
    assert driver.live() == {}
    assert not [line for line in driver.logged("left:") if line.endswith(("memory", "pinned", "module", "stream"))]


def test_errors_do_not_keep_memory(api: Cuda, driver: FakeDriver) -> None:
    device = used(api, driver)
    with pytest.raises(DeviceError):
        device.upload(1, np.zeros(8))
    driver.fail(f"{api.prefix}StreamSynchronize", 700)
    del device
    gc.collect()
    assert driver.live() == {}


@each_making
def test_a_start_that_fails_gives_back(api: Cuda, driver: FakeDriver, function: str) -> None:
    driver.fail(api.symbol(function), nth=2 if function == "cuEventCreate" else 1)
    with pytest.raises(DeviceError):
        api.open()
    gc.collect()
    assert driver.live() == {}


def test_memory_that_cannot_be_zeroed_is_given_back(api: Cuda, driver: FakeDriver) -> None:
    device, other = api.open(), api.open()
    driver.fail(f"{api.prefix}MemsetD8Async")
    with pytest.raises(DeviceError):
        device.allocate(64, "numbers")
    del device
    gc.collect()
    assert "memory" not in driver.live()
    other.synchronize()


@pytest.mark.parametrize("function", ["cuGraphInstantiateWithFlags", "cuMemcpyHtoDAsync_v2"])
def test_recording_that_fails_gives_back(api: Cuda, driver: FakeDriver, device: DriverDevice, function: str) -> None:
    address, held = device.allocate(64, "numbers"), device.pinned(64)
    driver.fail(api.symbol(function))
    with pytest.raises(DeviceError), device.capture():
        device.upload(address, held)
    assert "graph" not in driver.live()
