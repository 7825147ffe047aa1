"""A target is a value: what to generate code for, and what it can do. Passes ask for capabilities, never for names."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from mlcgen.adapter_layout import AdapterLimits
from mlcgen.formats import WeightFormat


@dataclass(frozen=True)
class Linear:
    """out (n, N) = g(f(x) W^T [+ bias]) [+ residual]: a product with a stored matrix and what stands around it."""

    fmt: WeightFormat
    out_features: int  # N
    in_features: int  # K
    norm_eps: float | None = None  # f(x) = x / rms(x) * weight; the weight (K,) is an argument after x
    is_gated: bool = False  # f(x) = silu(gate) * up, x (n, 2 * K) holding the gate first
    gates_result: bool = False  # g(gate up) = silu(gate) * up, out (n, N / 2); else g is the identity
    has_bias: bool = False  # (N,)
    has_residual: bool = False  # (n, N)

    @property
    def name(self) -> str:
        around = {"norm": self.norm_eps is not None, "gated": self.is_gated}
        around |= {"swiglu": self.gates_result, "residual": self.has_residual}
        return "_".join(["linear", self.fmt.name, *(name for name, present in around.items() if present)])


@dataclass(frozen=True)
class LowRank:
    """y (n, sum of N) += f(x) A^T B^T, with the A and B of each token's adapter (mlcgen/adapter_layout.py)."""

    in_features: int  # K
    out_features: tuple[int, ...]  # N of each part
    limits: AdapterLimits
    norm_eps: float | None = None  # f(x) as in Linear
    is_gated: bool = False
    gates_result: bool = False  # out (n, N / 2) = silu(gate) * up of the sum, for all tokens; y stays as it is

    @property
    def name(self) -> str:
        around = {"norm": self.norm_eps is not None, "gated": self.is_gated, "swiglu": self.gates_result}
        return "_".join(["low_rank", *(name for name, present in around.items() if present)])


@dataclass(frozen=True)
class Attention:
    """Attention over a paged cache, whose keys and values num_heads / num_kv_heads query heads share."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    kv_dtype: str  # float32, float16 or bfloat16
    scale: float  # of the logits
    window: int  # keys that a query sees, its own included; 0: all before it


class Kernels(Protocol):
    """The kernels a target brings, each a `tirx.PrimFunc` for any number of tokens n; shapes as in their files.

    float32 activations; pages are (num_pages, 2, num_kv_heads, page_size, head_dim).
    """

    def linear(self, spec: Linear) -> Any: ...
    def embedding(self, fmt: WeightFormat, vocab: int, hidden: int) -> Any: ...
    def rope_append(self, num_heads: int, num_kv_heads: int, head_dim: int, page_size: int, kv_dtype: str) -> Any: ...
    def paged_attention(self, spec: Attention) -> Any: ...
    def low_rank(self, spec: LowRank) -> Any:
        """PrimFunc(x, [norm weight], adapter_slots, lora_a, lora_b, y), which writes y in place; with gates_result
        PrimFunc(…, y, out)."""
        ...


class PlanKernels(Kernels, Protocol):
    """Those of a target whose executor runs launch plans: PrimFuncs that stand for device_kernel.DeviceKernel."""

    def device_kernel(self, placeholder: Any) -> Any:
        """The kernel that a PrimFunc stands for; None if TVM is to generate its code."""
        ...

    def retyped(self, placeholder: Any, dtypes: list[str]) -> Any:
        """The same kernel for arguments of other types."""
        ...

    def generate(self, functions: Mapping[str, Any]) -> dict[str, Any]:
        """Function -> device_kernel.Code, by TVM, for scheduled PrimFuncs that stand for no kernel."""
        ...

    def build(self, codes: Mapping[str, Any]) -> tuple[bytes, dict[str, dict[str, int]]]:
        """(what the device loads, registers and spills of each function where the compiler tells) of all Code."""
        ...


class TurningKernels(PlanKernels, Protocol):
    """Those of a target that turns queries and keys in attention (turns_in_attention)."""

    def rope_attention(self, spec: Attention) -> Any:
        """rope_append, then paged_attention."""
        ...


@dataclass(frozen=True)
class Target:
    name: str  # as users write it, resolved: cpu:x86-64-v3
    kind: str  # cpu, cuda, ...
    executor: str  # vm or plan
    tvm: dict[str, Any] = field(compare=False)  # for tvm.target.Target
    features: tuple[str, ...] = ()  # what the machine must have to run the result
    arch: str = "x86_64"
    fallbacks: tuple[str, ...] = field(default=(), compare=False)  # what this machine has and cannot use, in words
    max_tokens_per_step: int = 512
    has_narrow_activations: bool = False  # 16-bit floats between kernels that allow it, else float32 everywhere
    has_plain_append: bool = True  # the cache can be written without rope_append, which computes the angles' turn too
    gates_results: bool = False  # SwiGLU ends the product before it, else it begins the one after it
    turns_in_attention: bool = False  # rotary embedding and the append to the cache are the attention kernel's
    reads_plain_rows: bool = False  # of float matrices; tiles are put in order when they are loaded
    overlaps_kernels: bool = False  # a kernel may start while the one before it ends, and wait for it itself
    block_threads: int = 0  # threads of a block for kernels that no target wrote; 0: a CPU's loops instead
    # What its kernels take: types of the KV cache, sizes of a head (empty: any), float32 matrices, 8-bit activations.
    kv_dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    head_dims: tuple[int, ...] = ()
    has_float32_weights: bool = True
    has_int8_activations: bool = True
    kernels: Kernels = field(compare=False, kw_only=True)
