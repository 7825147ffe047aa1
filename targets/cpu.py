"""CPU targets: this machine's, from the CPU itself, and named ones to cross-compile for."""

import functools
from dataclasses import dataclass
from typing import Any

import tvm
from tvm.target import codegen

from mlcgen.errors import TargetError
from mlcgen.formats import WeightFormat
from mlcgen.runtime.cpu import cpu_features, host_arch, host_features
from mlcgen.targets import cpu_kernels
from mlcgen.targets.base import Attention, Linear, LowRank, Target
from mlcgen.targets.cpu_kernels import Isa

# LLVM's features that generated code may use, from the widest; a variant lists those that its CPUs have.
_V3 = ("avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "popcnt", "sse4.2")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_VNNI = (*_V4, "avx512vnni")
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {  # name -> (architecture, features)
    "x86-64-v2": ("x86_64", ("popcnt", "sse4.2")),
    "x86-64-v3": ("x86_64", _V3),
    "x86-64-v4": ("x86_64", _V4),
    "icelake-server": ("x86_64", _VNNI),
    "znver4": ("x86_64", (*_VNNI, "avx512bf16")),
    "sapphirerapids": ("x86_64", (*_VNNI, "avx512bf16", "amx-tile", "amx-int8", "amx-bf16")),
    "aarch64": ("aarch64", ("neon",)),
    "aarch64-dotprod": ("aarch64", ("neon", "dotprod")),
    "aarch64-i8mm": ("aarch64", ("neon", "dotprod", "i8mm", "bf16")),  # Armv8.6
}
_TRIPLES = {"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"}


def cpu_target(variant: str = "") -> Target:
    """The target `cpu:<variant>`, or this machine's for "". Raises TargetError for an unknown variant."""
    if variant in VARIANTS:
        return _target(variant, *VARIANTS[variant])
    if variant not in ("", "native"):
        raise TargetError(f"target 'cpu:{variant}' is not known; have: cpu, {', '.join(f'cpu:{v}' for v in VARIANTS)}")
    arch = host_arch()
    if arch not in _TRIPLES:
        raise TargetError(f"this machine's architecture {arch!r} is not supported; have: {', '.join(_TRIPLES)}")
    known = {f for a, features in VARIANTS.values() if a == arch for f in features}
    refused = cpu_features() - host_features()
    fallbacks = ("cpu: the system refuses this process AMX; compiled without it",) if refused else ()
    return _target("native", arch, tuple(sorted(host_features() & known)), fallbacks)


def _target(variant: str, arch: str, features: tuple[str, ...], fallbacks: tuple[str, ...] = ()) -> Target:
    tvm_target = {"kind": "llvm", "mtriple": _TRIPLES[arch], "mattr": [f"+{f}" for f in features]}
    name = "cpu" if variant == "native" else f"cpu:{variant}"
    kernels = CpuKernels(_isa(tvm_target))
    return Target(name, "cpu", "vm", tvm_target, features, arch, fallbacks, kernels=kernels)


def _isa(tvm_target: dict[str, Any]) -> Isa:
    return Isa.from_features(codegen.llvm_get_cpu_features(tvm.target.Target(tvm_target)))


@dataclass(frozen=True)
class CpuKernels:
    """The Kernels of a CPU: written out per instruction set in cpu_kernels/."""

    isa: Isa

    # Building a kernel takes 0.1 s or more, and every layer asks for the same ones.
    @functools.cache  # noqa: B019  (targets are few and live as long as the process)
    def linear(self, spec: Linear) -> Any:
        kernel = cpu_kernels.linear(spec, self.isa)
        weights = spec.out_features * spec.in_features
        return _described(kernel, "linear", cpu_kernels.describe_linear(spec, self.isa), weights)

    @functools.cache  # noqa: B019
    def embedding(self, fmt: WeightFormat, vocab: int, hidden: int) -> Any:
        return _described(cpu_kernels.embedding(fmt, vocab, hidden, self.isa), "embedding")

    @functools.cache  # noqa: B019
    def rope_append(self, num_heads: int, num_kv_heads: int, head_dim: int, page_size: int, kv_dtype: str) -> Any:
        kernel = cpu_kernels.rope_append(num_heads, num_kv_heads, head_dim, page_size, kv_dtype, self.isa)
        return _described(kernel, "rope")

    @functools.cache  # noqa: B019
    def paged_attention(self, spec: Attention) -> Any:
        sizes = (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.page_size, spec.kv_dtype)
        return _described(cpu_kernels.paged_attention(*sizes, spec.scale, spec.window, self.isa), "attention")

    @functools.cache  # noqa: B019
    def low_rank(self, spec: LowRank) -> Any:
        """See Kernels.low_rank."""
        ranks = spec.limits.rank * (len(spec.out_features) * spec.in_features + sum(spec.out_features))
        return _described(cpu_kernels.low_rank(spec, self.isa), "low_rank", weights=ranks)


def _described(kernel: Any, file: str, units: str = "", weights: int = 0) -> Any:
    """Marks a kernel as finished, with what the compile report says of it."""
    how = f"kernel: targets/cpu_kernels/{file}.py" + (f" ({units})" if units else "")
    kernel = kernel.with_attr("mlcgen.how", how)
    return kernel.with_attr("mlcgen.flops_per_token", 2 * weights)
