"""A GPU through WebGPU (the package wgpu): Vulkan, Metal or Direct3D 12, without TVM.

Kernels are WGSL, each a module of its own: buffers in the order of a launch's addresses, then its numbers as one
uniform struct. Addresses are made up: WebGPU has none, so each buffer gets a range of them, and a lookup turns them
back.
"""

import bisect
import contextlib
import ctypes
import functools
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcgen.errors import ArtifactError, DeviceError, TargetError
from mlcgen.runtime import wgpu_native
from mlcgen.runtime.device import Address

INSTALL = "pip install 'mlcgen[vulkan]'"
SLOT = 256  # bytes between the numbers of two launches, and what addresses are multiples of: any device's alignment
LAUNCHES = 1024  # that are handed over at once, at most
MOST_GROUPS = 8192  # bind groups kept for the next step
_BINDING = re.compile(r"@binding\((\d+)\)\s*var<(storage, read_write|storage, read|uniform)>")
_BINDING_TYPES = {"storage, read_write": "storage", "storage, read": "read-only-storage", "uniform": "uniform"}
# What kernels may be bound to and hold, as much as the device has.
_LIMITS = ("max-storage-buffer-binding-size", "max-buffer-size", "max-compute-workgroup-storage-size")
# Features that kernels use where the device has them: symbol of the plan's sizes -> feature.
_FEATURES = {"has_f16": "shader-f16"}


@dataclass(frozen=True)
class Adapter:
    """What there is to run on."""

    name: str
    driver: str
    backend: str  # Vulkan, Metal, D3D12
    is_software: bool
    features: tuple[str, ...]  # of those that kernels use


@functools.cache
def _adapter() -> Any:
    """wgpu's; raises TargetError where there is none."""
    try:
        import wgpu
    except ImportError as error:
        raise TargetError(f"the package wgpu is not installed: {INSTALL}") from error
    except OSError as error:
        raise TargetError(f"the package wgpu cannot load its library: {error}") from error
    os.environ.setdefault("XDG_RUNTIME_DIR", tempfile.gettempdir())  # Mesa complains on stderr where it is not set
    try:
        return wgpu.gpu.request_adapter_sync(power_preference="high-performance")
    except (RuntimeError, OSError) as error:
        remedy = "install a Vulkan driver (Debian: mesa-vulkan-drivers libvulkan1)"
        raise TargetError(f"WebGPU finds no device: {error}; {remedy}") from error


def missing() -> str | None:
    """Why nothing runs WGSL here, or None."""
    try:
        _adapter()
    except TargetError as error:
        return str(error)
    return None


def adapter() -> Adapter | None:
    """The device that would be used, or None."""
    if missing():
        return None
    found = _adapter()
    info, features = found.info, tuple(name for name in _FEATURES.values() if name in found.features)
    driver = str(info["description"])
    return Adapter(str(info["device"]), driver, str(info["backend_type"]), info["adapter_type"] == "CPU", features)


@dataclass(eq=False)
class _Buffer:
    start: Address
    num_bytes: int
    wgpu: Any


@dataclass
class _Pipeline:
    pipeline: Any
    layout: Any  # of its bind group
    num_buffers: int
    has_numbers: bool


@dataclass
class _Call:
    """A launch: which kernel, on what, how often."""

    kernel: _Pipeline
    addresses: tuple[Address, ...]
    numbers: bytes
    grid: tuple[int, ...]


class _Numbers:
    """A uniform buffer with a slot for the numbers of each of `count` launches, and the bind groups that hold it."""

    def __init__(self, device: "WebgpuDevice", count: int) -> None:
        self.wgpu = device.uniform_buffer(max(count, 1) * SLOT)
        self.groups: dict[tuple[Any, ...], Any] = {}


@dataclass(eq=False)
class Graph:
    """Recorded copies to the device, and launches after them."""

    uploads: list[tuple[Address, npt.NDArray[Any]]] = field(default_factory=list)
    calls: list[_Call] = field(default_factory=list)
    numbers: Any = None  # _Numbers
    ready: Any = None  # commands that can be submitted once: WebGPU has none that can be submitted again


@dataclass(eq=False)
class _Downloads:
    """Copies to the host: to where, and from where in a buffer that the host can read."""

    staging: Any = None
    copies: list[tuple[npt.NDArray[Any], int]] = field(default_factory=list)
    end: int = 0  # of what is in use of the buffer
    submission: int = 0  # with which they have ended


class WebgpuDevice:
    """One device and its memory; see runtime.device.Device."""

    def __init__(self) -> None:
        """Raises TargetError where there is no device that can be used."""
        adapter = _adapter()
        features = [name for name in _FEATURES.values() if name in adapter.features]
        limits = {name: adapter.limits[name] for name in _LIMITS}
        try:
            self._device = adapter.request_device_sync(required_features=features, required_limits=limits)
        except RuntimeError as error:
            raise TargetError(f"WebGPU cannot use {self.name}: {error}") from error
        self.symbols: Mapping[str, int] = {symbol: int(name in features) for symbol, name in _FEATURES.items()}
        self.largest_binding = limits["max-storage-buffer-binding-size"] // SLOT * SLOT
        self._largest_buffer = limits["max-buffer-size"]
        self._buffers: list[_Buffer] = []  # by address
        self._starts: list[Address] = []
        self._end = SLOT
        self._texts: dict[str, tuple[str, str]] = {}  # a kernel's own name, and its text
        self._pipelines: dict[str, _Pipeline] = {}
        self._numbers = _Numbers(self, LAUNCHES)
        self._calls: list[_Call] = []  # not yet handed over
        self._commands: list[Any] = []  # likewise, before the calls
        self._replayed: list[Graph] = []  # since the last wait
        self._recording: Graph | None = None
        self._submission = 0  # the last one
        self._between: Any = None  # for copies within a buffer
        self._downloads = _Downloads()  # not yet marked
        self._marked: list[_Downloads | None] = [None, None]
        self._idle: list[_Downloads] = []  # whose buffers can be used again

    @property
    def name(self) -> str:
        return str(_adapter().info["device"])

    def memory(self) -> None:
        """WebGPU does not tell."""

    # Memory

    def allocate(self, num_bytes: int, purpose: str) -> Address:
        """See Device.allocate."""
        import wgpu

        size = -(-max(num_bytes, 16) // 16) * 16
        if size > self._largest_buffer:
            most = f"{self.name} has buffers of {self._largest_buffer / 2**30:.2f} GiB at most"
            raise DeviceError(f"no room for the {purpose}: {size / 2**30:.2f} GiB wanted, {most}; {_remedy(purpose)}")
        usage = wgpu.BufferUsage.STORAGE | wgpu.BufferUsage.COPY_DST | wgpu.BufferUsage.COPY_SRC
        try:
            buffer = self._device.create_buffer(size=size, usage=usage)
        except (wgpu.GPUError, RuntimeError) as error:
            wanted = f"{size / 2**30:.2f} GiB wanted"
            raise DeviceError(f"{self.name} has no room for the {purpose}: {wanted}; {_remedy(purpose)}") from error
        start, self._end = self._end, self._end + -(-size // SLOT) * SLOT
        self._buffers.append(_Buffer(start, size, buffer))
        self._starts.append(start)
        return start

    def free(self, address: Address) -> None:
        """See Device.free."""
        index = self._starts.index(address)
        self._flush()
        self._buffers.pop(index).wgpu.destroy()
        self._starts.pop(index)

    def pinned(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Any memory: WebGPU copies through its own."""
        return np.zeros(max(num_bytes, 16), np.uint8)

    def uniform_buffer(self, num_bytes: int) -> Any:
        import wgpu

        return self._device.create_buffer(size=num_bytes, usage=wgpu.BufferUsage.UNIFORM | wgpu.BufferUsage.COPY_DST)

    def upload(self, to: Address, array: npt.NDArray[Any]) -> None:
        """See Device.upload; the array is read at once, or where a graph is recorded, when that is launched."""
        if self._recording is not None:
            assert not self._recording.calls, "copies come before launches"
            self._recording.uploads.append((to, array))
            return
        self._flush()  # or what was started before would see it
        self._write(to, array)

    def _write(self, to: Address, array: npt.NDArray[Any]) -> None:
        raw = array.reshape(-1).view(np.uint8)
        if raw.nbytes % 4:
            raw = np.concatenate([raw, np.zeros(-raw.nbytes % 4, np.uint8)])
        buffer = self._buffer(to)
        self._device.queue.write_buffer(buffer.wgpu, to - buffer.start, raw)

    def download(self, to: npt.NDArray[Any], source: Address) -> None:
        """See Device.download."""
        size, buffer = -(-to.nbytes // 4) * 4, self._buffer(source)
        self._make_room(size)
        downloads, encoder = self._downloads, self._encoded_calls()
        encoder.copy_buffer_to_buffer(buffer.wgpu, source - buffer.start, downloads.staging, downloads.end, size)
        self._commands.append(encoder.finish())
        downloads.copies.append((to, downloads.end))
        downloads.end += -(-size // SLOT) * SLOT

    def copy(self, to: Address, source: Address, num_bytes: int) -> None:
        """See Device.copy. WebGPU does not copy within a buffer, so it goes by way of another."""
        import wgpu

        size = -(-num_bytes // 4) * 4
        if self._between is None or self._between.size < size:
            usage = wgpu.BufferUsage.COPY_SRC | wgpu.BufferUsage.COPY_DST
            self._between = self._device.create_buffer(size=size, usage=usage)
        here, there, encoder = self._buffer(source), self._buffer(to), self._encoded_calls()
        encoder.copy_buffer_to_buffer(here.wgpu, source - here.start, self._between, 0, size)
        encoder.copy_buffer_to_buffer(self._between, 0, there.wgpu, to - there.start, size)
        self._commands.append(encoder.finish())

    def _make_room(self, num_bytes: int) -> None:
        """For so many bytes more in the buffer that the host can read."""
        import wgpu

        downloads = self._downloads
        if downloads.staging is None or downloads.staging.size < downloads.end + num_bytes:
            size = max(SLOT, 1 << (downloads.end + num_bytes - 1).bit_length())  # else it grows with each copy
            self.synchronize()
            usage = wgpu.BufferUsage.MAP_READ | wgpu.BufferUsage.COPY_DST
            self._downloads.staging = self._device.create_buffer(size=size, usage=usage)

    def _buffer(self, address: Address) -> _Buffer:
        index = bisect.bisect_right(self._starts, address) - 1
        found = self._buffers[index] if index >= 0 else None
        if found is None or address >= found.start + found.num_bytes:
            raise DeviceError(f"{address:#x} is no memory of this device")
        return found

    # Kernels

    def load(self, module: bytes, names: Sequence[str], prefix: str = "") -> None:
        """The module is JSON: function -> WGSL. A kernel is compiled when it is first launched."""
        try:
            texts = json.loads(module)
            self._texts |= {prefix + name: (name, texts[name]) for name in names}
        except (ValueError, LookupError, TypeError) as error:
            raise ArtifactError(f"the launch plan's kernels cannot be read: {error!r:.200}; compile again") from error
        if not all(isinstance(text, str) for _, text in self._texts.values()):
            raise ArtifactError("the launch plan's kernels are no texts; compile the model again")

    def _pipeline(self, name: str) -> _Pipeline:
        import wgpu

        if name in self._pipelines:
            return self._pipelines[name]
        entry, text = self._texts[name]
        kinds = [_BINDING_TYPES[kind] for _, kind in sorted((int(i), kind) for i, kind in _BINDING.findall(text))]
        entries = [
            {
                "binding": i,
                "visibility": wgpu.ShaderStage.COMPUTE,
                "buffer": {"type": kind, "has_dynamic_offset": kind == "uniform"},
            }
            for i, kind in enumerate(kinds)
        ]
        has_numbers = kinds[-1:] == ["uniform"]
        try:
            layout = self._device.create_bind_group_layout(entries=entries)
            shader = wgpu_native.unchecked_module(self._device, text)
            pipeline = self._device.create_compute_pipeline(
                layout=self._device.create_pipeline_layout(bind_group_layouts=[layout]),
                compute={"module": shader, "entry_point": entry},
            )
        except (wgpu.GPUError, wgpu.GPUPipelineError, RuntimeError, ValueError) as error:
            raise DeviceError(f"{self.name} does not take the kernel {name}: {str(error)[:400]}") from error
        self._pipelines[name] = _Pipeline(pipeline, layout, len(kinds) - has_numbers, has_numbers)
        return self._pipelines[name]

    def launch(
        self, name: str, grid: Sequence[int], block: int, shared: int, args: Sequence[Any], overlaps: bool = False
    ) -> None:
        """See Device.launch; the kernel's text has the block's size, and workgroup memory."""
        kernel = self._pipeline(name)
        addresses = tuple(arg.value for arg in args if isinstance(arg, ctypes.c_uint64))
        numbers = b"".join(bytes(arg) for arg in args if not isinstance(arg, ctypes.c_uint64))
        if len(addresses) != kernel.num_buffers or bool(numbers) != kernel.has_numbers or len(numbers) > SLOT:
            raise DeviceError(f"the launch plan gives the kernel {name} other arguments than it has")
        call = _Call(kernel, addresses, numbers + bytes(-len(numbers) % 16), tuple(grid))
        if self._recording is not None:
            self._recording.calls.append(call)
            return
        self._calls.append(call)
        if len(self._calls) == LAUNCHES:
            self._flush()

    @contextlib.contextmanager
    def capture(self) -> Iterator[Graph]:
        """What is started inside is recorded, not run: launch the graph afterwards, as often as wanted."""
        self._recording = graph = Graph()
        try:
            yield graph
        finally:
            self._recording = None
        graph.numbers = _Numbers(self, len(graph.calls))
        self._write_numbers(graph.numbers, graph.calls)

    def launch_graph(self, graph: Graph) -> None:
        """See Device.launch_graph."""
        self._flush()
        for to, array in graph.uploads:
            self._write(to, array)
        self._commands.append(graph.ready or self._encode(graph.calls, graph.numbers).finish())
        graph.ready = None
        self._replayed.append(graph)
        self._flush()  # the device can begin while the rest of a step is prepared

    def _encoded_calls(self) -> Any:
        """An encoder that holds the calls so far."""
        calls, self._calls = self._calls, []
        if calls:
            self._write_numbers(self._numbers, calls)
        return self._encode(calls, self._numbers)

    def _write_numbers(self, numbers: _Numbers, calls: Sequence[_Call]) -> None:
        data = b"".join(call.numbers.ljust(SLOT, b"\0") for call in calls)
        if data:
            self._device.queue.write_buffer(numbers.wgpu, 0, data)

    def _encode(self, calls: Sequence[_Call], numbers: _Numbers) -> Any:
        encoder = self._device.create_command_encoder()
        if not calls:
            return encoder
        kernels = encoder.begin_compute_pass()
        for slot, call in enumerate(calls):
            kernels.set_pipeline(call.kernel.pipeline)
            offsets = [slot * SLOT] if call.kernel.has_numbers else []
            kernels.set_bind_group(0, self._group(call, numbers), offsets)
            kernels.dispatch_workgroups(*call.grid)
        kernels.end()
        return encoder

    def _group(self, call: _Call, numbers: _Numbers) -> Any:
        key = (id(call.kernel), call.addresses, len(call.numbers))
        if len(numbers.groups) > MOST_GROUPS:
            numbers.groups.clear()
        if key not in numbers.groups:
            entries = []
            for i, address in enumerate(call.addresses):
                buffer = self._buffer(address)
                offset = address - buffer.start
                size = min(buffer.num_bytes - offset, self.largest_binding)
                entries.append({"binding": i, "resource": {"buffer": buffer.wgpu, "offset": offset, "size": size}})
            if call.kernel.has_numbers:
                resource = {"buffer": numbers.wgpu, "offset": 0, "size": len(call.numbers)}
                entries.append({"binding": len(entries), "resource": resource})
            numbers.groups[key] = self._device.create_bind_group(layout=call.kernel.layout, entries=entries)
        return numbers.groups[key]

    # Order

    def _flush(self) -> None:
        """Hand over all that was started."""
        import wgpu

        try:
            if self._calls:
                self._commands.append(self._encoded_calls().finish())
            if self._commands:
                self._submission = wgpu_native.submit(self._device, self._commands)
        except (wgpu.GPUError, RuntimeError) as error:
            raise DeviceError(f"{self.name}: {str(error)[:400]}") from error
        finally:
            self._commands = []

    def synchronize(self) -> None:
        """See Device.synchronize."""
        self._flush()
        self._prepare_replays()
        downloads, self._downloads = self._downloads, _Downloads()
        downloads.submission = self._submission
        for which in range(len(self._marked)):
            self.wait(which)
        self._finish(downloads)
        self._downloads = self._idle.pop()

    def mark(self, which: int) -> None:
        """See Device.mark."""
        self._flush()
        self._downloads.submission = self._submission
        self._marked[which] = self._downloads
        self._downloads = self._idle.pop() if self._idle else _Downloads()

    def wait(self, which: int) -> None:
        """Until all is done that was started before the mark. Raises DeviceError for what failed in it."""
        downloads, self._marked[which] = self._marked[which], None
        if downloads is not None:
            self._prepare_replays()
            self._finish(downloads)

    def _prepare_replays(self) -> None:
        """Most likely what was launched comes again: while the device is busy, its commands are free."""
        replayed, self._replayed = self._replayed, []
        for graph in replayed:
            if graph.ready is None:
                graph.ready = self._encode(graph.calls, graph.numbers).finish()

    def _finish(self, downloads: _Downloads) -> None:
        """Wait, and hand over what was copied."""
        import wgpu

        copies, end = downloads.copies, downloads.end
        downloads.copies, downloads.end = [], 0
        self._idle.append(downloads)
        try:
            if not copies:
                wgpu_native.wait(self._device, downloads.submission)
                return
            with wgpu_native.Mapped(self._device, downloads.staging, end, downloads.submission) as held:
                for to, offset in copies:
                    to.reshape(-1).view(np.uint8)[:] = held[offset : offset + to.nbytes]
        except (wgpu.GPUError, RuntimeError) as error:
            raise DeviceError(f"{self.name}: {error}") from error


def _remedy(purpose: str) -> str:
    if purpose.startswith("weights"):
        return "quantize further (-q), or use a GPU with more memory"
    return "lower num_pages or max_batch"
