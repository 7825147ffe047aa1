"""A GPU through the C API of its driver: what CUDA's and HIP's have in common.

HIP's functions are those of the CUDA driver under other names, so here calls have the names of NVIDIA's documentation
without their prefix, and a `Driver` knows what its library calls them. Numbers of errors and flags are the same.
"""

import contextlib
import ctypes
import functools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcgen.errors import DeviceError
from mlcgen.runtime.device import Address

_SIZE, _PTR, _UINT = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_uint

NO_DEVICE = 100
_OUT_OF_MEMORY = 2
_CAPTURE_RELAXED = 2
_NON_BLOCKING = 1
_NO_TIMING = 2

_ARGUMENTS: Mapping[str, Sequence[Any]] = {  # of calls that are given addresses or sizes: ctypes would pass an int
    "MemAlloc": [_PTR, _SIZE],
    "MemHostAlloc": [_PTR, _SIZE, _UINT],
    "MemsetD8Async": [_PTR, ctypes.c_ubyte, _SIZE, _PTR],
    "MemcpyHtoDAsync": [_PTR, _PTR, _SIZE, _PTR],
    "MemcpyDtoHAsync": [_PTR, _PTR, _SIZE, _PTR],
    "MemcpyDtoDAsync": [_PTR, _PTR, _SIZE, _PTR],
}


class CallError(DeviceError):
    """A call of a driver that failed, with the driver's number for it."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(eq=False)
class Driver:
    """A driver's library, and what is particular to it about calls that both drivers have."""

    title: str  # in errors
    library: Any
    prefix: str  # of functions
    renamed: Mapping[str, str]  # calls that the library has under another name
    error_name: Callable[[Any, int], str]  # given the library and a call's status

    def __post_init__(self) -> None:
        self.function = functools.cache(self._function)  # each step calls some
        for call, arguments in _ARGUMENTS.items():
            self.function(call).argtypes = arguments

    def _function(self, call: str) -> Any:
        return getattr(self.library, self.symbol(call))

    def symbol(self, call: str) -> str:
        return self.prefix + self.renamed.get(call, call)

    def check(self, call: str, status: int) -> None:
        if status:
            raise self.error(self.symbol(call).removesuffix("_v2"), status)  # as it is documented

    def error(self, what: str, status: int) -> CallError:
        name = self.error_name(self.library, status)
        return CallError(f"{self.title}: {what} failed with {name} ({status})", status)


_Taken = Mapping[str, dict[int | None, Any]]  # by the call that gives back, handles by their values


class Graph:
    """A recorded sequence of copies and kernels."""

    def __init__(self, device: object) -> None:
        self._device = device  # which lives as long as the graph
        self.executable = _PTR()


class DriverDevice(ABC):
    """One GPU, one stream, and the memory that was taken from it; see runtime.device.Device."""

    symbols: Mapping[str, int] = {}
    largest_binding = 1 << 48  # addresses reach everywhere

    _ENDS: Sequence[str] = (  # calls that give back what was taken, in this order
        "StreamSynchronize",
        "GraphExecDestroy",
        "EventDestroy",
        "MemFree",
        "MemFreeHost",
        "ModuleUnload",
        "StreamDestroy",
    )

    def __init__(self, driver: Driver) -> None:
        """Nothing is taken yet: `_open_stream` follows."""
        self._driver, self._device = driver, 0
        self._taken: _Taken = {call: {} for call in self._ENDS}
        finalizer = weakref.finalize(self, _give_back, driver, self._taken)  # also of a device that fails to open
        finalizer.atexit = False  # a thread may be in a step then; with the process all goes anyway
        self._functions: dict[str, ctypes.c_void_p] = {}
        self._copies: ctypes.c_void_p | None = None  # a stream beside the other, for prefetches

    def _open_stream(self) -> None:
        self._stream = self._take("StreamCreate", "StreamDestroy", _NON_BLOCKING)
        self._owe("StreamSynchronize", self._stream)
        self._events = [self._take("EventCreate", "EventDestroy", _NO_TIMING) for _ in range(2)]

    def _call(self, call: str, *args: Any) -> None:
        self._driver.check(call, self._driver.function(call)(*args))

    def _take(self, call: str, end: str, *args: Any) -> ctypes.c_void_p:
        """What the call makes, to be given back by another, `end`."""
        taken = _PTR()
        self._call(call, ctypes.byref(taken), *args)
        self._owe(end, taken)
        return taken

    def _owe(self, end: str, taken: Any) -> None:
        """`end` is to be called with what was taken when nobody uses the device any more."""
        self._taken[end][taken.value] = taken

    @property
    def name(self) -> str:
        buffer = ctypes.create_string_buffer(256)
        self._call("DeviceGetName", buffer, 256, self._device)
        return buffer.value.decode()

    # Memory

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes."""
        free, total = _SIZE(), _SIZE()
        self._call("MemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def allocate(self, num_bytes: int, purpose: str) -> Address:
        """See Device.allocate."""
        size = max(num_bytes, 16)
        try:
            pointer = self._take("MemAlloc", "MemFree", size)
        except CallError as error:
            if error.status == _OUT_OF_MEMORY:
                raise self._no_room(num_bytes, purpose) from error
            raise
        assert pointer.value is not None
        self._call("MemsetD8Async", pointer, 0, size, self._stream)
        return pointer.value

    def _no_room(self, num_bytes: int, purpose: str) -> DeviceError:
        free, total = self.memory()
        lower = "lower num_pages, --gpu-memory-utilization or max_batch"
        stream = "quantize further (-q), or keep layers on the host (--weight-memory)"
        remedy = stream if purpose.startswith("weights") else lower
        return DeviceError(
            f"the GPU has no room for the {purpose}: {num_bytes / 2**30:.2f} GiB wanted, {free / 2**30:.2f} of "
            f"{total / 2**30:.2f} GiB free; {remedy}"
        )

    def free(self, address: Address) -> None:
        self._call("MemFree", self._taken["MemFree"].pop(address))

    def pinned(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Host memory that copies to and from the device run beside everything else; kept while the device is used."""
        pointer = self._take("MemHostAlloc", "MemFreeHost", max(num_bytes, 16), 0)
        assert pointer.value is not None
        raw = (ctypes.c_uint8 * num_bytes).from_address(pointer.value)
        raw.device = self  # type: ignore[attr-defined]  # whoever holds the array keeps the memory
        return np.ctypeslib.as_array(raw)

    def upload(self, to: Address, array: npt.NDArray[Any]) -> None:
        """Start copying; pinned memory must stay as it is until `synchronize`."""
        if array.nbytes:
            self._call("MemcpyHtoDAsync", to, array.ctypes.data, array.nbytes, self._stream)

    def download(self, to: npt.NDArray[Any], source: Address) -> None:
        """See Device.download."""
        if to.nbytes:
            self._call("MemcpyDtoHAsync", to.ctypes.data, source, to.nbytes, self._stream)

    def copy(self, to: Address, source: Address, num_bytes: int) -> None:
        """See Device.copy."""
        self._call("MemcpyDtoDAsync", to, source, num_bytes, self._stream)

    # Order

    def mark(self, which: int) -> None:
        """See Device.mark."""
        self._call("EventRecord", self._events[which], self._stream)

    def wait(self, which: int) -> None:
        """Until all is done that was started before the mark. Raises DeviceError for what failed in it."""
        self._call("EventSynchronize", self._events[which])

    def synchronize(self) -> None:
        """See Device.synchronize."""
        self._call("StreamSynchronize", self._stream)

    def fence(self) -> ctypes.c_void_p:
        """See StreamingDevice."""
        return self._take("EventCreate", "EventDestroy", _NO_TIMING)

    def reach(self, fence: ctypes.c_void_p) -> None:
        """See StreamingDevice.reach."""
        self._call("EventRecord", fence, self._stream)

    def hold(self, fence: ctypes.c_void_p) -> None:
        """See StreamingDevice.hold."""
        self._call("StreamWaitEvent", self._stream, fence, 0)

    def wait_for(self, fence: ctypes.c_void_p) -> None:
        """See StreamingDevice.wait_for."""
        self._call("EventSynchronize", fence)

    def prefetch(self, to: Address, array: npt.NDArray[Any], after: ctypes.c_void_p, done: ctypes.c_void_p) -> None:
        """See StreamingDevice.prefetch."""
        if self._copies is None:
            self._copies = self._take("StreamCreate", "StreamDestroy", _NON_BLOCKING)
            self._owe("StreamSynchronize", self._copies)
        self._call("StreamWaitEvent", self._copies, after, 0)
        if array.nbytes:
            self._call("MemcpyHtoDAsync", to, array.ctypes.data, array.nbytes, self._copies)
        self._call("EventRecord", done, self._copies)

    # Kernels

    def load(self, module: bytes, names: Sequence[str], prefix: str = "") -> None:
        """Load machine code with the functions of these names; see Device.load."""
        loaded = self._take("ModuleLoadData", "ModuleUnload", module)
        loaded.image = module  # type: ignore[attr-defined]  # HIP may refer to it as long as the module lives
        for name in names:
            function = _PTR()
            status = self._driver.function("ModuleGetFunction")(ctypes.byref(function), loaded, name.encode())
            if status:
                raise self._driver.error(f"{self._driver.symbol('ModuleGetFunction')}({name})", status)
            self._functions[prefix + name] = function

    def launch(
        self, name: str, grid: Sequence[int], block: int, shared: int, args: Sequence[Any], overlaps: bool = False
    ) -> None:
        """Start a kernel. args: ctypes values. overlaps: it waits itself for what came before it in the stream."""
        pointers = (_PTR * len(args))(*(ctypes.addressof(arg) for arg in args))
        status = self._launch(self._functions[name], grid, block, shared, pointers, overlaps)
        if status:
            what = f"launch of {name} with grid {tuple(grid)}, {block} threads, {shared} bytes"
            raise self._driver.error(what, status)

    @abstractmethod
    def _launch(
        self, function: Any, grid: Sequence[int], block: int, shared: int, pointers: Any, overlaps: bool
    ) -> int:
        """Returns the driver's status. pointers: an array of them, to the arguments."""

    # Graphs

    @contextlib.contextmanager
    def capture(self) -> Iterator[Graph]:
        """What is started inside is recorded, not run: launch the graph afterwards, as often as wanted."""
        graph, recorded = Graph(self), _PTR()
        self._call("StreamBeginCapture", self._stream, _CAPTURE_RELAXED)
        try:
            try:
                yield graph
            finally:  # also after an error, or nothing could be started any more
                status = self._driver.function("StreamEndCapture")(self._stream, ctypes.byref(recorded))
            self._driver.check("StreamEndCapture", status)
            self._driver.check("GraphInstantiate", self._instantiate(graph.executable, recorded))
            self._owe("GraphExecDestroy", graph.executable)
        finally:
            if recorded:
                self._driver.function("GraphDestroy")(recorded)

    @abstractmethod
    def _instantiate(self, executable: ctypes.c_void_p, recorded: ctypes.c_void_p) -> int:
        """Write what can be launched to `executable`. Returns the driver's status."""

    def launch_graph(self, graph: Graph) -> None:
        self._call("GraphLaunch", graph.executable, self._stream)


def _give_back(driver: Driver, taken: _Taken) -> None:
    """Errors are of no use to anyone here."""
    for call, handles in taken.items():
        for handle in handles.values():
            driver.function(call)(handle)
