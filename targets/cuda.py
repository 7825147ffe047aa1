"""CUDA targets: NVIDIA GPUs by compute capability, compiled for on any machine."""

import functools
from collections.abc import Mapping
from typing import Any

from mlcgen.errors import TargetError
from mlcgen.formats import WeightFormat
from mlcgen.targets import cuda_codegen, cuda_kernels
from mlcgen.targets.base import Attention, Linear, LowRank, Target
from mlcgen.targets.cuda_kernels.code import MAX_TOKENS_PER_STEP
from mlcgen.targets.device_kernel import Code, KeyedKernels

# Machine code for a GPU, or with compute_80 assembly (PTX) that the driver of any GPU since compiles when it loads.
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "compute_80")
DEFAULT = "sm_90"


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
        _tvm_target(arch),
        (arch,),
        arch,
        max_tokens_per_step=MAX_TOKENS_PER_STEP,
        has_narrow_activations=True,
        has_plain_append=False,
        gates_results=True,
        turns_in_attention=True,
        reads_plain_rows=True,
        overlaps_kernels=arch in ("sm_90", "sm_100"),  # as primitives.cuh compiles wait_for_previous()
        block_threads=256,
        kv_dtypes=("float16", "bfloat16"),
        head_dims=cuda_kernels.HEAD_DIMS,
        has_float32_weights=False,
        has_int8_activations=False,
        kernels=_kernels(arch),
    )


def _tvm_target(arch: str) -> dict[str, Any]:
    return {"kind": "cuda", "arch": arch.replace("compute", "sm")}


def _this_gpu() -> str:
    from mlcgen.runtime.cuda import compute_capability

    return compute_capability() or DEFAULT


@functools.cache
def _kernels(arch: str) -> "CudaKernels":
    return CudaKernels(arch)


class CudaKernels(KeyedKernels):
    """The Kernels of an NVIDIA GPU: CUDA C++ in cuda_kernels/, put together per model."""

    def __init__(self, arch: str) -> None:
        super().__init__()
        self.arch = arch

    def generate(self, functions: Mapping[str, Any]) -> dict[str, Code]:
        return cuda_codegen.generate(functions, _tvm_target(self.arch))

    def build(self, codes: Mapping[str, Code]) -> tuple[bytes, dict[str, dict[str, int]]]:
        return cuda_codegen.build(codes, self.arch)

    # Every layer asks for the same kernels.
    @functools.cache  # noqa: B019  (targets are few and live as long as the process)
    def linear(self, spec: Linear) -> Any:
        return self.placeholder(cuda_kernels.linear(spec, self.arch))

    @functools.cache  # noqa: B019
    def embedding(self, fmt: WeightFormat, vocab: int, hidden: int) -> Any:
        return self.placeholder(cuda_kernels.embedding(fmt, vocab, hidden))

    @functools.cache  # noqa: B019
    def rope_append(self, num_heads: int, num_kv_heads: int, head_dim: int, page_size: int, kv_dtype: str) -> Any:
        return self.placeholder(cuda_kernels.rope_append(num_heads, num_kv_heads, head_dim, page_size, kv_dtype))

    @functools.cache  # noqa: B019
    def paged_attention(self, spec: Attention) -> Any:
        return self.placeholder(cuda_kernels.paged_attention(spec, self.arch))

    @functools.cache  # noqa: B019
    def rope_attention(self, spec: Attention) -> Any:
        return self.placeholder(cuda_kernels.rope_attention(spec, self.arch))

    @functools.cache  # noqa: B019
    def low_rank(self, spec: LowRank) -> Any:
        """See Kernels.low_rank."""
        return self.placeholder(cuda_kernels.low_rank(spec))
