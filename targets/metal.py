"""The target `metal`: text in Metal's language, compiled by macOS when it is loaded. Kernels are those of `vulkan`."""

import functools
from collections.abc import Mapping
from dataclasses import replace

from mlcgen.errors import TargetError
from mlcgen.targets import metal_build
from mlcgen.targets.base import Target
from mlcgen.targets.device_kernel import Code
from mlcgen.targets.vulkan import WebgpuKernels, vulkan_target


def metal_target(variant: str = "") -> Target:
    """The target `metal`. Raises TargetError for a variant: one text serves all devices."""
    if variant:
        raise TargetError(f"target 'metal:{variant}' is not known: the target metal has no variants")
    return replace(vulkan_target(), name="metal", kind="metal", arch="msl", kernels=_kernels())


@functools.cache
def _kernels() -> "MetalKernels":
    return MetalKernels(can_be_half=False)


class MetalKernels(WebgpuKernels):
    """The Kernels in WGSL, translated to Metal's C++: in single precision only, the translation knows no other."""

    def module(self, codes: Mapping[str, Code]) -> bytes:
        """See WebgpuKernels.module."""
        return metal_build.metal_source(codes).encode()
