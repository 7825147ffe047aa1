"""MetalDevice with stand-ins for PyObjC's modules that need no GPU: commands run when somebody waits, no earlier."""

import ctypes
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlcgen.errors import DeviceError, TargetError
from mlcgen.runtime import metal
from mlcgen.runtime.metal import MetalDevice


class Buffer:
    def __init__(self, size: int) -> None:
        self.data = bytearray(b"\xab" * size)  # not zero: Metal promises nothing

    def length(self) -> int:
        return len(self.data)

    def contents(self) -> Any:
        return SimpleNamespace(as_buffer=lambda size: memoryview(self.data)[:size])


class Encoder:
    """Of both kinds; what is encoded is done when the command buffer is."""

    def __init__(self, commands: "CommandBuffer", gpu: "Gpu") -> None:
        self.commands, self.gpu, self.is_open = commands, gpu, True
        self.pipeline, self.buffers, self.numbers = "", {}, b""

    def endEncoding(self) -> None:  # noqa: N802
        assert self.is_open
        self.is_open = False

    def copyFromBuffer_sourceOffset_toBuffer_destinationOffset_size_(  # noqa: N802
        self, source: Buffer, at: int, to: Buffer, offset: int, size: int
    ) -> None:
        assert self.is_open
        assert at + size <= source.length()
        assert offset + size <= to.length()

        def copy() -> None:
            to.data[offset : offset + size] = source.data[at : at + size]

        self.commands.calls.append(copy)

    def setComputePipelineState_(self, pipeline: str) -> None:  # noqa: N802
        self.pipeline, self.buffers, self.numbers = pipeline, {}, b""

    def setBuffer_offset_atIndex_(self, buffer: Buffer, offset: int, index: int) -> None:  # noqa: N802
        self.buffers[index] = (buffer, offset)

    def setBytes_length_atIndex_(self, numbers: bytes, length: int, index: int) -> None:  # noqa: N802
        assert length == len(numbers)
        assert index == len(self.buffers)
        self.numbers = numbers

    def dispatchThreadgroups_threadsPerThreadgroup_(  # noqa: N802
        self, grid: tuple[int, ...], block: tuple[int, ...]
    ) -> None:
        assert self.is_open
        given = [self.buffers[i] for i in range(len(self.buffers))]
        kernel, numbers, name = self.gpu.kernels[self.pipeline], self.numbers, self.pipeline
        self.gpu.launches.append((name, grid, block, len(given), numbers))
        self.commands.calls.append(lambda: kernel(given, numbers))


class CommandBuffer:
    def __init__(self, gpu: "Gpu") -> None:
        self.gpu, self.calls, self.encoders = gpu, [], []
        self.is_committed = False

    def _encoder(self) -> Encoder:
        assert not any(encoder.is_open for encoder in self.encoders), "one encoder at a time"
        self.encoders.append(Encoder(self, self.gpu))
        return self.encoders[-1]

    blitCommandEncoder = computeCommandEncoder = _encoder  # noqa: N815

    def commit(self) -> None:
        assert not self.is_committed
        assert not any(encoder.is_open for encoder in self.encoders)
        self.is_committed = True
        self.gpu.queued.append(self)

    def waitUntilCompleted(self) -> None:  # noqa: N802
        assert self.is_committed
        while self in self.gpu.queued:
            for call in self.gpu.queued.pop(0).calls:
                call()

    def status(self) -> int:
        return 5 if self.gpu.failure else 4

    def error(self) -> Any:
        return SimpleNamespace(localizedDescription=lambda: self.gpu.failure)


class Gpu:
    """MTLDevice, its command queue, and a library whose text is the kernels' names."""

    def __init__(self) -> None:
        self.kernels: dict[str, Callable[[list[tuple[Buffer, int]], bytes], None]] = {}
        self.queued: list[CommandBuffer] = []
        self.launches: list[tuple[Any, ...]] = []
        self.memory = 1 << 30
        self.failure = self.refused = ""
        self.fast_math = True

    def name(self) -> str:
        return "Apple Fake"

    def maxBufferLength(self) -> int:  # noqa: N802
        return 1 << 28

    def recommendedMaxWorkingSetSize(self) -> int:  # noqa: N802
        return 1 << 30

    def currentAllocatedSize(self) -> int:  # noqa: N802
        return (1 << 30) - self.memory

    def newCommandQueue(self) -> Any:  # noqa: N802
        return SimpleNamespace(commandBuffer=lambda: CommandBuffer(self))

    def newBufferWithLength_options_(self, size: int, options: int) -> Buffer | None:  # noqa: N802
        assert options == 0
        if size > self.memory:
            return None
        self.memory -= size
        return Buffer(size)

    def newLibraryWithSource_options_error_(self, text: str, options: Any, error: None) -> tuple[Any, Any]:  # noqa: N802
        assert not self.fast_math
        if text == "nonsense":
            return None, SimpleNamespace(localizedDescription=lambda: "unknown type name")
        return SimpleNamespace(functionNames=text.split, newFunctionWithName_=lambda name: name), None

    def newComputePipelineStateWithFunction_error_(self, function: str, error: None) -> tuple[Any, Any]:  # noqa: N802
        return (None, None) if function == self.refused else (function, None)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    found = Gpu()
    options = SimpleNamespace(setFastMathEnabled_=lambda on: setattr(found, "fast_math", on))
    module = ModuleType("Metal")
    vars(module).update(
        MTLCreateSystemDefaultDevice=lambda: found,
        MTLResourceStorageModeShared=0,
        MTLCommandBufferStatusError=5,
        MTLSizeMake=lambda x, y, z: (x, y, z),
        MTLCompileOptions=SimpleNamespace(alloc=lambda: SimpleNamespace(init=lambda: options)),
    )
    objc = ModuleType("objc")
    vars(objc).update(autorelease_pool=nullcontext)
    monkeypatch.setitem(sys.modules, "Metal", module)
    monkeypatch.setitem(sys.modules, "objc", objc)
    monkeypatch.setattr(sys, "platform", "darwin")
    metal._gpu.cache_clear()
    yield found
    metal._gpu.cache_clear()


@pytest.fixture
def device(gpu: Gpu) -> MetalDevice:
    return MetalDevice()


def add(buffers: list[tuple[Buffer, int]], numbers: bytes) -> None:
    """to[:n] += from[:n] * scale"""
    count, scale = struct.unpack("<if", numbers)
    (to, to_at), (source, at) = buffers
    values = np.frombuffer(source.data, np.int32, count, at) * int(scale)
    np.frombuffer(to.data, np.int32, count, to_at)[:] += values


def numbers(to: int, source: int, count: int) -> list[Any]:
    return [ctypes.c_uint64(to), ctypes.c_uint64(source), ctypes.c_int32(count), ctypes.c_float(2)]


def read(device: MetalDevice, address: int, count: int = 4) -> list[int]:
    found = np.full(count, -1, np.int32)
    device.download(found, address)
    device.synchronize()
    return [int(x) for x in found]


def test_what_the_device_is(device: MetalDevice) -> None:
    assert metal.missing() is None
    assert (device.name, device.largest_binding, device.symbols) == ("Apple Fake", 1 << 28, {"has_f16": 0})
    assert device.memory() == (1 << 30, 1 << 30)
    device.allocate(1 << 20, "numbers")
    assert device.memory() == ((1 << 30) - (1 << 20), 1 << 30)


def test_no_metal(monkeypatch: pytest.MonkeyPatch, gpu: Gpu) -> None:
    monkeypatch.setattr(sys.modules["Metal"], "MTLCreateSystemDefaultDevice", lambda: None)
    assert metal.missing() == "Metal finds no GPU"
    monkeypatch.setitem(sys.modules, "Metal", None)
    assert metal.missing() == "the package for Metal is not installed: pip install 'mlcgen[metal]'"
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(TargetError, match="Metal is part of macOS only; run on another target"):
        MetalDevice()


def test_allocated_memory_is_zero(device: MetalDevice) -> None:
    first, second = device.allocate(0, "nothing"), device.allocate(16, "numbers")
    assert first % metal.ALIGNMENT == second % metal.ALIGNMENT == 0
    assert first != second
    assert read(device, second) == [0] * 4


def test_round_trip_at_an_offset(device: MetalDevice) -> None:
    address = device.allocate(64, "numbers")
    device.upload(address + 16, np.arange(12, dtype=np.int32).reshape(3, 4))
    assert read(device, address, 16) == [0] * 4 + list(range(12))
    device.upload(address, np.zeros(0, np.float32))


def test_copies_beyond_what_was_allocated(device: MetalDevice) -> None:
    address = device.allocate(64, "numbers")
    for start in (
        lambda: device.upload(address, np.zeros(65, np.uint8)),
        lambda: device.upload(address - 1, np.zeros(1, np.uint8)),
        lambda: device.download(np.zeros(8, np.uint8), address + 60),
    ):
        with pytest.raises(DeviceError, match="no memory of this device"):
            start()
    device.free(address)
    with pytest.raises(DeviceError, match="no memory of this device"):
        device.upload(address, np.zeros(1, np.uint8))


def test_out_of_memory(gpu: Gpu, device: MetalDevice) -> None:
    with pytest.raises(DeviceError, match=r"no room for the KV pages: 1\.00 GiB wanted, of 0\.25 .*; lower num_pages"):
        device.allocate(1 << 30, "KV pages")
    gpu.memory = 100
    with pytest.raises(DeviceError, match=r"no room for the weights: .*; quantize further"):
        device.allocate(128, "weights")
    address = device.allocate(64, "numbers")
    with pytest.raises(DeviceError, match="no room for a copy of 64 bytes"):
        device.download(np.zeros(64, np.uint8), address)


def test_all_is_done_in_order(gpu: Gpu, device: MetalDevice) -> None:
    """A copy between two launches is seen by the second only, and arrays may change at once."""
    gpu.kernels["add"] = add
    device.load(b"add other", ["add"])
    to, source = device.allocate(16, "to"), device.allocate(32, "from")
    array = np.ones(4, np.int32)
    device.upload(source + 16, array)
    device.launch("add", (3, 2, 1), 128, 0, numbers(to, source + 16, 4))
    between = np.full(4, -1, np.int32)
    device.download(between, to)
    array[:] = 10
    device.upload(source + 16, array)
    array[:] = 0
    device.launch("add", [1, 1, 1], 64, 0, numbers(to, source + 16, 3), overlaps=True)
    assert list(between) == [-1] * 4  # nothing was run
    assert read(device, to) == [22, 22, 22, 2]
    assert list(between) == [2] * 4
    packed = [struct.pack("<if", count, 2) for count in (4, 3)]
    assert gpu.launches == [
        ("add", (3, 2, 1), (128, 1, 1), 2, packed[0]),
        ("add", (1, 1, 1), (64, 1, 1), 2, packed[1]),
    ]


def test_two_modules_with_a_function_of_one_name(gpu: Gpu, device: MetalDevice) -> None:
    gpu.kernels["add"] = add
    device.load(b"add other", ["add"])
    device.load(b"add", ["add"], "second:")
    to, source = device.allocate(16, "to"), device.allocate(16, "from")
    for name in ("add", "second:add"):
        device.launch(name, (1, 1, 1), 32, 0, numbers(to, source, 4))
    device.synchronize()
    assert [launch[0] for launch in gpu.launches] == ["add", "add"]


def test_a_copy_within_the_device(gpu: Gpu, device: MetalDevice) -> None:
    address = device.allocate(32, "numbers")
    device.upload(address, np.arange(4, dtype=np.int32))
    device.copy(address + 16, address, 16)
    device.upload(address, np.zeros(4, np.int32))
    assert read(device, address + 16) == [0, 1, 2, 3]


def test_marks(gpu: Gpu, device: MetalDevice) -> None:
    address = device.allocate(16, "numbers")
    device.wait(0)
    first, second = (np.full(4, -1, np.int32) for _ in range(2))
    device.download(first, address)
    device.mark(0)
    device.download(second, address)
    device.mark(1)
    device.wait(0)
    assert (list(first), list(second)) == ([0] * 4, [-1] * 4)
    device.wait(0)
    device.wait(1)
    assert list(second) == [0] * 4
    assert not gpu.queued


def test_many_launches_are_handed_over_in_pieces(gpu: Gpu, device: MetalDevice) -> None:
    gpu.kernels["add"] = add
    device.load(b"add", ["add"])
    to, source = device.allocate(16, "to"), device.allocate(16, "from")
    device.upload(source, np.ones(4, np.int32))
    for _ in range(metal.LAUNCHES + 1):
        device.launch("add", (1, 1, 1), 32, 0, numbers(to, source, 4))
    assert len(gpu.queued) == 1
    assert read(device, to) == [2 * metal.LAUNCHES + 2] * 4


def test_a_graph_sees_new_content(gpu: Gpu, device: MetalDevice) -> None:
    gpu.kernels["add"] = add
    device.load(b"add", ["add"])
    to, source, given = device.allocate(16, "to"), device.allocate(16, "from"), device.pinned(16).view(np.int32)
    found = np.full(4, -1, np.int32)
    with device.capture() as graph:
        device.upload(source, given)
        device.launch("add", (1, 1, 1), 32, 0, numbers(to, source, 4))
        device.download(found, to)
    device.synchronize()
    assert not gpu.launches
    given[:] = 5
    device.launch_graph(graph)
    given[:] = 7
    device.launch_graph(graph)
    device.synchronize()
    assert list(found) == [24] * 4


def test_an_error_while_recording(device: MetalDevice) -> None:
    with pytest.raises(ZeroDivisionError), device.capture():
        device.allocate(1 // 0, "numbers")
    assert read(device, device.allocate(16, "numbers")) == [0] * 4  # it goes on


def test_kernels_that_do_not_compile(gpu: Gpu, device: MetalDevice) -> None:
    with pytest.raises(DeviceError, match="Apple Fake does not take the kernels: unknown type name"):
        device.load(b"nonsense", [])
    with pytest.raises(DeviceError, match="kernels lack other; compile the model again"):
        device.load(b"add", ["add", "other"])
    gpu.refused = "add"
    device.load(b"add", ["add"])
    with pytest.raises(DeviceError, match="does not take the kernel add: no reason is given"):
        device.launch("add", (1, 1, 1), 32, 0, [])


def test_a_failure_on_the_gpu(gpu: Gpu, device: MetalDevice) -> None:
    device.download(np.zeros(4, np.int32), device.allocate(16, "numbers"))
    gpu.failure = "Caused GPU Hang Error"
    with pytest.raises(DeviceError, match="Apple Fake: Caused GPU Hang Error"):
        device.synchronize()
