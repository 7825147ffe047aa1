"""A model's kernels as one module of machine code: those of cuda_kernels/, TVM's leftovers, and the runtime's own."""

import re
from collections.abc import Mapping
from typing import Any

import tvm
from tvm import IRModule, tirx

from mlcgen.nvrtc import compile_cuda, resources
from mlcgen.targets import tvm_codegen
from mlcgen.targets.device_kernel import Code, Launch, Variant, tensor

DEFINITION = 'extern "C" __global__ '


def generate(functions: Mapping[str, tirx.PrimFunc], target: Mapping[str, Any]) -> dict[str, Code]:
    """Scheduled PrimFuncs to code, by name. Raises CompileError for one that is no kernel of a GPU."""
    found = tvm_codegen.generate(functions, target, _texts)
    return {name: _code(kernels) for name, kernels in found.items()}


def _texts(kernels: IRModule, target: Any) -> dict[str, str]:
    return _definitions(tvm.get_global_func("target.build.cuda")(kernels, target).inspect_source())


def _definitions(source: str) -> dict[str, str]:
    """Kernel name -> its text; TVM's own prelude is left out (tvm_prelude.cuh has what is used of it)."""
    found = {}
    for part in source.split(DEFINITION)[1:]:
        head = re.sub(r"__launch_bounds__\([^)]*\)", "", part).split("{", 1)[0]
        if ";" not in head:  # a definition, not its announcement
            found[head.split("(", 1)[0].split()[-1]] = DEFINITION + part
    return found


def _code(kernels: list[tvm_codegen.Generated]) -> Code:
    launches = []
    for kernel in kernels:
        args = tuple(tensor(p) if isinstance(p, int) else ["int64", p] for p in kernel.params)
        # TVM's code does not wait for the kernel before it.
        launches.append(Launch(kernel.name, kernel.grid, kernel.block, args, overlaps=False))
    return Code(("tvm_prelude.cuh",), {k.name: k.text for k in kernels}, (Variant(1, tuple(launches)),))


def build(codes: Mapping[str, Code], arch: str) -> tuple[bytes, dict[str, dict[str, int]]]:
    """(machine code, registers and spills of each function)"""
    module, log = compile_cuda(_source(codes), arch)
    return module, resources(log)


def _source(codes: Mapping[str, Code]) -> str:
    includes: dict[str, None] = {}
    functions: dict[str, str] = {}
    for code in codes.values():
        includes |= dict.fromkeys(code.includes)
        functions |= code.functions
    lines = [f'#include "{name}"' for name in ("stored.cuh", "sample.cuh", *includes)]
    return "\n".join([*dict.fromkeys(lines), *functions.values(), RUNTIME])


# Kernels of the runtime itself: they put the tokens that were chosen for rows of the step before into input_ids,
# choose tokens, and prepare the weights when an artifact is loaded.
RUNTIME = """
extern "C" __global__ void take_tokens(i32* input_ids, const i32* rows, const i32* chosen, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n && rows[i] >= 0) input_ids[i] = chosen[rows[i]];
}
extern "C" __global__ void __launch_bounds__(1024)
    argmax_rows_by_parts(const float* logits, Best* parts, u32* counters, i32* ids, float* values, int vocab) {
  argmax_of_parts<1024>(logits, parts, counters, ids, values, vocab);
}
extern "C" __global__ void __launch_bounds__(1024) sample_rows(
    float* logits, const sampling::Row* rows, sampling::Change* changes, const u32* masks, i32* results, int vocab) {
  sampling::sample(logits, rows, changes, masks, results, vocab);
}
extern "C" __global__ void untile_2(const u16* in, u16* out, int columns) { untile(in, out, columns); }
extern "C" __global__ void untile_4(const u32* in, u32* out, int columns) { untile(in, out, columns); }
extern "C" __global__ void random_uint8(u8* out, i64 n, float mean, float dev, int seed) {
  random_fill(out, n, mean, dev, seed);
}
extern "C" __global__ void random_float16(f16* out, i64 n, float mean, float dev, int seed) {
  random_fill(out, n, mean, dev, seed);
}
extern "C" __global__ void random_uint16(bf16* out, i64 n, float mean, float dev, int seed) {
  random_fill(out, n, mean, dev, seed);
}
extern "C" __global__ void random_float32(float* out, i64 n, float mean, float dev, int seed) {
  random_fill(out, n, mean, dev, seed);
}
"""
