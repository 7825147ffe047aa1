"""Targets by name: `cpu`, `cpu:x86-64-v3`, `cpu:aarch64`, `cuda:sm_90`, `rocm:gfx1100`, `metal`, `vulkan`, …"""

from mlcgen.errors import TargetError
from mlcgen.targets.base import Target
from mlcgen.targets.cpu import cpu_target
from mlcgen.targets.cuda import cuda_target
from mlcgen.targets.metal import metal_target
from mlcgen.targets.rocm import rocm_target
from mlcgen.targets.vulkan import vulkan_target

TARGETS = {
    "cpu": cpu_target,
    "cuda": cuda_target,
    "rocm": rocm_target,
    "metal": metal_target,
    "vulkan": vulkan_target,
    "webgpu": vulkan_target,
}


def resolve(name: str) -> Target:
    """The target that a user's name stands for. Raises TargetError that lists what there is."""
    kind, _, variant = name.partition(":")
    if kind not in TARGETS:
        raise TargetError(f"target {name!r} is not supported; have: {', '.join(TARGETS)}")
    return TARGETS[kind](variant)
