"""Words that the CUDA kernels' Python sides share: C++ names of types and of stored formats, function definitions."""

from collections.abc import Sequence

from mlcgen.formats import WeightFormat

C_TYPES = {
    "float32": "float",
    "float16": "f16",
    "bfloat16": "bf16",
    "uint16": "bf16",  # how KV pages and weights in bfloat16 are stored
    "int32": "i32",
    "uint8": "u8",
}
HALVES = ("float16", "bfloat16")
MAX_TOKENS_PER_STEP = 1024  # more at once make products no faster, and other sequences wait longer
MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90": 132, "sm_100": 148}  # of the larger GPUs
# Shared memory that a block may have; others (sm_86, sm_89) have the least.
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
LEAST_SHARED_BYTES = 99 * 1024
RESERVED_BYTES = 1024  # of a multiprocessor for each block; and room for what kernels declare themselves


def stored_type(fmt: WeightFormat, columns: int) -> str:
    """The C++ type that reads single values of a matrix (stored.cuh)."""
    if fmt.is_grouped:
        return f"StoredGroups<{fmt.bits}, {fmt.group}, {str(fmt.has_minimum).lower()}, {columns}>"
    return f"StoredFloats<{C_TYPES[fmt.dtype]}, {columns}>"


def operand_type(fmt: WeightFormat) -> str:
    """The 16-bit type that products with a matrix of this format are computed in. Codes are exact in float16."""
    if fmt.is_grouped:
        return "float16"
    assert fmt.dtype != "float32", "Target.has_float32_weights"
    return "bfloat16" if fmt.dtype == "uint16" else fmt.dtype


def definition(name: str, params: Sequence[str], body: str, threads: int, blocks: int = 1) -> str:
    """A kernel's text. blocks: of it that must fit a multiprocessor at once, which bounds its registers."""
    bounds = f"__launch_bounds__({threads}, {blocks})"
    return f'extern "C" __global__ void {bounds} {name}({", ".join(params)}) {{ {body} }}\n'


def cpp(value: bool) -> str:
    return "true" if value else "false"
