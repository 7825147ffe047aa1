"""An NVIDIA GPU through the driver's own C API (libcuda): no toolkit, no CUDA runtime, no TVM.

The functions are documented in NVIDIA's CUDA Driver API; names here follow it.
"""

import contextlib
import ctypes
import functools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcgen.errors import DeviceError, TargetError
from mlcgen.runtime.device import Address

_U64, _SIZE, _PTR, _INT, _UINT = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint

CUDA_VERSION = 13000  # of the machine code, as drivers report theirs
_OUT_OF_MEMORY, _NO_DEVICE = 2, 100
_MAJOR, _MINOR, _SHARED_OPTIN = 75, 76, 97  # CUdevice_attribute
_STATIC_SHARED, _MAX_DYNAMIC_SHARED = 1, 8  # CUfunction_attribute
_CAPTURE_RELAXED = 2
_NON_BLOCKING = 1
_NO_TIMING = 2
_OVERLAPS = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION

_MAP_DTYPES = {"uint32": 2, "float16": 6, "bfloat16": 9}  # CUtensorMapDataType
_PROMOTE_128_BYTES = 2
_MAX_MAPS = 8192  # kept for the next step


class _Attribute(ctypes.Structure):  # CUlaunchAttribute: an id, padding, and a union of 64 bytes
    _fields_ = [("id", _INT), ("pad", ctypes.c_char * 4), ("value", _INT), ("rest", ctypes.c_char * 60)]


class _Config(ctypes.Structure):  # CUlaunchConfig
    _fields_ = [
        *((name, _UINT) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", _PTR),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", _UINT),
    ]


@functools.cache
def _driver() -> Any | None:
    """The driver's library, initialised; None where there is no driver or no GPU."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(name)
            return library if library.cuInit(0) == 0 else None
    return None


def missing() -> str | None:
    """Why no CUDA device can be used here, or None."""
    if (driver := _driver()) is not None:
        version = _INT()
        driver.cuDriverGetVersion(ctypes.byref(version))
        if version.value >= CUDA_VERSION:
            return None
        name = f"{version.value // 1000}.{version.value % 1000 // 10}"
        return f"the NVIDIA driver is for CUDA {name}; install 580 or later"
    with contextlib.suppress(OSError):
        library = ctypes.CDLL("libcuda.so.1")
        status = library.cuInit(0)
        if status == _NO_DEVICE:
            return "the NVIDIA driver finds no GPU"
        return f"the NVIDIA driver does not start: {_error_name(library, status)} ({status})"
    return "no NVIDIA driver (libcuda.so.1) is installed"


def _error_name(library: Any, status: int) -> str:
    text = ctypes.c_char_p()
    library.cuGetErrorName(_INT(status), ctypes.byref(text))
    return (text.value or b"?").decode()


def compute_capability(device: int = 0) -> str | None:
    """This machine's GPU as "sm_90" and the like, or None."""
    library = _driver()
    if library is None:
        return None
    value = _INT()
    digits = []
    for attribute in (_MAJOR, _MINOR):
        if library.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
        digits.append(value.value)
    return f"sm_{digits[0]}{digits[1]}"


class CudaDevice:
    """One GPU with its primary context, one stream, and the memory that was taken from it."""

    def __init__(self, ordinal: int = 0) -> None:
        """Raises TargetError where there is no driver that can be used, DeviceError for a GPU that is not there."""
        library = _driver()
        if library is None or missing():
            raise TargetError(f"{missing()}; run on another target")
        self._cuda = library
        library.cuMemcpyHtoDAsync_v2.argtypes = [_U64, _PTR, _SIZE, _PTR]
        library.cuMemcpyDtoHAsync_v2.argtypes = [_PTR, _U64, _SIZE, _PTR]
        library.cuMemcpyDtoDAsync_v2.argtypes = [_U64, _U64, _SIZE, _PTR]
        library.cuMemsetD8Async.argtypes = [_U64, ctypes.c_ubyte, _SIZE, _PTR]
        library.cuMemFree_v2.argtypes = [_U64]
        library.cuMemAlloc_v2.argtypes = [ctypes.POINTER(_U64), _SIZE]
        library.cuMemHostAlloc.argtypes = [ctypes.POINTER(_PTR), _SIZE, _UINT]
        library.cuGraphLaunch.argtypes = [_PTR, _PTR]
        library.cuLaunchKernelEx.argtypes = [ctypes.POINTER(_Config), _PTR, ctypes.POINTER(_PTR), _PTR]
        device, context = _INT(), _PTR()
        self._check("cuDeviceGet", library.cuDeviceGet(ctypes.byref(device), ordinal))
        self._device = device.value
        self._check("cuDevicePrimaryCtxRetain", library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
        self._stream = _PTR()
        self._taken = _Taken(library, self._device, context, self._stream)
        finalizer = weakref.finalize(self, self._taken.give_back)  # also of a device that fails below
        finalizer.atexit = False  # a thread may be in a step then; with the process all goes anyway
        self._check("cuCtxSetCurrent", library.cuCtxSetCurrent(context))
        self._check("cuStreamCreate", library.cuStreamCreate(ctypes.byref(self._stream), _NON_BLOCKING))
        self._events = [self._new_event(), self._new_event()]
        self.symbols: Mapping[str, int] = {}
        self.largest_binding = 1 << 48  # addresses reach everywhere
        self._functions: dict[str, ctypes.c_void_p] = {}
        self._maps: dict[tuple[Any, ...], Any] = {}

    @property
    def name(self) -> str:
        buffer = ctypes.create_string_buffer(256)
        self._check("cuDeviceGetName", self._cuda.cuDeviceGetName(buffer, 256, self._device))
        return buffer.value.decode()

    def _attribute(self, which: int) -> int:
        value = _INT()
        status = self._cuda.cuDeviceGetAttribute(ctypes.byref(value), which, self._device)
        self._check("cuDeviceGetAttribute", status)
        return value.value

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes."""
        free, total = _SIZE(), _SIZE()
        self._check("cuMemGetInfo", self._cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)))
        return free.value, total.value

    def allocate(self, num_bytes: int, purpose: str) -> Address:
        """Zeroed memory. Raises DeviceError that names the purpose where there is not enough."""
        address = _U64()
        status = self._cuda.cuMemAlloc_v2(ctypes.byref(address), max(num_bytes, 16))
        if status == _OUT_OF_MEMORY:
            free, total = self.memory()
            lower = "lower num_pages, --gpu-memory-utilization or max_batch"
            remedy = "quantize further (-q), or use a GPU with more memory" if purpose.startswith("weights") else lower
            raise DeviceError(
                f"the GPU has no room for the {purpose}: {num_bytes / 2**30:.2f} GiB wanted, {free / 2**30:.2f} of "
                f"{total / 2**30:.2f} GiB free; {remedy}"
            )
        self._check("cuMemAlloc", status)
        self._taken.memory.add(address.value)
        self._check("cuMemsetD8Async", self._cuda.cuMemsetD8Async(address, 0, max(num_bytes, 16), self._stream))
        return address.value

    def free(self, address: Address) -> None:
        self._taken.memory.remove(address)
        self._check("cuMemFree", self._cuda.cuMemFree_v2(address))

    def pinned(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Host memory that copies to and from the device run beside everything else; kept while the device is used."""
        pointer = _PTR()
        self._check("cuMemHostAlloc", self._cuda.cuMemHostAlloc(ctypes.byref(pointer), max(num_bytes, 16), 0))
        assert pointer.value is not None
        self._taken.pinned.append(pointer)
        raw = (ctypes.c_uint8 * num_bytes).from_address(pointer.value)
        raw.device = self  # type: ignore[attr-defined]  # whoever holds the array keeps the memory
        return np.ctypeslib.as_array(raw)

    def upload(self, to: Address, array: npt.NDArray[Any]) -> None:
        """Start copying; pinned memory must stay as it is until `synchronize`."""
        if array.nbytes:
            self._check(
                "cuMemcpyHtoDAsync",
                self._cuda.cuMemcpyHtoDAsync_v2(to, array.ctypes.data, array.nbytes, self._stream),
            )

    def download(self, to: npt.NDArray[Any], source: Address) -> None:
        """Start copying; the array is valid after `synchronize`."""
        if to.nbytes:
            self._check(
                "cuMemcpyDtoHAsync", self._cuda.cuMemcpyDtoHAsync_v2(to.ctypes.data, source, to.nbytes, self._stream)
            )

    def copy(self, to: Address, source: Address, num_bytes: int) -> None:
        """Start copying within the device's memory."""
        self._check("cuMemcpyDtoDAsync", self._cuda.cuMemcpyDtoDAsync_v2(to, source, num_bytes, self._stream))

    def mark(self, which: int) -> None:
        """Remember what has been started so far as mark 0 or 1, for `wait`."""
        self._check("cuEventRecord", self._cuda.cuEventRecord(self._events[which], self._stream))

    def wait(self, which: int) -> None:
        """Until all is done that was started before the mark. Raises DeviceError for what failed in it."""
        self._check("cuEventSynchronize", self._cuda.cuEventSynchronize(self._events[which]))

    def _new_event(self) -> ctypes.c_void_p:
        event = _PTR()
        self._check("cuEventCreate", self._cuda.cuEventCreate(ctypes.byref(event), _NO_TIMING))
        self._taken.events.append(event)
        return event

    def synchronize(self) -> None:
        """Wait for all that was started. Raises DeviceError for what failed in it."""
        self._check("cuStreamSynchronize", self._cuda.cuStreamSynchronize(self._stream))

    def load(self, module: bytes, names: Sequence[str]) -> None:
        """Load machine code with the functions of these names; each may have all the shared memory that there is."""
        loaded = self._taken.module
        self._check("cuModuleLoadData", self._cuda.cuModuleLoadData(ctypes.byref(loaded), module))
        most = self._attribute(_SHARED_OPTIN)
        for name in names:
            function, static = _PTR(), _INT()
            status = self._cuda.cuModuleGetFunction(ctypes.byref(function), loaded, name.encode())
            self._check(f"cuModuleGetFunction({name})", status)
            status = self._cuda.cuFuncGetAttribute(ctypes.byref(static), _STATIC_SHARED, function)
            self._check("cuFuncGetAttribute", status)
            status = self._cuda.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, most - static.value)
            self._check("cuFuncSetAttribute", status)
            self._functions[name] = function

    def launch(
        self, name: str, grid: Sequence[int], block: int, shared: int, args: Sequence[Any], overlaps: bool = False
    ) -> None:
        """Start a kernel. args: ctypes values. overlaps: it waits itself for what came before it in the stream."""
        pointers = (_PTR * len(args))(*(ctypes.addressof(arg) for arg in args))
        config = _Config(*grid, block, 1, 1, shared, self._stream, _OVERLAPPING, int(overlaps))
        status = self._cuda.cuLaunchKernelEx(ctypes.byref(config), self._functions[name], pointers, None)
        if status:
            self._check(f"launch of {name} with grid {tuple(grid)}, {block} threads, {shared} bytes", status)

    def tensor_map(
        self,
        address: Address,
        dtype: str,
        dims: tuple[int, ...],
        strides: tuple[int, ...],
        box: tuple[int, ...],
        swizzle: int,
    ) -> Any:
        """How the copy engine cuts boxes out of a tensor (CUtensorMap): the innermost dimension first, strides in
        bytes. What lies outside of the tensor reads as zero."""
        key = (address, dtype, dims, strides, box, swizzle)
        if key not in self._maps:
            if len(self._maps) >= _MAX_MAPS:  # prompts come in all lengths
                self._maps.clear()
            self._maps[key] = self._new_map(key)
        return self._maps[key]

    def _new_map(self, key: tuple[Any, ...]) -> Any:
        address, dtype, dims, strides, box, swizzle = key
        raw = ctypes.create_string_buffer(192)
        at = (ctypes.addressof(raw) + 63) // 64 * 64
        rank = len(dims)
        status = self._cuda.cuTensorMapEncodeTiled(
            _PTR(at),
            _MAP_DTYPES[dtype],
            rank,
            _PTR(address),
            (_U64 * rank)(*dims),
            (_U64 * (rank - 1))(*strides),
            (_UINT * rank)(*box),
            (_UINT * rank)(*[1] * rank),
            0,
            swizzle,
            _PROMOTE_128_BYTES,
            0,
        )
        if status:
            self._check(f"cuTensorMapEncodeTiled of {dtype} {dims} in boxes of {box}", status)
        return ctypes.create_string_buffer(ctypes.string_at(at, 128), 128)

    @contextlib.contextmanager
    def capture(self) -> Iterator["Graph"]:
        """What is started inside is recorded, not run: launch the graph afterwards, as often as wanted."""
        graph = Graph(self)
        self._check("cuStreamBeginCapture", self._cuda.cuStreamBeginCapture_v2(self._stream, _CAPTURE_RELAXED))
        recorded = _PTR()
        try:
            try:
                yield graph
            finally:  # also after an error, or nothing could be started any more
                status = self._cuda.cuStreamEndCapture(self._stream, ctypes.byref(recorded))
            self._check("cuStreamEndCapture", status)
            status = self._cuda.cuGraphInstantiateWithFlags(ctypes.byref(graph.executable), recorded, _U64(0))
            self._check("cuGraphInstantiate", status)
            self._taken.graphs.append(graph.executable)
        finally:
            if recorded:
                self._cuda.cuGraphDestroy(recorded)

    def launch_graph(self, graph: "Graph") -> None:
        status = self._cuda.cuGraphLaunch(graph.executable, self._stream)
        if status:
            self._check("cuGraphLaunch", status)

    def _check(self, call: str, status: int) -> None:
        if status:
            raise DeviceError(f"CUDA: {call} failed with {_error_name(self._cuda, status)} ({status})")


class _Taken:
    """What a CudaDevice took, to be given back when nobody uses it any more."""

    def __init__(self, library: Any, device: int, context: Any, stream: Any) -> None:
        self.library, self.device, self.context, self.stream = library, device, context, stream
        self.memory: set[Address] = set()
        self.pinned: list[Any] = []
        self.events: list[Any] = []
        self.graphs: list[Any] = []  # executable ones
        self.module = _PTR()

    def give_back(self) -> None:
        """Errors are of no use to anyone here."""
        self.library.cuCtxSetCurrent(self.context)
        if self.stream:  # null would be another stream
            self.library.cuStreamSynchronize(self.stream)
        for graph in self.graphs:
            self.library.cuGraphExecDestroy(graph)
        for event in self.events:
            self.library.cuEventDestroy_v2(event)
        for address in self.memory:
            self.library.cuMemFree_v2(address)
        for pointer in self.pinned:
            self.library.cuMemFreeHost(pointer)
        if self.module:
            self.library.cuModuleUnload(self.module)
        if self.stream:
            self.library.cuStreamDestroy_v2(self.stream)
        self.library.cuDevicePrimaryCtxRelease_v2(self.device)


class Graph:
    """A recorded sequence of copies and kernels."""

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self.executable = _PTR()


_OVERLAPPING = (_Attribute * 1)(_Attribute(_OVERLAPS, b"", 1, b""))
