"""An AMD GPU through HIP's own C API (libamdhip64, which comes with the driver or with ROCm): no toolkit, no TVM.

The first GPU is used; HIP_VISIBLE_DEVICES chooses another. The functions are documented in AMD's HIP runtime API
reference, under "Module management", "Stream management" and "Graph management"; names here follow it.
"""

import contextlib
import ctypes
import functools
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcgen.errors import DeviceError, TargetError
from mlcgen.runtime.device import Address

_SIZE, _PTR, _INT, _UINT = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint

LIBRARIES = (
    "libamdhip64.so",
    "libamdhip64.so.7",
    "libamdhip64.so.6",
    "amdhip64_7.dll",
    "amdhip64_6.dll",
    "amdhip64.dll",
)
_OUT_OF_MEMORY, _NO_DEVICE, _NO_BINARY = 2, 100, 209
_CAPTURE_RELAXED = 2
_NON_BLOCKING = 1
_NO_TIMING = 2
_PROPERTIES_BYTES = 1 << 14  # of hipDeviceProp_t, far more than any version has

_ARGUMENTS: Mapping[str, Sequence[Any]] = {
    "hipMalloc": [_PTR, _SIZE],
    "hipFree": [_PTR],
    "hipHostMalloc": [_PTR, _SIZE, _UINT],
    "hipHostFree": [_PTR],
    "hipMemsetD8Async": [_PTR, ctypes.c_ubyte, _SIZE, _PTR],
    "hipMemcpyHtoDAsync": [_PTR, _PTR, _SIZE, _PTR],
    "hipMemcpyDtoHAsync": [_PTR, _PTR, _SIZE, _PTR],
    "hipModuleLaunchKernel": [_PTR, *[_UINT] * 7, _PTR, _PTR, _PTR],
    "hipGraphInstantiate": [_PTR, _PTR, _PTR, _PTR, _SIZE],
    "hipGraphLaunch": [_PTR, _PTR],
}


@functools.cache
def _library() -> Any | None:
    for name in LIBRARIES:
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(name)
            library.hipGetErrorName.restype = ctypes.c_char_p
            for function, arguments in _ARGUMENTS.items():
                getattr(library, function).argtypes = arguments
            return library
    return None


def missing() -> str | None:
    """Why no AMD GPU can be used here, or None."""
    library = _library()
    if library is None:
        return "no HIP runtime (libamdhip64) is installed"
    count = _INT()
    status = library.hipInit(0) or library.hipGetDeviceCount(ctypes.byref(count))
    if status == _NO_DEVICE or (not status and not count.value):
        return "the HIP runtime finds no GPU"
    return f"the HIP runtime does not start: {_error_name(library, status)} ({status})" if status else None


def architecture(device: int = 0) -> str | None:
    """This machine's GPU as "gfx1100" and the like, or None.

    hipDeviceProp_t has it as gcnArchName, at a place that differs between versions, so it is looked for: with its
    features ("gfx90a:sramecc+:xnack-") it is the only text of that form.
    """
    library = _library()
    if library is None or missing():
        return None
    properties = ctypes.create_string_buffer(_PROPERTIES_BYTES)
    # The function of ROCm 6 and later has a name of its own; headers hide that.
    get = getattr(library, "hipGetDevicePropertiesR0600", None) or library.hipGetDeviceProperties
    if get(properties, device):
        return None
    found = re.search(rb"gfx[0-9a-f]{3,}", properties.raw)
    return found[0].decode() if found else None


def _error_name(library: Any, status: int) -> str:
    return (library.hipGetErrorName(_INT(status)) or b"?").decode()


class HipDevice:
    """One GPU, one stream, and the memory that was taken from it; see runtime.device.Device."""

    def __init__(self) -> None:
        """Raises TargetError where there is no GPU that can be used."""
        library = _library()
        if library is None or missing():
            raise TargetError(f"{missing()}; run on another target")
        self._hip = library
        self.symbols: Mapping[str, int] = {"has_f16": 0}
        self.largest_binding = 1 << 48  # addresses reach everywhere
        self._stream = _PTR()
        self._taken = _Taken(library, self._stream)
        finalizer = weakref.finalize(self, self._taken.give_back)  # also of a device that fails below
        finalizer.atexit = False  # a thread may be in a step then; with the process all goes anyway
        status = library.hipStreamCreateWithFlags(ctypes.byref(self._stream), _NON_BLOCKING)
        self._check("hipStreamCreateWithFlags", status)
        self._events = [self._new_event(), self._new_event()]
        self._functions: dict[str, ctypes.c_void_p] = {}

    @property
    def name(self) -> str:
        buffer = ctypes.create_string_buffer(256)
        self._check("hipDeviceGetName", self._hip.hipDeviceGetName(buffer, 256, 0))
        return buffer.value.decode()

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes."""
        free, total = _SIZE(), _SIZE()
        self._check("hipMemGetInfo", self._hip.hipMemGetInfo(ctypes.byref(free), ctypes.byref(total)))
        return free.value, total.value

    def allocate(self, num_bytes: int, purpose: str) -> Address:
        """See Device.allocate."""
        size, pointer = max(num_bytes, 16), _PTR()
        status = self._hip.hipMalloc(ctypes.byref(pointer), size)
        if status == _OUT_OF_MEMORY:
            free, total = self.memory()
            lower = "lower num_pages, --gpu-memory-utilization or max_batch"
            remedy = "quantize further (-q), or use a GPU with more memory" if purpose.startswith("weights") else lower
            raise DeviceError(
                f"the GPU has no room for the {purpose}: {num_bytes / 2**30:.2f} GiB wanted, {free / 2**30:.2f} of "
                f"{total / 2**30:.2f} GiB free; {remedy}"
            )
        self._check("hipMalloc", status)
        assert pointer.value is not None
        self._taken.memory.add(pointer.value)
        self._check("hipMemsetD8Async", self._hip.hipMemsetD8Async(pointer, 0, size, self._stream))
        return pointer.value

    def free(self, address: Address) -> None:
        """See Device.free."""
        self._taken.memory.remove(address)
        self._check("hipFree", self._hip.hipFree(address))

    def pinned(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """See Device.pinned; kept while the device is used."""
        pointer = _PTR()
        self._check("hipHostMalloc", self._hip.hipHostMalloc(ctypes.byref(pointer), max(num_bytes, 16), 0))
        assert pointer.value is not None
        self._taken.pinned.append(pointer)
        raw = (ctypes.c_uint8 * num_bytes).from_address(pointer.value)
        raw.device = self  # type: ignore[attr-defined]  # whoever holds the array keeps the memory
        return np.ctypeslib.as_array(raw)

    def upload(self, to: Address, array: npt.NDArray[Any]) -> None:
        """See Device.upload."""
        if array.nbytes:
            status = self._hip.hipMemcpyHtoDAsync(to, array.ctypes.data, array.nbytes, self._stream)
            self._check("hipMemcpyHtoDAsync", status)

    def download(self, to: npt.NDArray[Any], source: Address) -> None:
        """See Device.download."""
        if to.nbytes:
            status = self._hip.hipMemcpyDtoHAsync(to.ctypes.data, source, to.nbytes, self._stream)
            self._check("hipMemcpyDtoHAsync", status)

    def _new_event(self) -> ctypes.c_void_p:
        event = _PTR()
        self._check("hipEventCreateWithFlags", self._hip.hipEventCreateWithFlags(ctypes.byref(event), _NO_TIMING))
        self._taken.events.append(event)
        return event

    def mark(self, which: int) -> None:
        """See Device.mark."""
        self._check("hipEventRecord", self._hip.hipEventRecord(self._events[which], self._stream))

    def wait(self, which: int) -> None:
        """Until all is done that was started before the mark. Raises DeviceError for what failed in it."""
        self._check("hipEventSynchronize", self._hip.hipEventSynchronize(self._events[which]))

    def synchronize(self) -> None:
        """See Device.synchronize."""
        self._check("hipStreamSynchronize", self._hip.hipStreamSynchronize(self._stream))

    def load(self, module: bytes, names: Sequence[str]) -> None:
        """Load a code object with the functions of these names."""
        loaded, self._taken.image = self._taken.module, module  # which HIP may refer to as long as the module lives
        status = self._hip.hipModuleLoadData(ctypes.byref(loaded), module)
        if status == _NO_BINARY:
            raise DeviceError(f"the kernels are not for this GPU ({architecture()}); compile the model for it")
        self._check("hipModuleLoadData", status)
        for name in names:
            function = _PTR()
            status = self._hip.hipModuleGetFunction(ctypes.byref(function), loaded, name.encode())
            self._check(f"hipModuleGetFunction({name})", status)
            self._functions[name] = function

    def launch(
        self, name: str, grid: Sequence[int], block: int, shared: int, args: Sequence[Any], overlaps: bool = False
    ) -> None:
        """See Device.launch; kernels of one stream do not overlap."""
        pointers = (_PTR * len(args))(*(ctypes.addressof(arg) for arg in args))
        status = self._hip.hipModuleLaunchKernel(
            self._functions[name], *grid, block, 1, 1, shared, self._stream, pointers, None
        )
        if status:
            self._check(f"launch of {name} with grid {tuple(grid)}, {block} threads, {shared} bytes", status)

    @contextlib.contextmanager
    def capture(self) -> Iterator["Graph"]:
        """See Device.capture."""
        graph = Graph(self)
        self._check("hipStreamBeginCapture", self._hip.hipStreamBeginCapture(self._stream, _CAPTURE_RELAXED))
        recorded = _PTR()
        try:
            try:
                yield graph
            finally:  # also after an error, or nothing could be started any more
                status = self._hip.hipStreamEndCapture(self._stream, ctypes.byref(recorded))
            self._check("hipStreamEndCapture", status)
            status = self._hip.hipGraphInstantiate(ctypes.byref(graph.executable), recorded, None, None, 0)
            self._check("hipGraphInstantiate", status)
            self._taken.graphs.append(graph.executable)
        finally:
            if recorded:
                self._hip.hipGraphDestroy(recorded)

    def launch_graph(self, graph: "Graph") -> None:
        """See Device.launch_graph."""
        self._check("hipGraphLaunch", self._hip.hipGraphLaunch(graph.executable, self._stream))

    def _check(self, call: str, status: int) -> None:
        if status:
            raise DeviceError(f"HIP: {call} failed with {_error_name(self._hip, status)} ({status})")


class _Taken:
    """What a HipDevice took, to be given back when nobody uses it any more."""

    def __init__(self, library: Any, stream: Any) -> None:
        self.library, self.stream = library, stream
        self.memory: set[Address] = set()
        self.pinned: list[Any] = []
        self.events: list[Any] = []
        self.graphs: list[Any] = []  # executable ones
        self.module = _PTR()
        self.image = b""

    def give_back(self) -> None:
        """Errors are of no use to anyone here."""
        if self.stream:  # null would be another stream
            self.library.hipStreamSynchronize(self.stream)
        for graph in self.graphs:
            self.library.hipGraphExecDestroy(graph)
        for event in self.events:
            self.library.hipEventDestroy(event)
        for address in self.memory:
            self.library.hipFree(address)
        for pointer in self.pinned:
            self.library.hipHostFree(pointer)
        if self.module:
            self.library.hipModuleUnload(self.module)
        if self.stream:
            self.library.hipStreamDestroy(self.stream)


class Graph:
    """A recorded sequence of copies and kernels."""

    def __init__(self, device: HipDevice) -> None:
        self._device = device
        self.executable = _PTR()
