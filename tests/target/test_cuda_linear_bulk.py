"""linear_bulk.cuh under the emulator, against NumPy: all kinds of formats, few tokens, odd sizes, rings that wrap."""

from dataclasses import dataclass

import numpy as np
import pytest

from mlcgen.formats import BF16, F16, Q4, Q8, WeightFormat, grouped
from mlcgen.targets.cuda_kernels.code import C_TYPES, cpp, operand_type

from .cuda_build import as_dtype, as_float, poisoned, relative_error
from .emulate_cuda import Argument, EmulatedKernel, EmulationError, compile_kernel, needs_compiler
from .reference import random_weight, rms_norm, silu_mul

pytestmark = needs_compiler

EPS = 1e-5
SUM_BYTES = 2 * 32 * 5 * 4  # of a warp: two sets of 32 rows' sums
PARAMS = (
    "const void* x, const float* norm, const void* w, const void* scale, const void* minimum, const float* bias, "
    "const float* residual, void* out, int n"
)


@dataclass(frozen=True)
class Bulk:
    """A product and how its kernel is built."""

    fmt: WeightFormat
    n: int
    k: int
    warps: int = 4
    segment: int = 64
    stages: int = 2
    has_norm: bool = False
    is_gated: bool = False
    has_bias: bool = False
    has_residual: bool = False
    out_dtype: str = "float32"

    def compiled(self) -> EmulatedKernel:
        fmt = self.fmt
        grouped_type = f"GroupWeights<{fmt.bits}, {fmt.group}, {cpp(fmt.has_minimum)}"
        kind = grouped_type if fmt.is_grouped else f"FloatWeights<{C_TYPES[fmt.dtype]}"
        weights = f"{kind}, {self.n}, {self.k}"
        sizes = f"{self.n}, {self.k}, {self.warps}, {self.segment}, {self.stages}"
        flags = f"{cpp(self.has_norm)}, {cpp(self.is_gated)}"
        spec = f"BulkSpec<{weights}, {cpp(self.is_gated)}>, {C_TYPES[self.out_dtype]}, {sizes}, {flags}>"
        body = f"linear_bulk<{spec}>({{x, norm, w, scale, minimum, bias, residual, out, n, {EPS}f}});"
        return compile_kernel(
            f'#include "linear_bulk.cuh"\nextern "C" __global__ void bulk({PARAMS}) {{ {body} }}', "bulk"
        )

    def shared_bytes(self, num_tokens: int) -> int:
        fmt = self.fmt
        if fmt.is_grouped:
            scales = self.segment // fmt.group * 16 * 2 * (2 if fmt.has_minimum else 1)
            segment = 2 * (self.segment * fmt.bits // 8 * 16 + scales)
        else:
            segment = 32 * (self.segment * 2 + 64)
        token = self.k * 2 + (64 if self.k * 2 % 128 == 0 else 0)
        return self.warps * (self.stages * segment + SUM_BYTES) + num_tokens * token


def check(bulk: Bulk, num_tokens: tuple[int, ...] = (1, 4), blocks: int = 2) -> None:
    rng = np.random.default_rng([bulk.n, bulk.k])
    kernel = bulk.compiled()
    stored, matrix = random_weight(bulk.fmt, bulk.n, bulk.k, rng)
    width = bulk.n // 2 if bulk.is_gated else bulk.n
    for n in num_tokens:
        operand = operand_type(bulk.fmt)
        given = as_dtype(rng.standard_normal((n, bulk.k)).astype(np.float32), "float32" if bulk.has_norm else operand)
        norm = rng.uniform(0.5, 2, bulk.k).astype(np.float32) if bulk.has_norm else None
        bias = rng.standard_normal(bulk.n).astype(np.float32) if bulk.has_bias else None
        residual = rng.standard_normal((n, width)).astype(np.float32) if bulk.has_residual else None
        out = poisoned((n, width), bulk.out_dtype)
        if bulk.fmt.is_grouped:
            w, scale, minimum = (*stored, None)[:3]
        else:
            w, scale, minimum = as_dtype(matrix, operand), None, None
        args: list[Argument] = [given, norm, w, scale, minimum, bias, residual, out, n]
        kernel(blocks, 32 * bulk.warps, args, bulk.shared_bytes(n), "descending" if n % 2 else "ascending")
        inner = as_float(given, "float32" if bulk.has_norm else operand)
        inner = inner if norm is None else rms_norm(inner, norm, EPS)
        expected = inner.astype(np.float64) @ matrix.T + (0 if bias is None else bias)
        expected = silu_mul(expected) if bulk.is_gated else expected
        expected = expected if residual is None else expected + residual
        assert relative_error(as_float(out, bulk.out_dtype), expected) < (1e-2 if operand == "bfloat16" else 1e-3), n


FORMATS = [F16, BF16, Q4, Q8, grouped(4, 16), grouped(4, 64, True), grouped(8, 16, True), grouped(8, 32, True)]


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_formats(fmt: WeightFormat) -> None:
    check(Bulk(fmt, 83, 640, has_bias=True), (1, 2, 3, 4))


def test_what_stands_around_the_product() -> None:
    check(Bulk(Q4, 192, 352, has_norm=True))
    check(Bulk(Q4, 192, 352, has_norm=True, is_gated=True, has_bias=True, out_dtype="float16"))
    check(Bulk(Q8, 96, 352, has_residual=True, has_bias=True))
    check(Bulk(F16, 192, 352, has_norm=True, is_gated=True, has_bias=True, out_dtype="float16"))


@pytest.mark.parametrize(("warps", "segment", "stages"), [(4, 32, 1), (4, 32, 3), (8, 128, 2), (5, 64, 4)])
def test_rings(warps: int, segment: int, stages: int) -> None:
    check(Bulk(Q4, 160, 416, warps, segment, stages), (1, 2), blocks=3)


def test_more_stages_than_segments() -> None:
    check(Bulk(Q4, 32, 96, segment=256, stages=3), blocks=1)


def test_waiting_for_bytes_that_nobody_asked_for_is_an_error() -> None:
    body = "__shared__ u64 b; if (threadIdx.x == 0) init_bulk_barrier(&b); __syncthreads(); wait_bulk(&b, 0);"
    kernel = compile_kernel(f'#include "primitives.cuh"\nextern "C" __global__ void bad() {{ {body} }}', "bad")
    with pytest.raises(EmulationError, match="not asked for"):
        kernel(1, 32, [])
