"""A model's kernels for devices that take WGSL: those of webgpu_kernels/ and TVM's leftovers, as text."""

import json
from collections.abc import Mapping

import tvm
from tvm import IRModule, tirx

from mlcgen.targets import tvm_codegen
from mlcgen.targets.device_kernel import Code, Launch, Variant, int32, tensor

TVM_TARGET = {"kind": "webgpu"}


def generate(functions: Mapping[str, tirx.PrimFunc]) -> dict[str, Code]:
    """Scheduled PrimFuncs to code, by name. Raises CompileError for one that is no kernel of a GPU."""
    found = tvm_codegen.generate(functions, TVM_TARGET, _texts)
    return {name: _code(kernels) for name, kernels in found.items()}


def _texts(kernels: IRModule, target: object) -> dict[str, str]:
    build = tvm.get_global_func("target.build.webgpu")
    found = {}
    for name, kernel in kernels.functions.items():
        text = build(IRModule({name: kernel}), target).inspect_source()
        # As code.Buffer says, what is no weight is bound for reading and writing.
        found[name.name_hint] = text.replace("var<storage, read>", "var<storage, read_write>")
    return found


def _code(kernels: list[tvm_codegen.Generated]) -> Code:
    launches = [_launch(kernel) for kernel in kernels]
    return Code((), {k.name: k.text for k in kernels}, (Variant(1, tuple(launches)),))


def _launch(kernel: tvm_codegen.Generated) -> Launch:
    """TVM's struct PODArgs holds the symbols and, last, the largest index of the grid's x."""
    buffers = [tensor(p) for p in kernel.params if isinstance(p, int)]
    numbers = [int32(p) for p in kernel.params if isinstance(p, str)]
    last = int32(["-", kernel.grid[0], 1])
    return Launch(kernel.name, kernel.grid, kernel.block, (*buffers, *numbers, last))


def build(codes: Mapping[str, Code]) -> bytes:
    """JSON: function -> its module."""
    functions = {name: text for code in codes.values() for name, text in code.functions.items()}
    return json.dumps(functions).encode()
