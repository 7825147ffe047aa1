"""Kernels cross-compiled for aarch64 and run under an emulator, against NumPy."""

from pathlib import Path

import numpy as np
import pytest
from tvm import te
from tvm.target import Target

from mlcgen.formats import BF16, F16, F32, Q4, Q8, WeightFormat, grouped, with_int8_activations
from mlcgen.targets.base import Linear
from mlcgen.targets.cpu_kernels import embedding, linear, rope_append

from .cpu_build import assert_close, compile_for, unset
from .emulate import each_variant, emulated, execute, link, needs_emulator
from .reference import random_weight
from .test_cpu_attention import Shape
from .test_cpu_attention import run as check_attention
from .test_cpu_linear import check as check_linear
from .test_cpu_rope import check as check_rope_append

FORMATS = [F32, F16, BF16, Q8, Q4, grouped(4, 32, has_minimum=True)]
INT8_FORMATS = [with_int8_activations(fmt) for fmt in (Q4, Q8, grouped(8, 16, has_minimum=True))]
each_kv_dtype = each_variant("kv_dtype", ["float32", "float16", "bfloat16"], newer=["bfloat16"])
pytestmark = needs_emulator


@each_variant("fmt", [*FORMATS, *INT8_FORMATS], newer=[BF16, Q4, *INT8_FORMATS], ids=lambda fmt: fmt.name)
def test_linear(variant: str, fmt: WeightFormat, tmp_path: Path) -> None:
    spec = Linear(fmt, 83, 96, has_bias=True)  # 6 tiles, the last of 3 columns
    kernel = emulated(variant, lambda isa: linear(spec, isa), tmp_path)
    check_linear(kernel, spec, (1, 4, 7, 55), 2e-3 if fmt.int8_activations else 3e-6)


@each_variant("fmt", FORMATS, newer=[BF16, Q4], ids=lambda fmt: fmt.name)
def test_embedding(variant: str, fmt: WeightFormat, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    stored, table = random_weight(fmt, 50, 96, rng)
    ids, out = rng.integers(0, 50, 9, dtype=np.int32), unset(9, 96)
    emulated(variant, lambda isa: embedding(fmt, 50, 96, isa), tmp_path)(ids, *stored, out)
    assert_close(out, table[ids], 1e-7)


@each_kv_dtype
def test_rope_append(variant: str, kv_dtype: str, tmp_path: Path) -> None:
    sizes = (3, 1, 80, 5, kv_dtype)
    check_rope_append(emulated(variant, lambda isa: rope_append(*sizes, isa), tmp_path), *sizes)


@each_kv_dtype
def test_paged_attention(variant: str, kv_dtype: str, tmp_path: Path) -> None:
    shape = Shape(6, 2, 64, 16, kv_dtype, window=50)
    kernel = emulated(variant, shape.kernel, tmp_path)
    for batch in ([(14, 1), (15, 1), (16, 1)], [(300, 1)], [(40, 30), (17, 1), (0, 3)], [(60, 0, 32), (30, 1, 9)]):
        check_attention(kernel, shape, batch, seed=len(batch))


def test_a_kernels_error_is_raised(tmp_path: Path) -> None:
    kernel = emulated("aarch64", lambda isa: embedding(F32, 50, 96, isa), tmp_path)
    with pytest.raises(RuntimeError, match="TypeError: Expected 3 arguments"):
        kernel(np.zeros(1, np.int32))


def test_an_instruction_that_the_cpu_lacks_is_an_error(tmp_path: Path) -> None:
    x = te.placeholder((64,), "float16")
    double = te.create_prim_func([x, te.compute(x.shape, lambda i: x[i] + x[i])])
    target = Target({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon", "+fullfp16"]})
    program = link(compile_for(target, lambda isa: double), tmp_path)
    values, out = np.arange(64, dtype=np.float16), np.zeros(64, np.float16)
    execute(program, "cortex-a76", [values, out])
    np.testing.assert_array_equal(out, 2 * values)
    with pytest.raises(RuntimeError, match="Illegal instruction"):
        execute(program, "cortex-a53", [values, out])
