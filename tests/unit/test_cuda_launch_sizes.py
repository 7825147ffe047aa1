"""Launches of CUDA products fit a multiprocessor, whatever the sizes: a driver would refuse them when a step comes."""

from dataclasses import replace

import pytest

from mlcgen.formats import BF16, F16, Q4, Q8, WeightFormat
from mlcgen.runtime.sizes import evaluate
from mlcgen.targets.base import Linear
from mlcgen.targets.cuda_kernels import linear
from mlcgen.targets.cuda_kernels.code import operand_type

SHARED = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024}  # bytes a block may have
TOKENS = [1, 4, 5, 16, 17, 33, 49, 64, 65, 128, 129, 256, 257, 512, 513, 1024, 1025, 2048]
SIZES = [(1024, 512), (6144, 4096), (8192, 8192), (8192, 28672), (10240, 8192), (28672, 4096), (57344, 8192)]


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("fmt", [F16, BF16, Q8, Q4], ids=lambda fmt: fmt.name)
def test_shared_memory(fmt: WeightFormat, arch: str) -> None:
    for rows, columns in SIZES:
        plain = Linear(fmt, rows, columns)
        for spec in (plain, replace(plain, has_residual=True), replace(plain, gates_result=True)):
            for out in ["float32"] if spec.has_residual else ["float32", "float16"]:
                check(spec, arch, out)


def check(spec: Linear, arch: str, out: str) -> None:
    kernel = linear(spec, arch)
    dtypes = [param.dtype for param in kernel.params]
    dtypes[0], dtypes[-1] = operand_type(spec.fmt), out
    code = kernel.generate(dtypes)
    for n in TOKENS:
        launches = next(variant.launches for variant in code.variants if evaluate(variant.when, {"n": n}))
        for launch in launches:
            assert evaluate(launch.shared, {"n": n}) <= SHARED[arch], (spec, n, launch.function)
            assert all(0 < evaluate(size, {"n": n}) <= limit for size, limit in zip(launch.grid, LIMITS, strict=True))


LIMITS = (2**31 - 1, 65535, 65535)  # blocks of a grid
