"""An AMD GPU through HIP's own C API (libamdhip64, which comes with the driver or with ROCm): no toolkit, no TVM.

The first GPU is used; HIP_VISIBLE_DEVICES chooses another. The functions are documented in AMD's HIP runtime API
reference, under "Module management", "Stream management" and "Graph management"; names here follow it.
"""

import contextlib
import ctypes
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mlcgen.errors import DeviceError, TargetError
from mlcgen.runtime.driver_device import NO_DEVICE, CallError, Driver, DriverDevice

_SIZE, _PTR, _INT, _UINT = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint

LIBRARIES = (
    "libamdhip64.so",
    "libamdhip64.so.7",
    "libamdhip64.so.6",
    "amdhip64_7.dll",
    "amdhip64_6.dll",
    "amdhip64.dll",
)
_RENAMED = {
    "MemAlloc": "Malloc",
    "MemFree": "Free",
    "MemHostAlloc": "HostMalloc",
    "MemFreeHost": "HostFree",
    "StreamCreate": "StreamCreateWithFlags",
    "EventCreate": "EventCreateWithFlags",
}
_NO_BINARY = 209
_PROPERTIES_BYTES = 1 << 14  # of hipDeviceProp_t, far more than any version has


@functools.cache
def _library() -> Any | None:
    for name in LIBRARIES:
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(name)
            library.hipGetErrorName.restype = ctypes.c_char_p
            library.hipModuleLaunchKernel.argtypes = [_PTR, *[_UINT] * 7, _PTR, _PTR, _PTR]
            library.hipGraphInstantiate.argtypes = [_PTR, _PTR, _PTR, _PTR, _SIZE]
            return library
    return None


def missing() -> str | None:
    """Why no AMD GPU can be used here, or None."""
    library = _library()
    if library is None:
        return "no HIP runtime (libamdhip64) is installed"
    count = _INT()
    status = library.hipInit(0) or library.hipGetDeviceCount(ctypes.byref(count))
    if status == NO_DEVICE or (not status and not count.value):
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


class HipDevice(DriverDevice):
    """The first GPU, one stream, and the memory that was taken from it. HIP has no contexts: any thread may call."""

    symbols: Mapping[str, int] = {"has_f16": 0}

    def __init__(self) -> None:
        """Raises TargetError where there is no GPU that can be used."""
        library = _library()
        if library is None or missing():
            raise TargetError(f"{missing()}; run on another target")
        super().__init__(Driver("HIP", library, "hip", _RENAMED, _error_name))
        self._open_stream()

    def load(self, module: bytes, names: Sequence[str], prefix: str = "") -> None:
        """Load a code object with the functions of these names; see Device.load."""
        try:
            super().load(module, names, prefix)
        except CallError as error:
            if error.status != _NO_BINARY:
                raise
            text = f"the kernels are not for this GPU ({architecture()}); compile the model for it"
            raise DeviceError(text) from error

    def _launch(
        self, function: Any, grid: Sequence[int], block: int, shared: int, pointers: Any, overlaps: bool
    ) -> int:
        """Kernels of one stream do not overlap."""
        launch = self._driver.library.hipModuleLaunchKernel
        return launch(function, *grid, block, 1, 1, shared, self._stream, pointers, None)

    def _instantiate(self, executable: ctypes.c_void_p, recorded: ctypes.c_void_p) -> int:
        return self._driver.library.hipGraphInstantiate(ctypes.byref(executable), recorded, None, None, 0)
