"""CUDA targets: NVIDIA GPUs by compute capability, compiled for on any machine."""

import functools
from dataclasses import dataclass, field
from typing import Any

from mlcgen.errors import TargetError
from mlcgen.formats import WeightFormat
from mlcgen.targets import cuda_kernels
from mlcgen.targets.base import Attention, Linear, Target
from mlcgen.targets.device_kernel import KEY, DeviceKernel

# Machine code for a GPU, or with compute_80 assembly (PTX) that the driver of any GPU since compiles when it loads.
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "compute_80")
DEFAULT = "sm_90"
MAX_TOKENS_PER_STEP = 2048  # more tokens at once raise the products' speed no further


def cuda_target(variant: str = "") -> Target:
    """The target `cuda:<arch>`, or this machine's GPU for "". Raises TargetError for an unknown arch."""
    arch = variant or _this_gpu()
    if not variant and arch not in ARCHS:
        arch = "compute_80"
    if arch not in ARCHS:
        have = ", ".join(f"cuda:{a}" for a in ARCHS)
        raise TargetError(f"target 'cuda:{variant}' is not known; have: cuda, {have}")
    return Target(
        f"cuda:{arch}",
        "cuda",
        "plan",
        {"kind": "cuda", "arch": arch.replace("compute", "sm")},
        (arch,),
        arch,
        max_tokens_per_step=MAX_TOKENS_PER_STEP,
        has_narrow_activations=True,
        has_plain_append=False,
        gates_results=True,
        turns_in_attention=True,
        overlaps_kernels=arch in ("sm_90", "sm_100"),  # as primitives.cuh compiles wait_for_previous()
        block_threads=256,
        kv_dtypes=("float16", "bfloat16"),
        head_dims=cuda_kernels.HEAD_DIMS,
        has_float32_weights=False,
        has_int8_activations=False,
        kernels=_kernels(arch),
    )


def _this_gpu() -> str:
    from mlcgen.runtime.cuda import compute_capability

    return compute_capability() or DEFAULT


@functools.cache
def _kernels(arch: str) -> "CudaKernels":
    return CudaKernels(arch)


@dataclass(frozen=True, eq=False)
class CudaKernels:
    """The Kernels of an NVIDIA GPU: CUDA C++ in cuda_kernels/, put together per model."""

    arch: str
    by_key: dict[str, DeviceKernel] = field(default_factory=dict)

    def _placeholder(self, kernel: DeviceKernel) -> Any:
        self.by_key[kernel.key] = kernel
        return kernel.placeholder()

    def device_kernel(self, placeholder: Any) -> DeviceKernel | None:
        """The kernel that a PrimFunc stands for; None if TVM is to generate its code."""
        attrs = placeholder.attrs
        return self.by_key[str(attrs[KEY])] if attrs and KEY in attrs else None

    def retyped(self, placeholder: Any, dtypes: list[str]) -> Any:
        """The same kernel for arguments of other types."""
        return self.by_key[str(placeholder.attrs[KEY])].placeholder(dtypes)

    # Every layer asks for the same kernels.
    @functools.cache  # noqa: B019  (targets are few and live as long as the process)
    def linear(self, spec: Linear) -> Any:
        return self._placeholder(cuda_kernels.linear(spec, self.arch))

    @functools.cache  # noqa: B019
    def embedding(self, fmt: WeightFormat, vocab: int, hidden: int) -> Any:
        return self._placeholder(cuda_kernels.embedding(fmt, vocab, hidden))

    @functools.cache  # noqa: B019
    def rope_append(self, num_heads: int, num_kv_heads: int, head_dim: int, page_size: int, kv_dtype: str) -> Any:
        return self._placeholder(cuda_kernels.rope_append(num_heads, num_kv_heads, head_dim, page_size, kv_dtype))

    @functools.cache  # noqa: B019
    def paged_attention(self, spec: Attention) -> Any:
        return self._placeholder(cuda_kernels.paged_attention(spec, self.arch))

    @functools.cache  # noqa: B019
    def rope_attention(self, spec: Attention) -> Any:
        return self._placeholder(cuda_kernels.rope_attention(spec, self.arch))
