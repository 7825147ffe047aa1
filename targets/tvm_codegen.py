"""Kernels that no target wrote, as text by TVM: what is left over between the kernels of a model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import IRModule, tirx
from tvm.tirx.build import split_host_device_mods
from tvm_ffi.structural import structural_walk

from mlcgen.errors import CompileError
from mlcgen.runtime.sizes import Size

HOST = {"kind": "llvm", "mtriple": "x86_64-linux-gnu"}  # its half of the code is thrown away


@dataclass(frozen=True)
class Generated:
    """One kernel: its text and what its launch needs."""

    name: str
    text: str
    grid: tuple[Size, Size, Size]
    block: int  # threads
    params: tuple[int | str, ...]  # the function's argument of this number, or the symbol of this name


def generate(
    functions: Mapping[str, tirx.PrimFunc],
    target: Mapping[str, Any],
    texts_of: Callable[[IRModule, Any], Mapping[str, str]],
) -> dict[str, list[Generated]]:
    """The kernels of scheduled PrimFuncs, in the order that they run in, by the functions' names.

    texts_of(module of kernels, target): kernel -> its text. Raises CompileError for a function that no GPU can run.
    """
    if not functions:
        return {}
    mod = IRModule({name: f.with_attr("global_symbol", name) for name, f in functions.items()})
    mod = tirx.transform.BindTarget(tvm.target.Target(dict(target), host=HOST))(mod)
    pipeline, _, finish = tirx.get_default_tir_pipeline(tvm.target.Target(dict(target)))
    # Without common subexpressions the host hands kernels nothing but tensors and symbols.
    with tvm.transform.PassContext(disabled_pass=["tirx.CommonSubexprElim"]):
        _, device_mods = split_host_device_mods(pipeline(mod))
        devices = [(finish()(device), built_for) for built_for, device in device_mods.items()]
    texts: dict[str, str] = {}
    kernels: dict[str, tirx.PrimFunc] = {}
    for device, built_for in devices:
        texts |= texts_of(device, built_for)
        kernels |= {gv.name_hint: f for gv, f in device.functions.items()}
    return {name: _kernels_of(name, func, kernels, texts) for name, func in functions.items()}


def _kernels_of(
    name: str, func: tirx.PrimFunc, kernels: Mapping[str, tirx.PrimFunc], texts: Mapping[str, str]
) -> list[Generated]:
    mine = [k for k in kernels if k == f"{name}_kernel" or k.startswith(f"{name}_kernel_")]
    if not mine:
        raise CompileError(f"kernel {name} was not scheduled for a GPU; compile for -t cpu")
    buffers = [p.name for p in func.params]
    return [_kernel(k, kernels[k], texts[k], buffers) for k in mine]


def _kernel(name: str, kernel: tirx.PrimFunc, text: str, buffers: list[str]) -> Generated:
    extents: dict[str, Size] = {}

    def visit(node: Any) -> None:
        if node.attr_key == "thread_extent":
            extents[str(node.node.thread_tag)] = size_of(node.value)

    structural_walk(kernel.body, [(tirx.AttrStmt, visit)], order="pre")
    params: list[int | str] = []
    for param in kernel.params:
        buffer = param.name.removesuffix("_ptr")
        params.append(buffers.index(buffer) if buffer in buffers else str(param.name))
    x, y, z = (extents.get(f"blockIdx.{axis}", 1) for axis in "xyz")
    threads = extents.get("threadIdx.x", 1)
    assert isinstance(threads, int)
    return Generated(name, text, (x, y, z), threads, tuple(params))


_BINARY = {
    tirx.Add: "+",
    tirx.Sub: "-",
    tirx.Mul: "*",
    tirx.FloorDiv: "//",
    tirx.FloorMod: "%",
    tirx.Min: "min",
    tirx.Max: "max",
}


def size_of(expr: Any) -> Size:
    """A size expression of TIR as data."""
    if isinstance(expr, int | tirx.IntImm):
        return int(expr)
    if isinstance(expr, tirx.Var):
        return str(expr.name)
    if isinstance(expr, tirx.Cast):
        return size_of(expr.value)
    for kind, operator in _BINARY.items():
        if isinstance(expr, kind):
            return [operator, size_of(expr.a), size_of(expr.b)]
    if isinstance(expr, tirx.RShift):
        return ["//", size_of(expr.a), 1 << int(expr.b)]
    raise CompileError(f"a kernel's size {expr} is of a kind that launch plans do not have")
