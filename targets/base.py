"""A target is a value: what to generate code for, and what it can do. Passes ask for capabilities, never for names."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from mlcgen.formats import WeightFormat


class Kernels(Protocol):
    """The kernels a target brings, each a `tirx.PrimFunc` for any number of tokens n; shapes as in their files.

    float32 activations; pages are (num_pages, 2, num_kv_heads, page_size, head_dim).
    """

    def linear(self, fmt: WeightFormat, out_features: int, in_features: int, bias: bool) -> Any: ...
    def embedding(self, fmt: WeightFormat, vocab: int, hidden: int) -> Any: ...
    def rms_norm(self, hidden: int, eps: float) -> Any: ...
    def add_rms_norm(self, hidden: int, eps: float) -> Any: ...
    def silu_mul(self, features: int) -> Any: ...
    def rope_append(self, num_heads: int, num_kv_heads: int, head_dim: int, page_size: int, kv_dtype: str) -> Any: ...
    def paged_attention(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        kv_dtype: str,
        scale: float,
        window: int,
    ) -> Any: ...


@dataclass(frozen=True)
class Target:
    name: str  # as users write it, resolved: cpu:x86-64-v3
    kind: str  # cpu, cuda, ...
    executor: str  # vm or plan
    tvm: dict[str, Any] = field(compare=False)  # for tvm.target.Target
    features: tuple[str, ...] = ()  # what the machine must have to run the result
    arch: str = "x86_64"
    kernels: Kernels = field(compare=False, kw_only=True)
