"""Apple's GPUs through Metal (PyObjC's package of that name), without TVM.

Kernels are one text in Metal's language, compiled by the system. A kernel's buffers have the indices 0, 1, ... in the
order of a launch's addresses, then come its numbers as one struct. Addresses are made up: kernels are given buffers,
so each buffer gets a range of addresses, and a lookup turns them back.
"""

import bisect
import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module  # these packages are on Apple's machines only
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcgen.errors import DeviceError, TargetError
from mlcgen.runtime.device import Address

INSTALL = "pip install 'mlcgen[metal]'"
ALIGNMENT = 256  # of addresses
LAUNCHES = 256  # that are handed over at once, at most


@functools.cache
def _gpu() -> Any:
    """Metal's device; raises TargetError where there is none."""
    if sys.platform != "darwin":
        raise TargetError("Metal is part of macOS only")
    try:
        found = import_module("Metal").MTLCreateSystemDefaultDevice()
    except ImportError as error:
        raise TargetError(f"the package for Metal is not installed: {INSTALL}") from error
    if found is None:
        raise TargetError("Metal finds no GPU")
    return found


def missing() -> str | None:
    """Why nothing runs on Metal here, or None."""
    try:
        _gpu()
    except TargetError as error:
        return str(error)
    return None


@dataclass(eq=False)
class Graph:
    """Recorded copies and launches: calls that start them."""

    calls: list[Callable[[], None]] = field(default_factory=list)


@dataclass
class _Commands:
    """What is handed over at once. `encoder` is open, of `kind`."""

    buffer: Any
    encoder: Any = None
    kind: str = ""
    launches: int = 0
    downloads: list[tuple[npt.NDArray[Any], Any]] = field(default_factory=list)  # to where, from a buffer


class MetalDevice:
    """The system's default GPU and its memory; see runtime.device.Device."""

    def __init__(self) -> None:
        """Raises TargetError where there is no GPU that can be used."""
        try:
            self._device = _gpu()
        except TargetError as error:
            raise TargetError(f"{error}; run on another target") from error
        self._queue = self._device.newCommandQueue()
        self.symbols: Mapping[str, int] = {"has_f16": 0}
        self.largest_binding = int(self._device.maxBufferLength())
        self._buffers: list[Any] = []  # by address
        self._starts: list[Address] = []
        self._end = ALIGNMENT
        self._functions: dict[str, tuple[Any, str]] = {}  # a kernel's library, and its own name
        self._pipelines: dict[str, Any] = {}
        self._commands: _Commands | None = None  # being put together
        self._started: list[_Commands] = []  # handed over, in order
        self._marks: list[_Commands | None] = [None, None]
        self._recording: Graph | None = None

    @property
    def name(self) -> str:
        return str(self._device.name())

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes, of those that the system recommends to use."""
        total = int(self._device.recommendedMaxWorkingSetSize())
        return max(total - int(self._device.currentAllocatedSize()), 0), total

    # Memory

    def allocate(self, num_bytes: int, purpose: str) -> Address:
        """See Device.allocate."""
        size = max(num_bytes, 16)
        buffer = self._new_buffer(size) if size <= self.largest_binding else None
        if buffer is None:
            weights = "quantize further (-q), or use a machine with more memory"
            remedy = weights if purpose.startswith("weights") else "lower num_pages or max_batch"
            raise DeviceError(
                f"{self.name} has no room for the {purpose}: {size / 2**30:.2f} GiB wanted, of "
                f"{self.largest_binding / 2**30:.2f} GiB at most for a buffer; {remedy}"
            )
        _bytes(buffer, size)[:] = 0
        start, self._end = self._end, self._end + -(-size // ALIGNMENT) * ALIGNMENT
        self._buffers.append(buffer)
        self._starts.append(start)
        return start

    def _new_buffer(self, num_bytes: int) -> Any:
        """Memory that CPU and GPU share; None where there is not enough."""
        Metal = import_module("Metal")
        return self._device.newBufferWithLength_options_(num_bytes, Metal.MTLResourceStorageModeShared)

    def free(self, address: Address) -> None:
        """See Device.free; what was started keeps the memory until it has ended."""
        index = self._starts.index(address)
        self._buffers.pop(index)
        self._starts.pop(index)

    def pinned(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Any memory: copies read it when they are started."""
        return np.zeros(num_bytes, np.uint8)

    def _located(self, address: Address, num_bytes: int = 1) -> tuple[Any, int]:
        """(buffer, offset in it)."""
        index = bisect.bisect_right(self._starts, address) - 1
        if index < 0 or address + num_bytes > self._starts[index] + int(self._buffers[index].length()):
            raise DeviceError(f"{num_bytes} bytes at {address:#x} are no memory of this device")
        return self._buffers[index], address - self._starts[index]

    def upload(self, to: Address, array: npt.NDArray[Any]) -> None:
        """See Device.upload; the array is read at once, or where a graph is recorded, when that is launched."""
        if array.nbytes:
            self._start(functools.partial(self._upload, to, array))

    def _upload(self, to: Address, array: npt.NDArray[Any]) -> None:
        buffer, offset = self._located(to, array.nbytes)
        raw = array.reshape(-1).view(np.uint8)
        if self._commands is None and not self._started:
            _bytes(buffer, offset + raw.nbytes)[offset:] = raw
            return
        held = self._temporary(raw.nbytes)  # what was started before must not see it
        _bytes(held, raw.nbytes)[:] = raw
        self._copy(held, 0, buffer, offset, raw.nbytes)

    def download(self, to: npt.NDArray[Any], source: Address) -> None:
        """See Device.download."""
        if to.nbytes:
            self._start(functools.partial(self._download, to, source))

    def _download(self, to: npt.NDArray[Any], source: Address) -> None:
        buffer, offset = self._located(source, to.nbytes)
        held = self._temporary(to.nbytes)
        self._copy(buffer, offset, held, 0, to.nbytes).downloads.append((to, held))

    def copy(self, to: Address, source: Address, num_bytes: int) -> None:
        """See Device.copy."""
        self._start(functools.partial(self._copy_within, to, source, num_bytes))

    def _copy_within(self, to: Address, source: Address, num_bytes: int) -> None:
        (here, start), (there, at) = self._located(source, num_bytes), self._located(to, num_bytes)
        self._copy(here, start, there, at, num_bytes)

    def _temporary(self, num_bytes: int) -> Any:
        buffer = self._new_buffer(num_bytes)
        if buffer is None:
            raise DeviceError(f"{self.name} has no room for a copy of {num_bytes} bytes; lower max_batch")
        return buffer

    def _copy(self, source: Any, source_offset: int, to: Any, offset: int, num_bytes: int) -> _Commands:
        commands = self._open("blit")
        commands.encoder.copyFromBuffer_sourceOffset_toBuffer_destinationOffset_size_(
            source, source_offset, to, offset, num_bytes
        )
        return commands

    # Kernels

    def load(self, module: bytes, names: Sequence[str], prefix: str = "") -> None:
        """The module is text in Metal's language. A kernel is made ready when it is first launched."""
        options = import_module("Metal").MTLCompileOptions.alloc().init()
        options.setFastMathEnabled_(False)  # sines of large angles, and infinities
        library, error = self._device.newLibraryWithSource_options_error_(module.decode(), options, None)
        if library is None:
            raise DeviceError(f"{self.name} does not take the kernels: {_text(error)}")
        if absent := set(names) - {str(name) for name in library.functionNames()}:
            raise DeviceError(f"the launch plan's kernels lack {min(absent)}; compile the model again")
        self._functions |= {prefix + name: (library, name) for name in names}

    def _pipeline(self, name: str) -> Any:
        if name not in self._pipelines:
            library, own_name = self._functions[name]
            function = library.newFunctionWithName_(own_name)
            pipeline, error = self._device.newComputePipelineStateWithFunction_error_(function, None)
            if pipeline is None:
                raise DeviceError(f"{self.name} does not take the kernel {name}: {_text(error)}")
            self._pipelines[name] = pipeline
        return self._pipelines[name]

    def launch(
        self, name: str, grid: Sequence[int], block: int, shared: int, args: Sequence[Any], overlaps: bool = False
    ) -> None:
        """See Device.launch; the kernel's text has its workgroup memory."""
        buffers = [self._located(arg.value) for arg in args if isinstance(arg, ctypes.c_uint64)]
        numbers = b"".join(bytes(arg) for arg in args if not isinstance(arg, ctypes.c_uint64))
        self._start(functools.partial(self._launch, self._pipeline(name), tuple(grid), block, buffers, numbers))

    def _launch(
        self, pipeline: Any, grid: tuple[int, ...], block: int, buffers: Sequence[tuple[Any, int]], numbers: bytes
    ) -> None:
        Metal = import_module("Metal")
        commands = self._open("compute")
        encoder = commands.encoder
        encoder.setComputePipelineState_(pipeline)
        for i, (buffer, offset) in enumerate(buffers):
            encoder.setBuffer_offset_atIndex_(buffer, offset, i)
        if numbers:
            encoder.setBytes_length_atIndex_(numbers, len(numbers), len(buffers))
        threads = Metal.MTLSizeMake(block, 1, 1)
        encoder.dispatchThreadgroups_threadsPerThreadgroup_(Metal.MTLSizeMake(*grid), threads)
        commands.launches += 1
        if commands.launches == LAUNCHES:
            self._hand_over()

    # Order

    def _start(self, call: Callable[[], None]) -> None:
        if self._recording is None:
            call()
        else:
            self._recording.calls.append(call)

    @contextlib.contextmanager
    def capture(self) -> Iterator[Graph]:
        """See Device.capture."""
        self._recording = graph = Graph()
        try:
            yield graph
        finally:
            self._recording = None

    def launch_graph(self, graph: Graph) -> None:
        """See Device.launch_graph."""
        for call in graph.calls:
            call()
        self._hand_over()  # the GPU can begin while the rest of a step is prepared

    def _open(self, kind: str) -> _Commands:
        """Commands with an encoder for copies (blit) or kernels (compute). Metal runs them in order."""
        # The pool lets go of what Metal would keep until the thread ends; Python holds what is still used.
        with import_module("objc").autorelease_pool():
            if self._commands is None:
                self._commands = _Commands(self._queue.commandBuffer())
            commands = self._commands
            if commands.kind != kind:
                if commands.encoder is not None:
                    commands.encoder.endEncoding()
                make = commands.buffer.blitCommandEncoder if kind == "blit" else commands.buffer.computeCommandEncoder
                commands.encoder, commands.kind = make(), kind
        return commands

    def _hand_over(self) -> None:
        commands, self._commands = self._commands, None
        if commands is not None:
            commands.encoder.endEncoding()
            commands.encoder = None
            commands.buffer.commit()
            self._started.append(commands)

    def mark(self, which: int) -> None:
        """See Device.mark."""
        self._hand_over()
        self._marks[which] = self._started[-1] if self._started else None

    def wait(self, which: int) -> None:
        """Until all is done that was started before the mark. Raises DeviceError for what failed in it."""
        marked = self._marks[which]
        while any(commands is marked for commands in self._started):
            self._finish(self._started.pop(0))

    def synchronize(self) -> None:
        """See Device.synchronize."""
        self._hand_over()
        while self._started:
            self._finish(self._started.pop(0))

    def _finish(self, commands: _Commands) -> None:
        commands.buffer.waitUntilCompleted()
        if commands.buffer.status() == import_module("Metal").MTLCommandBufferStatusError:
            raise DeviceError(f"{self.name}: {_text(commands.buffer.error())}")
        for to, held in commands.downloads:
            to.reshape(-1).view(np.uint8)[:] = _bytes(held, to.nbytes)


def _bytes(buffer: Any, num_bytes: int) -> npt.NDArray[np.uint8]:
    """The first bytes of a buffer, where they are."""
    return np.frombuffer(buffer.contents().as_buffer(num_bytes), np.uint8)


def _text(error: Any) -> str:
    return str(error.localizedDescription())[:400] if error is not None else "no reason is given"
