"""What the package wgpu has in its C interface only. None of this is promised, so pyproject.toml pins its version."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def unchecked_module(device: Any, text: str) -> Any:
    """A shader module without the checks of indices and loops that WebGPU adds to what web pages bring.

    They take 3 to 17% of a product's time on an H100, and an artifact's kernels are as trusted as machine code is.
    """
    from wgpu.backends.wgpu_native import ffi, lib
    from wgpu.backends.wgpu_native._api import GPUShaderModule

    data = text.encode()
    held = ffi.new("char[]", data)  # until the call has returned
    source = ffi.new("WGPUShaderSourceWGSL *")
    source.chain.sType, source.code.data, source.code.length = lib.WGPUSType_ShaderSourceWGSL, held, len(data)
    descriptor = ffi.new("WGPUShaderModuleDescriptor *")
    descriptor.nextInChain = ffi.cast("WGPUChainedStruct *", source)
    return GPUShaderModule("", lib.wgpuDeviceCreateShaderModuleTrusted(device._internal, descriptor, 0), device)


def submit(device: Any, commands: Sequence[Any]) -> int:
    """Start commands; returns what `wait` takes."""
    from wgpu.backends.wgpu_native import ffi
    from wgpu.backends.wgpu_native._api import libf

    held = ffi.new("WGPUCommandBuffer[]", [command._internal for command in commands])
    return int(libf.wgpuQueueSubmitForIndex(device.queue._internal, len(commands), held))


def wait(device: Any, submission: int | None = None) -> None:
    """Until a submission and all before it have ended; None: all there are."""
    from wgpu.backends.wgpu_native import ffi
    from wgpu.backends.wgpu_native._api import libf

    index = ffi.NULL if submission is None else ffi.new("WGPUSubmissionIndex *", submission)
    libf.wgpuDevicePoll(device._internal, True, index)


class Mapped:
    """The first bytes of a buffer that the host can read, as an array, once a submission has ended.

    wgpu's own `map_sync` submits once more and lets a thread of its own wait, which takes 0.3 ms.
    """

    def __init__(self, device: Any, buffer: Any, num_bytes: int, submission: int) -> None:
        self._device, self._buffer, self._num_bytes, self._submission = device, buffer, num_bytes, submission

    def __enter__(self) -> npt.NDArray[np.uint8]:
        from wgpu.backends.wgpu_native import ffi, lib

        statuses = []
        callback = ffi.callback(
            "void(WGPUMapAsyncStatus, WGPUStringView, void *, void *)", lambda status, *_: statuses.append(status)
        )
        info = ffi.new("WGPUBufferMapCallbackInfo *")
        info.mode, info.callback = lib.WGPUCallbackMode_AllowProcessEvents, callback
        lib.wgpuBufferMapAsync(self._buffer._internal, lib.WGPUMapMode_Read, 0, self._num_bytes, info[0])
        wait(self._device, self._submission)
        if statuses != [lib.WGPUMapAsyncStatus_Success]:
            raise RuntimeError(f"a buffer could not be read: status {statuses}")
        pointer = lib.wgpuBufferGetConstMappedRange(self._buffer._internal, 0, self._num_bytes)
        return np.frombuffer(ffi.buffer(pointer, self._num_bytes), np.uint8)

    def __exit__(self, *error: object) -> None:
        from wgpu.backends.wgpu_native import lib

        lib.wgpuBufferUnmap(self._buffer._internal)
