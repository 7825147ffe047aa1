"""Kernels that no target wrote, as CUDA C++ by TVM: what is left over between the kernels of a model."""

import re
from collections.abc import Mapping
from typing import Any

import tvm
from tvm import IRModule, tirx
from tvm.tirx.build import split_host_device_mods
from tvm_ffi.structural import structural_walk

from mlcgen.errors import CompileError
from mlcgen.runtime.sizes import Size
from mlcgen.targets.device_kernel import Code, Launch, Variant, tensor

HOST = {"kind": "llvm", "mtriple": "x86_64-linux-gnu"}  # its half of the code is thrown away
DEFINITION = 'extern "C" __global__ '


def generate(functions: Mapping[str, tirx.PrimFunc], target: Mapping[str, Any]) -> dict[str, Code]:
    """Scheduled PrimFuncs to code, by name. Raises CompileError for one that is no kernel of a GPU."""
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
        texts |= _definitions(tvm.get_global_func("target.build.cuda")(device, built_for).inspect_source())
        kernels |= {gv.name_hint: f for gv, f in device.functions.items()}
    return {name: _code(name, func, kernels, texts) for name, func in functions.items()}


def _definitions(source: str) -> dict[str, str]:
    """Kernel name -> its text; TVM's own prelude is left out (tvm_prelude.cuh has what is used of it)."""
    found = {}
    for part in source.split(DEFINITION)[1:]:
        head = re.sub(r"__launch_bounds__\([^)]*\)", "", part).split("{", 1)[0]
        if ";" not in head:  # a definition, not its announcement
            found[head.split("(", 1)[0].split()[-1]] = DEFINITION + part
    return found


def _code(name: str, func: tirx.PrimFunc, kernels: Mapping[str, tirx.PrimFunc], texts: Mapping[str, str]) -> Code:
    mine = [k for k in kernels if k == f"{name}_kernel" or k.startswith(f"{name}_kernel_")]
    if not mine:
        raise CompileError(f"kernel {name} was not scheduled for a GPU; compile for -t cpu")
    buffers = [p.name for p in func.params]
    launches = tuple(_launch(k, kernels[k], buffers) for k in mine)
    return Code(("tvm_prelude.cuh",), {k: texts[k] for k in mine}, (Variant(1, launches),))


def _launch(name: str, kernel: tirx.PrimFunc, buffers: list[str]) -> Launch:
    extents: dict[str, Size] = {}

    def visit(node: Any) -> None:
        if node.attr_key == "thread_extent":
            extents[str(node.node.thread_tag)] = size_of(node.value)

    structural_walk(kernel.body, [(tirx.AttrStmt, visit)], order="pre")
    args = []
    for param in kernel.params:
        buffer = param.name.removesuffix("_ptr")
        args.append(tensor(buffers.index(buffer)) if buffer in buffers else ["int64", param.name])
    grid = tuple(extents.get(f"blockIdx.{axis}", 1) for axis in "xyz")
    threads = extents.get("threadIdx.x", 1)
    assert isinstance(threads, int)
    # TVM's code does not wait for the kernel before it.
    return Launch(name, (grid[0], grid[1], grid[2]), threads, tuple(args), overlaps=False)


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
