"""Building CPU kernels for the instruction sets that this machine runs, and for one that it does not."""

import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm.runtime import tensor

from mlcgen.formats import WeightFormat
from mlcgen.runtime.cpu import may_use_amx
from mlcgen.targets import cpu_codegen
from mlcgen.targets.cpu_kernels import Isa

AARCH64 = tvm.target.Target({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon"]})
X86_LEVELS = {
    "x86-64": set(),
    "x86-64-v3": {"avx2", "fma", "f16c", "bmi2"},
    "x86-64-v4": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "icelake-server": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"},
    "znver4": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16"},
    "sapphirerapids": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16", "amx_bf16"},
}
HAS_BF16_UNITS = ("znver4", "sapphirerapids")
MakeKernel = Callable[[Isa], tvm.tirx.PrimFunc]


def _missing(level: str) -> set[str]:
    if platform.machine() != "x86_64":
        return {"x86-64"}
    if level == "sapphirerapids" and not may_use_amx():
        return {"permission"}
    return X86_LEVELS[level] - set(Path("/proc/cpuinfo").read_text().split())


EVERY_ISA = [
    pytest.param(level, marks=pytest.mark.skipif(bool(_missing(level)), reason=f"this CPU is no {level}"))
    for level in X86_LEVELS
]
# Without the one that has only an int8 instruction more than the one before.
EVERY_FLOAT_ISA = [param for param in EVERY_ISA if param.values != ("icelake-server",)]
every_isa = pytest.mark.parametrize("mcpu", EVERY_ISA)
every_float_isa = pytest.mark.parametrize("mcpu", EVERY_FLOAT_ISA)


def every_isa_and(formats: Sequence[WeightFormat]) -> pytest.MarkDecorator:
    """Parameters mcpu and fmt: formats whose activations stay float32 need no instruction set for int8."""
    return pytest.mark.parametrize(
        ("mcpu", "fmt"),
        [
            pytest.param(*isa.values, fmt, marks=isa.marks, id=f"{fmt.name}-{isa.values[0]}")
            for fmt in formats
            for isa in (EVERY_ISA if fmt.int8_activations else EVERY_FLOAT_ISA)
        ],
    )


def build(mcpu: str, make: MakeKernel) -> Callable[..., None]:
    """The compiled kernel as a function of NumPy arrays, which it may write to."""
    kernel = compile_for(tvm.target.Target({"kind": "llvm", "mcpu": mcpu}), make)

    def run(*arrays: np.ndarray) -> None:
        tensors = [tensor(array) for array in arrays]
        kernel["main"](*tensors)
        for array, result in zip(arrays, tensors, strict=True):
            array[...] = result.numpy()

    return run


def compile_for(target: tvm.target.Target, make: MakeKernel) -> tvm.runtime.Executable:
    func = make(Isa.from_target(target)).with_attr("global_symbol", "main")
    return cpu_codegen.build(tvm.IRModule({"main": func}), target)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def unset(*shape: int) -> np.ndarray:
    return np.full(shape, np.nan, np.float32)


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float = 3e-6) -> None:
    """Within `tolerance` of the largest expected value."""
    assert actual.shape == expected.shape
    error = np.abs(actual - expected)
    assert np.all(error <= tolerance * np.abs(expected).max()), f"largest error {np.nanmax(error)}"


def compiles_for_aarch64(kernels: Sequence[MakeKernel]) -> None:
    for make in kernels:
        assert compile_for(AARCH64, make)
