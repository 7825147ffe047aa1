"""The target `rocm`: AMD's GPUs by architecture, compiled for on any machine. Kernels are those of `vulkan`, as C++."""

import functools
from collections.abc import Mapping
from dataclasses import replace

from mlcgen.errors import TargetError
from mlcgen.targets import rocm_build
from mlcgen.targets.base import Target
from mlcgen.targets.device_kernel import Code
from mlcgen.targets.vulkan import WebgpuKernels, vulkan_target

DEFAULT = "gfx1100"


def rocm_target(variant: str = "") -> Target:
    """The target `rocm:<arch>`, or this machine's GPU for "". Raises TargetError for an unknown arch."""
    arch = variant or _this_gpu()
    if arch not in rocm_build.ARCHITECTURES:
        have = ", ".join(f"rocm:{a}" for a in rocm_build.ARCHITECTURES)
        raise TargetError(f"target 'rocm:{arch}' is not known; have: rocm, {have}")
    name = f"rocm:{arch}"
    return replace(vulkan_target(), name=name, kind="rocm", arch=arch, features=(arch,), kernels=_kernels(arch))


def _this_gpu() -> str:
    from mlcgen.runtime.hip import architecture

    return architecture() or DEFAULT


@functools.cache
def _kernels(arch: str) -> "RocmKernels":
    return RocmKernels(arch)


class RocmKernels(WebgpuKernels):
    """The Kernels in WGSL, translated to HIP's C++: in single precision only, the translation knows no other."""

    def __init__(self, arch: str) -> None:
        super().__init__(can_be_half=False)
        self.arch = arch

    def module(self, codes: Mapping[str, Code]) -> bytes:
        """See WebgpuKernels.module."""
        return rocm_build.compile_hip(rocm_build.hip_source(codes), self.arch)
