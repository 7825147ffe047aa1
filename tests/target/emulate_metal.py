"""Metal's text of kernels for the emulator of CUDA's threads."""

from collections.abc import Mapping
from pathlib import Path

from mlcgen.targets.device_kernel import Code
from mlcgen.targets.metal_build import metal_source
from mlcgen.targets.wgsl_to_cpp import Module, modules

STAND_IN = Path(__file__).parent / "metal_stand_in"
BUILTINS = {
    "workgroup_id": "{blockIdx.x, blockIdx.y, blockIdx.z}",
    "local_invocation_index": "threadIdx.x",
    "local_invocation_id": "{threadIdx.x, 0u, 0u}",
    "num_workgroups": "{gridDim.x, gridDim.y, gridDim.z}",
}


def emulated_text(codes: Mapping[str, Code]) -> str:
    """C++ with a kernel of each name, which takes its numbers one by one."""
    library = (STAND_IN / "metal_stdlib").read_text()
    text = metal_source(codes).replace("#include <metal_stdlib>", library)
    text = text.replace("\n  threadgroup ", "\n  __shared__ ")  # variables of kernels, not references to them
    kernels = "".join(map(_kernel, modules(codes)))
    return f"#define EMULATED\nnamespace msl {{\n{text}}}\n#undef kernel\n#undef device\n#undef constant\n{kernels}"


def _kernel(module: Module) -> str:
    params = [
        f"msl::{type_.replace('<', '<msl::')}* {name}" for name, type_ in ((b.name, b.type) for b in module.buffers)
    ]
    params += [f"msl::{type_} {name}" for name, type_ in module.fields.items()]
    args = [b.name for b in module.buffers] + ["all_numbers"] * bool(module.numbers)
    args += [BUILTINS[name] for name in module.entry]
    numbers = ""
    if module.numbers:
        numbers = f"  msl::{module.struct}::{module.numbers[1]} all_numbers = {{{', '.join(module.fields)}}};\n"
    call = f"  msl::{module.name}({', '.join(args)});\n"
    return f'extern "C" void {module.name}({", ".join(params)}) {{\n{numbers}{call}}}\n'
