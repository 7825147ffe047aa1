"""The target `vulkan`: WGSL, for any GPU that WebGPU reaches: by Vulkan, and as it is by Metal and Direct3D 12."""

import functools
from collections.abc import Mapping
from typing import Any

from mlcgen.errors import TargetError
from mlcgen.formats import WeightFormat
from mlcgen.targets import webgpu_codegen, webgpu_kernels
from mlcgen.targets.base import Attention, Linear, LowRank, Target
from mlcgen.targets.device_kernel import Code, KeyedKernels

MAX_TOKENS_PER_STEP = 1024


def vulkan_target(variant: str = "") -> Target:
    """The target `vulkan`, also called `webgpu`. Raises TargetError for a variant: one code serves all devices."""
    if variant:
        raise TargetError(f"target 'vulkan:{variant}' is not known: the target vulkan has no variants")
    return Target(
        "vulkan",
        "webgpu",
        "plan",
        webgpu_codegen.TVM_TARGET,
        arch="wgsl",
        max_tokens_per_step=MAX_TOKENS_PER_STEP,
        has_plain_append=False,
        gates_results=True,
        block_threads=256,
        head_dims=webgpu_kernels.HEAD_DIMS,
        has_int8_activations=False,
        kernels=_kernels(),
    )


@functools.cache
def _kernels() -> "WebgpuKernels":
    return WebgpuKernels()


class WebgpuKernels(KeyedKernels):
    """The Kernels in WGSL: templates in webgpu_kernels/, put together per model.

    can_be_half: also those in half precision, which a device takes where it has it.
    """

    def __init__(self, can_be_half: bool = True) -> None:
        super().__init__()
        self.can_be_half = can_be_half

    def generate(self, functions: Mapping[str, Any]) -> dict[str, Code]:
        return webgpu_codegen.generate(functions)

    def build(self, codes: Mapping[str, Code]) -> tuple[bytes, dict[str, dict[str, int]]]:
        return self.module({**codes, "sampling": webgpu_kernels.sampling()}), {}

    def module(self, codes: Mapping[str, Code]) -> bytes:
        """What the device loads, of all functions."""
        return webgpu_codegen.build(codes)

    # Every layer asks for the same kernels.
    @functools.cache  # noqa: B019  (targets are few and live as long as the process)
    def linear(self, spec: Linear) -> Any:
        return self.placeholder(webgpu_kernels.linear(spec, self.can_be_half))

    @functools.cache  # noqa: B019
    def embedding(self, fmt: WeightFormat, vocab: int, hidden: int) -> Any:
        return self.placeholder(webgpu_kernels.embedding(fmt, vocab, hidden))

    @functools.cache  # noqa: B019
    def rope_append(self, num_heads: int, num_kv_heads: int, head_dim: int, page_size: int, kv_dtype: str) -> Any:
        return self.placeholder(webgpu_kernels.rope_append(num_heads, num_kv_heads, head_dim, page_size, kv_dtype))

    @functools.cache  # noqa: B019
    def paged_attention(self, spec: Attention) -> Any:
        return self.placeholder(webgpu_kernels.paged_attention(spec))

    @functools.cache  # noqa: B019
    def low_rank(self, spec: LowRank) -> Any:
        """See Kernels.low_rank."""
        return self.placeholder(webgpu_kernels.low_rank(spec))
