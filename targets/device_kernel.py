"""Kernels of a device that runs launch plans: what Relax sees of one, and how a step calls it.

In the IRModule such a kernel is a PrimFunc without a body, which names its `DeviceKernel`. After memory planning the
launch plan asks the kernel for its code, given the types that its arguments have by then.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T  # noqa: N812

from mlcgen.runtime.sizes import Size
from mlcgen.targets.base import Attention, Linear, LowRank

KEY = "mlcgen.device_kernel"
NARROW = "mlcgen.narrow"  # for each argument, the 16-bit types that it may have instead of float32


def ceildiv(a: Size, b: Size) -> Size:
    return ["ceildiv", a, b]


def times(a: Size, b: Size) -> Size:
    return ["*", a, b]


# Arguments of a launch, as JSON: [kind, value].
def tensor(index: int) -> list[Any]:
    """The address of the call's argument `index`."""
    return ["tensor", index]


def part(index: int, offset: int, num_bytes: int) -> list[Any]:
    """The address `offset` bytes behind that of the call's argument `index`; the kernel reads `num_bytes` there."""
    return ["part", [index, offset, num_bytes]]


def scratch(offset: Size = 0) -> list[Any]:
    """An address in memory that one call uses and leaves as it may; the largest call's need is what is set aside."""
    return ["scratch", offset]


def counters() -> list[Any]:
    """An address of integers that are 0 when a kernel starts, and that it leaves so."""
    return ["counters", 0]


def int32(value: Size) -> list[Any]:
    return ["int32", value]


def float32(value: float) -> list[Any]:
    return ["float32", value]


def null() -> list[Any]:
    return ["null", 0]


@dataclass(frozen=True)
class Launch:
    function: str
    grid: tuple[Size, Size, Size]
    block: int  # threads
    args: tuple[list[Any], ...]
    shared: Size = 0  # bytes of dynamic shared memory
    overlaps: bool = True  # waits itself for the kernel before, so it may start while that one ends


@dataclass(frozen=True)
class Variant:
    """Launches for the steps for which `when` is not 0; the first variant that fits is taken.

    Symbols are the dimensions of the tensors and, of the step, `is_decode` (each sequence has one new token),
    `has_trees` (some tokens have tree masks) and `longest` (tokens of the longest sequence, rounded up to a power of
    two).
    """

    when: Size
    launches: tuple[Launch, ...]


@dataclass(frozen=True)
class Code:
    """`functions`: name -> definition, each complete given `includes`. scratch: bytes, for a step's sizes."""

    includes: tuple[str, ...]
    functions: Mapping[str, str]
    variants: tuple[Variant, ...]
    scratch: Size = 0
    counters: Size = 0  # bytes


@dataclass(frozen=True)
class Param:
    name: str
    shape: tuple[int | str, ...]
    dtype: str
    narrow: tuple[str, ...] = ()  # 16-bit types that will do instead, the best first


@dataclass(frozen=True)
class DeviceKernel:
    name: str
    params: tuple[Param, ...]  # inputs, then outputs
    generate: Callable[[Sequence[str]], Code] = field(repr=False)  # from the arguments' types
    how: str = ""
    flops_per_token: int = 0
    spec: Attention | Linear | LowRank | None = None  # what it computes, where shapes do not tell

    @property
    def key(self) -> str:
        """Tells it from every other kernel of its target."""
        params = [[p.name, p.dtype, *map(str, p.shape)] for p in self.params]
        return json.dumps([self.name, self.how, params, asdict(self.spec) if self.spec else None])

    def placeholder(self, dtypes: Sequence[str] | None = None) -> tirx.PrimFunc:
        """The PrimFunc that stands for the kernel. It is opaque (op_pattern 8), so nothing is fused into it."""
        types = dtypes or [p.dtype for p in self.params]
        symbols = {d: tirx.Var(d, "int64") for p in self.params for d in p.shape if isinstance(d, str) and "+" not in d}
        with IRBuilder() as builder, T.prim_func():
            T.func_name(self.name)
            T.func_attr({"global_symbol": self.name, "op_pattern": 8, "mlcgen.how": self.how, KEY: self.key})
            T.func_attr({"mlcgen.flops_per_token": self.flops_per_token})
            T.func_attr({NARROW: [",".join(p.narrow) for p in self.params]})
            for param, dtype in zip(self.params, types, strict=True):
                shape = [_extent(d, symbols) for d in param.shape]
                T.arg(param.name, T.buffer(shape, dtype, buffer_name=param.name))
            T.evaluate(T.call_extern("int32", "launch"))  # an effect, or calls of it would be removed as unused
        return builder.get()


class KeyedKernels:
    """What the kernels of targets with launch plans share: the placeholders that were handed out, by key."""

    def __init__(self) -> None:
        self._by_key: dict[str, DeviceKernel] = {}

    def placeholder(self, kernel: DeviceKernel) -> tirx.PrimFunc:
        self._by_key[kernel.key] = kernel
        return kernel.placeholder()

    def device_kernel(self, placeholder: tirx.PrimFunc) -> DeviceKernel | None:
        """The kernel that a PrimFunc stands for; None if TVM is to generate its code."""
        attrs = placeholder.attrs
        return self._by_key[str(attrs[KEY])] if attrs and KEY in attrs else None

    def retyped(self, placeholder: tirx.PrimFunc, dtypes: list[str]) -> tirx.PrimFunc:
        """The same kernel for arguments of other types."""
        return self._by_key[str(placeholder.attrs[KEY])].placeholder(dtypes)


def _extent(size: int | str, symbols: Mapping[str, tirx.Var]) -> Any:
    if isinstance(size, int):
        return tirx.IntImm("int64", size)
    name, _, more = size.partition("+")
    return symbols[name] + tirx.IntImm("int64", int(more)) if more else symbols[name]
