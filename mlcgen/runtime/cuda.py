"""An NVIDIA GPU through the driver's own C API (libcuda): no toolkit, no CUDA runtime, no TVM.

The functions are documented in NVIDIA's CUDA Driver API; names here follow it.
"""

import contextlib
import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcgen.errors import TargetError
from mlcgen.runtime.device import Address
from mlcgen.runtime.driver_device import NO_DEVICE, Driver, DriverDevice

_U64, _SIZE, _PTR, _INT, _UINT = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint

CUDA_VERSION = 13000  # of the machine code, as drivers report theirs
_RENAMED = {  # by macros of cuda.h
    call: f"{call}_v2"
    for call in (
        *("DevicePrimaryCtxRelease", "MemGetInfo", "MemAlloc", "MemFree", "MemcpyHtoDAsync", "MemcpyDtoHAsync"),
        *("MemcpyDtoDAsync", "Memcpy3DAsync", "StreamDestroy", "StreamBeginCapture", "EventDestroy"),
    )
}
_MAJOR, _MINOR, _SHARED_OPTIN = 75, 76, 97  # CUdevice_attribute
_STATIC_SHARED, _MAX_DYNAMIC_SHARED = 1, 8  # CUfunction_attribute
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


class _Side(ctypes.Structure):  # of CUDA_MEMCPY3D: where a copy comes from, or goes to
    _fields_ = [
        *((name, _SIZE) for name in ("x", "y", "z", "lod")),
        ("kind", _UINT),
        *((name, _PTR) for name in ("host", "device", "array", "reserved")),
        ("pitch", _SIZE),
        ("height", _SIZE),
    ]


class _Copy(ctypes.Structure):  # CUDA_MEMCPY3D
    _fields_ = [("source", _Side), ("to", _Side), *((name, _SIZE) for name in ("width", "height", "depth"))]


_HOST, _DEVICE = 1, 2  # CUmemorytype
_OVERLAPPING = (_Attribute * 1)(_Attribute(_OVERLAPS, b"", 1, b""))


@functools.cache
def _library() -> Any | None:
    """The driver's library, initialised; None where there is no driver or no GPU."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(name)
            return library if library.cuInit(0) == 0 else None
    return None


def missing() -> str | None:
    """Why no CUDA device can be used here, or None."""
    if (library := _library()) is not None:
        version = _INT()
        library.cuDriverGetVersion(ctypes.byref(version))
        if version.value >= CUDA_VERSION:
            return None
        name = f"{version.value // 1000}.{version.value % 1000 // 10}"
        return f"the NVIDIA driver is for CUDA {name}; install 580 or later"
    with contextlib.suppress(OSError):
        library = ctypes.CDLL("libcuda.so.1")
        status = library.cuInit(0)
        if status == NO_DEVICE:
            return "the NVIDIA driver finds no GPU"
        return f"the NVIDIA driver does not start: {_error_name(library, status)} ({status})"
    return "no NVIDIA driver (libcuda.so.1) is installed"


def _error_name(library: Any, status: int) -> str:
    text = ctypes.c_char_p()
    library.cuGetErrorName(_INT(status), ctypes.byref(text))
    return (text.value or b"?").decode()


def compute_capability(device: int = 0) -> str | None:
    """This machine's GPU as "sm_90" and the like, or None."""
    library = _library()
    if library is None:
        return None
    value = _INT()
    digits = []
    for attribute in (_MAJOR, _MINOR):
        if library.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
        digits.append(value.value)
    return f"sm_{digits[0]}{digits[1]}"


class CudaDevice(DriverDevice):
    """One GPU with its primary context, one stream, and the memory that was taken from it."""

    _ENDS = ("CtxSetCurrent", *DriverDevice._ENDS, "DevicePrimaryCtxRelease")

    def __init__(self, ordinal: int = 0) -> None:
        """Raises TargetError where there is no driver that can be used, DeviceError for a GPU that is not there."""
        library = _library()
        if library is None or missing():
            raise TargetError(f"{missing()}; run on another target")
        library.cuLaunchKernelEx.argtypes = [ctypes.POINTER(_Config), _PTR, ctypes.POINTER(_PTR), _PTR]
        super().__init__(Driver("CUDA", library, "cu", _RENAMED, _error_name))
        device = _INT()
        self._call("DeviceGet", ctypes.byref(device), ordinal)
        self._device = device.value
        context = self._take("DevicePrimaryCtxRetain", "CtxSetCurrent", device)  # by any thread that gives back
        self._owe("DevicePrimaryCtxRelease", device)
        self._call("CtxSetCurrent", context)
        self._open_stream()
        self._maps: dict[tuple[Any, ...], Any] = {}

    def load(self, module: bytes, names: Sequence[str], prefix: str = "") -> None:
        """Load machine code with the functions of these names; each may have all the shared memory that there is."""
        super().load(module, names, prefix)
        most, static = _INT(), _INT()
        self._call("DeviceGetAttribute", ctypes.byref(most), _SHARED_OPTIN, self._device)
        for name in names:
            function = self._functions[prefix + name]
            self._call("FuncGetAttribute", ctypes.byref(static), _STATIC_SHARED, function)
            self._call("FuncSetAttribute", function, _MAX_DYNAMIC_SHARED, most.value - static.value)

    def _launch(
        self, function: Any, grid: Sequence[int], block: int, shared: int, pointers: Any, overlaps: bool
    ) -> int:
        config = _Config(*grid, block, 1, 1, shared, self._stream, _OVERLAPPING, int(overlaps))
        return self._driver.library.cuLaunchKernelEx(ctypes.byref(config), function, pointers, None)

    def _instantiate(self, executable: ctypes.c_void_p, recorded: ctypes.c_void_p) -> int:
        return self._driver.library.cuGraphInstantiateWithFlags(ctypes.byref(executable), recorded, _U64(0))

    def upload_layers(self, to: Address, stride: int, array: npt.NDArray[np.uint8]) -> None:
        """See StridedDevice.upload_layers."""
        self._copy_layers(_host_side(array), _device_side(array, to, stride), array)

    def download_layers(self, to: npt.NDArray[np.uint8], source: Address, stride: int) -> None:
        """See StridedDevice.download_layers."""
        self._copy_layers(_device_side(to, source, stride), _host_side(to), to)

    def _copy_layers(self, source: _Side, to: _Side, array: npt.NDArray[np.uint8]) -> None:
        layers, pages, num_bytes = array.shape
        self._call("Memcpy3DAsync", ctypes.byref(_Copy(source, to, num_bytes, pages, layers)), self._stream)

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
        status = self._driver.library.cuTensorMapEncodeTiled(
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
            raise self._driver.error(f"cuTensorMapEncodeTiled of {dtype} {dims} in boxes of {box}", status)
        return ctypes.create_string_buffer(ctypes.string_at(at, 128), 128)


def _host_side(array: npt.NDArray[np.uint8]) -> _Side:
    num_bytes = array.shape[2]
    return _Side(kind=_HOST, host=array.ctypes.data, pitch=num_bytes, height=array.strides[0] // num_bytes)


def _device_side(array: npt.NDArray[np.uint8], address: Address, stride: int) -> _Side:
    num_bytes = array.shape[2]
    return _Side(kind=_DEVICE, device=address, pitch=num_bytes, height=stride // num_bytes)
