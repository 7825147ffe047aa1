"""What this machine can compile for and run; for each "no", what is missing and how to get it."""

import ctypes
import importlib.util
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from mlcgen import nvrtc
from mlcgen.errors import CompileError
from mlcgen.runtime import cuda, hip, metal, webgpu
from mlcgen.runtime.cpu import host_cpu_name, host_features

__all__ = ["Device", "devices"]


@dataclass(frozen=True)
class Missing:
    what: str
    remedy: str


@dataclass(frozen=True)
class Device:
    kind: str
    name: str
    can_compile: bool
    can_run: bool
    features: list[str] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    memory_bytes: int = 0  # of its own; 0: the machine's
    driver: str = ""  # what the driver supports, in words

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def devices() -> list[Device]:
    """One entry per kind of target."""
    return [_cpu(), _cuda(), _vulkan(), _rocm(), _metal()]


# The CPU


def _cpu() -> Device:
    to_run = [] if _installed("tvm_ffi") else [Missing("the package apache-tvm-ffi", "pip install apache-tvm-ffi")]
    to_compile = _missing_compiler()
    if not _has_linker():
        to_compile.append(Missing("a linker", "pip install 'mlcgen[cross]', or install a C compiler"))
    missing = [*to_run, *to_compile]
    features = _used_features() if _installed("tvm") else host_features()
    return Device("cpu", host_cpu_name(), not missing, not to_run, sorted(features), missing)


def _used_features() -> Iterable[str]:
    """Those of this CPU's many features that our code is generated for."""
    from mlcgen.targets.cpu import cpu_target

    return cpu_target().features


def _has_linker() -> bool:
    return _installed("ziglang") or any(shutil.which(name) for name in ("cc", "gcc", "clang"))


# NVIDIA GPUs

OLDEST_GPU = 80  # compute capability times 10: what the kernels' instructions need


@dataclass(frozen=True)
class _Gpu:
    name: str
    arch: str  # sm_90 and the like
    memory_bytes: int
    cuda_version: int  # the latest that the driver supports

    @property
    def driver(self) -> str:
        return f"CUDA {self.cuda_version // 1000}.{self.cuda_version % 1000 // 10}"


def _cuda() -> Device:
    gpu = _gpu()
    to_run = _missing_to_run(gpu)
    to_compile = _missing_compiler()
    if not _has_nvrtc():
        to_compile.append(Missing("NVIDIA's compiler NVRTC with its headers", nvrtc.INSTALL))
    can_compile, missing = not to_compile, [*to_run, *to_compile]
    if gpu is None:
        return Device("cuda", "", can_compile, False, [], missing)
    return Device("cuda", gpu.name, can_compile, not to_run, [gpu.arch], missing, gpu.memory_bytes, gpu.driver)


def _missing_to_run(gpu: _Gpu | None) -> list[Missing]:
    needs_driver = "NVIDIA's driver 580 or later"
    if gpu is None:
        reason = cuda.missing() or "the driver does not describe the GPU"
        return [Missing(f"a GPU that can be used: {reason}", f"install {needs_driver}; pass GPUs on to a container")]
    missing = []
    if int(gpu.arch.removeprefix("sm_")) < OLDEST_GPU:
        missing.append(Missing(f"a GPU of sm_{OLDEST_GPU} or later; this one is {gpu.arch}", "use -t cpu"))
    if gpu.cuda_version < cuda.CUDA_VERSION:
        missing.append(Missing(f"a driver for CUDA 13; this one is for {gpu.driver}", f"install {needs_driver}"))
    return missing


def _gpu() -> _Gpu | None:
    """The first GPU, as its driver describes it without being started on it."""
    arch = cuda.compute_capability()
    if arch is None:
        return None
    driver = ctypes.CDLL("libcuda.so.1")
    name, memory, version = ctypes.create_string_buffer(256), ctypes.c_size_t(), ctypes.c_int()
    failed = [
        driver.cuDeviceGetName(name, len(name), 0),
        driver.cuDeviceTotalMem_v2(ctypes.byref(memory), 0),
        driver.cuDriverGetVersion(ctypes.byref(version)),
    ]
    return None if any(failed) else _Gpu(name.value.decode(), arch, memory.value, version.value)


def _has_nvrtc() -> bool:
    """Whether it compiles what every kernel includes, which takes hundredths of a second."""
    try:
        nvrtc.compile_cuda('#include "primitives.cuh"', "sm_90")
    except CompileError:
        return False
    return True


# Other GPUs, through WebGPU


def _vulkan() -> Device:
    to_compile, adapter = _missing_compiler(), webgpu.adapter()
    if adapter is None:
        reason = webgpu.missing() or ""
        remedy = f"{webgpu.INSTALL}; and a Vulkan driver, on Debian in mesa-vulkan-drivers and libvulkan1"
        return Device("vulkan", "", not to_compile, False, [], [Missing(reason, remedy), *to_compile])
    driver = f"{adapter.backend}, {adapter.driver}" + (", in software on the CPU" if adapter.is_software else "")
    return Device("vulkan", adapter.name, not to_compile, True, list(adapter.features), to_compile, driver=driver)


def _rocm() -> Device:
    to_compile = _missing_compiler()
    if not _installed("ziglang"):
        to_compile.append(Missing("a compiler for AMD's GPUs", "pip install 'mlcgen[cross]'"))
    reason = hip.missing()
    if reason:
        remedy = "install AMD's driver and HIP runtime (ROCm; on Debian libamdhip64-5 or later)"
        return Device("rocm", "", not to_compile, False, [], [Missing(reason, remedy), *to_compile])
    device = hip.HipDevice()
    features = [hip.architecture() or ""]
    return Device("rocm", device.name, not to_compile, True, features, to_compile, device.memory()[1])


def _metal() -> Device:
    to_compile, reason = _missing_compiler(), metal.missing()
    if reason:
        remedy = f"use a Mac, with {metal.INSTALL}"
        return Device("metal", "", not to_compile, False, [], [Missing(reason, remedy), *to_compile])
    device = metal.MetalDevice()
    return Device("metal", device.name, not to_compile, True, [], to_compile, device.memory()[1])


def _missing_compiler() -> list[Missing]:
    return [] if _installed("tvm") else [Missing("the package apache-tvm", "pip install apache-tvm")]


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
