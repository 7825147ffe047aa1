"""Lookups of the CUDA target under the emulator, against NumPy: embedding, rotation with the append to the pages, norm,
conversion, and what prepares weights on the device."""

import numpy as np
import pytest

from mlcgen.formats import BF16, F16, F32, Q4, Q8, WeightFormat, grouped
from mlcgen.targets.base import Linear
from mlcgen.targets.cuda_codegen import DEFINITION, RUNTIME
from mlcgen.targets.cuda_kernels import embedding, linear, rope_append
from mlcgen.targets.cuda_kernels.code import C_TYPES
from mlcgen.targets.device_kernel import Launch, tensor

from .cuda_build import as_dtype, as_float, poisoned, relative_error, run
from .emulate_cuda import EmulatedKernel, Order, compile_kernel, needs_compiler
from .reference import random_weight, rms_norm, rotate

pytestmark = needs_compiler

FORMATS = [F32, F16, BF16, Q8, Q4, grouped(4, 16, True), grouped(8, 64), grouped(8, 32, True)]
each_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # relative, beside what float32 loses before


def on_device(fmt: WeightFormat, stored: list[np.ndarray], columns: int) -> list[np.ndarray]:
    """The device holds floats row by row."""
    return stored if fmt.is_grouped else [np.ascontiguousarray(stored[0].transpose(0, 2, 1).reshape(-1, columns))]


def assert_rounded(actual: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    np.testing.assert_allclose(actual, expected, rtol=ROUNDING[dtype] * 1.02, atol=2e-6)


def runtime_kernel(name: str) -> EmulatedKernel:
    """A kernel that every launch plan carries."""
    text = next(part for part in RUNTIME.split(DEFINITION) if f"{name}(" in part.split("{")[0])
    return compile_kernel(f'#include "stored.cuh"\n{DEFINITION}{text}', name)


# Embedding


@each_format
def test_embedding(fmt: WeightFormat) -> None:
    """288 columns are more than a block has threads, and no multiple of them; 37 rows fill no tile."""
    columns = 320 if fmt.group == 64 else 288
    stored, matrix = random_weight(fmt, 37, columns, np.random.default_rng(1))
    ids = np.array([0, 36, 16, 15, 36, 7], np.int32)
    out = poisoned((len(ids), columns), "float32")
    kernel = embedding(fmt, 37, columns)
    run(kernel, [ids, *on_device(fmt, stored, columns), out], {"n": len(ids)})
    np.testing.assert_allclose(out, matrix[ids], rtol=1e-6, atol=1e-6)
    again = poisoned(out.shape, "float32")
    run(kernel, [ids, *on_device(fmt, stored, columns), again], {"n": len(ids)}, order="descending")
    np.testing.assert_array_equal(out, again)


# Rotation and the pages


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize(
    ("qkv_dtype", "kv_dtype", "q_dtype"),
    [
        ("float16", "float16", "float16"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float32", "float16", "float16"),
        ("float16", "bfloat16", "float16"),
        ("float32", "float32", "float32"),
    ],
)
def test_rope_append(page_size: int, qkv_dtype: str, kv_dtype: str, q_dtype: str) -> None:
    """Tokens without a slot get their queries, and leave the pages alone; so does what has no token."""
    heads, kv_heads, dim, tokens = 3, 2, 64, 5
    rng = np.random.default_rng([page_size, len(qkv_dtype)])
    kernel = rope_append(heads, kv_heads, dim, page_size, kv_dtype)
    pages_shape = (48 // page_size, 2, kv_heads, page_size, dim)
    slots = np.array([17, -1, 0, 39, -5], np.int32)
    given = as_dtype(rng.standard_normal((tokens, (heads + 2 * kv_heads) * dim)).astype(np.float32), qkv_dtype)
    angles = rng.uniform(0, 7, (tokens, dim // 2)).astype(np.float32)
    before = as_dtype(rng.standard_normal(pages_shape).astype(np.float32), kv_dtype)
    pages, q = before.copy(), poisoned((tokens, heads, dim), q_dtype)
    dtypes = [p.dtype for p in kernel.params]
    dtypes[0], dtypes[-1] = qkv_dtype, q_dtype
    run(
        kernel, [given, np.cos(angles), np.sin(angles), slots, pages, q], {"n": tokens, "num_pages": len(pages)}, dtypes
    )

    values = as_float(given, qkv_dtype).reshape(tokens, -1, dim)
    rotated = rotate(values.astype(np.float64), np.cos(angles), np.sin(angles))
    assert_rounded(as_float(q, q_dtype), rotated[:, :heads], q_dtype)
    expected = before.copy()
    for token, slot in enumerate(slots):
        if slot < 0:
            continue
        page, at = divmod(int(slot), page_size)
        held = as_float(pages[page, :, :, at], kv_dtype)
        assert_rounded(held[0], rotated[token, heads : heads + kv_heads], kv_dtype)
        assert_rounded(held[1], values[token, heads + kv_heads :], kv_dtype)
        expected[page, :, :, at] = pages[page, :, :, at]
    np.testing.assert_array_equal(pages, expected)  # all other slots are as they were


def test_rope_append_needs_more_than_one_block_of_threads() -> None:
    """(8 + 2) * 128 / 2 pairs: 640 threads of three blocks, some of which have no pair."""
    rng = np.random.default_rng(3)
    kernel = rope_append(8, 1, 128, 16, "float16")
    qkv = rng.standard_normal((2, 10 * 128)).astype(np.float16)
    angles = rng.uniform(0, 7, (2, 64)).astype(np.float32)
    pages, q = np.zeros((1, 2, 1, 16, 128), np.float16), poisoned((2, 8, 128), "float16")
    dtypes = ["float16", *(p.dtype for p in kernel.params[1:-1]), "float16"]
    arrays = [qkv, np.cos(angles), np.sin(angles), np.array([3, 4], np.int32), pages, q]
    run(kernel, arrays, {"n": 2, "num_pages": 1}, dtypes, "descending")
    values = qkv.astype(np.float64).reshape(2, 10, 128)
    rotated = rotate(values, np.cos(angles), np.sin(angles))
    np.testing.assert_allclose(q, rotated[:, :8], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(pages[0, 0, 0, 3:5], rotated[:, 8], rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(pages[0, 1, 0, 3:5], qkv.reshape(2, 10, 128)[:, 9])
    assert not pages[0, :, :, :3].any()
    assert not pages[0, :, :, 5:].any()


# Norm and conversion


@pytest.mark.parametrize(("columns", "threads"), [(4, 32), (260, 64), (1024, 256), (1028, 256)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rms_norm(columns: int, threads: int, dtype: str) -> None:
    body = f"rms_norm<{C_TYPES[dtype]}, {columns}, {threads}>(x, weight, out, 1e-5f);"
    params = f"const float* x, const float* weight, {C_TYPES[dtype]}* out"
    kernel = compile_kernel(f'#include "norm.cuh"\n{DEFINITION}void norm({params}) {{ {body} }}', "norm")
    rng = np.random.default_rng(columns)
    x = rng.standard_normal((3, columns)).astype(np.float32) * np.array([[1], [1e-4], [300]], np.float32)
    weight = rng.uniform(0.5, 2, columns).astype(np.float32)
    out = poisoned(x.shape, dtype)
    kernel(len(x), threads, [x, weight, out])
    assert_rounded(as_float(out, dtype), rms_norm(x, weight, 1e-5), dtype)


@pytest.mark.parametrize(("source", "to"), [("float32", "float16"), ("float16", "bfloat16"), ("bfloat16", "float16")])
def test_convert(source: str, to: str) -> None:
    """As linear launches it: a thread for each four values, the last block not full."""
    params = f"const {C_TYPES[source]}* x, {C_TYPES[to]}* out, int count"
    text = f'#include "norm.cuh"\n{DEFINITION}void change({params}) {{ convert(x, out, i64(count) * 4); }}'
    values = np.random.default_rng(0).standard_normal(4 * 41).astype(np.float32)
    given, out = as_dtype(values, source), poisoned((4 * 41 + 4,), to)
    compile_kernel(text, "change")(2, 32, [given, out, 41])
    np.testing.assert_array_equal(out[:-4], as_dtype(as_float(given, source), to))
    assert np.isnan(as_float(out[-4:], to)).all()  # nothing behind the end


# Weights


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("columns", [1, 64, 130])
def test_untile(dtype: str, columns: int) -> None:
    """As device_weights launches it."""
    rng = np.random.default_rng(columns)
    tiled = rng.integers(0, 1 << 32, (3, columns, 16)).astype(dtype)
    out = np.zeros((48, columns), dtype)
    kernel = runtime_kernel(f"untile_{out.itemsize}")
    kernel((-(-columns // 64), 3, 1), 256, [tiled, out, columns])
    np.testing.assert_array_equal(out, tiled.transpose(0, 2, 1).reshape(48, columns))


def decode_launch(fmt: WeightFormat, rows: int, columns: int) -> tuple[Launch, str]:
    """The launch that decodes a whole matrix before a product of many tokens, and its function."""
    code = linear(Linear(fmt, rows, columns), "sm_90").generate(
        ["float16", *["uint8"] * (2 + fmt.has_minimum), "float32"]
    )
    launch = next(each for each in code.variants[-1].launches if each.function.startswith("decode_"))
    return launch, code.functions[launch.function]


@pytest.mark.parametrize("fmt", [Q8, *(f for f in FORMATS if f.has_minimum or f.group > 32)], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_decode_matrix(fmt: WeightFormat, order: Order) -> None:
    """352 columns fill no whole number of blocks."""
    rows, columns = 64, 352 if fmt.group != 64 else 320
    stored, matrix = random_weight(fmt, rows, columns, np.random.default_rng(2))
    launch, text = decode_launch(fmt, rows, columns)
    kernel = compile_kernel(f'#include "stored.cuh"\n{text}', launch.function)
    out = np.full((rows + 1, columns), np.nan, np.float16)
    arrays = {tuple(tensor(1 + i)): part for i, part in enumerate(stored)}
    args = [arrays.get((kind, value)) if kind != "scratch" else out for kind, value in launch.args]
    kernel(launch.grid, launch.block, args, order=order)
    np.testing.assert_array_equal(out[:rows], matrix.astype(np.float16))
    assert np.isnan(out[rows]).all()


FLOATS = {"float16": "float16", "uint16": "bfloat16", "float32": "float32"}


def filled(dtype: str, count: int, mean: float, deviation: float, seed: int) -> np.ndarray:
    """count values by 4 blocks, and one behind them that must stay."""
    out = np.full(count + 1, 77, dtype)
    args = (np.int64(count), np.float32(mean), np.float32(deviation), np.int32(seed))
    runtime_kernel(f"random_{dtype}")(4, 256, [out, *args])
    assert out[-1] == 77
    return out[:-1]


@pytest.mark.parametrize("dtype", FLOATS)
def test_random_floats(dtype: str) -> None:
    """Near enough to normal: moments within what 40,000 samples allow, values and places independent."""
    count, mean, deviation = 40_001, 0.5, 0.25
    raw = filled(dtype, count, mean, deviation, 3)
    values = (as_float(raw, FLOATS[dtype]).astype(np.float64) - mean) / deviation
    assert abs(values.mean()) < 5 / count**0.5
    assert abs(values.std() - 1) < 0.02
    assert abs((values**3).mean()) < 0.06
    assert 2.4 < (values**4).mean() < 3.1  # 2.7: a sum of four uniform numbers
    assert 2.5 < np.abs(values).max() < 3.5
    for lag in (1, 256, 1024):
        assert abs((values[lag:] * values[:-lag]).mean()) < 0.03
    other = (as_float(filled(dtype, count, mean, deviation, 4), FLOATS[dtype]).astype(np.float64) - mean) / deviation
    assert abs((values * other).mean()) < 0.03
    np.testing.assert_array_equal(raw, filled(dtype, count, mean, deviation, 3))


def test_random_floats_of_no_deviation_are_the_mean() -> None:
    np.testing.assert_array_equal(filled("float32", 1000, 1.0, 0.0, 1), np.ones(1000, np.float32))


def test_random_codes() -> None:
    """Each of 256 equally often (a chi-squared test: 255 degrees of freedom), whatever mean and deviation are."""
    codes = filled("uint8", 100_003, 5.0, 0.1, 9)
    counts = np.bincount(codes, minlength=256)
    assert ((counts - counts.mean()) ** 2).sum() / counts.mean() < 255 + 5 * (2 * 255) ** 0.5
    assert (codes != filled("uint8", 100_003, 5.0, 0.1, 10)).mean() > 0.98


def test_the_norm_that_linear_launches_before_its_product() -> None:
    """The kernels above by the names that launch plans call; everything else of linear is in test_cuda_linear.py."""
    kernel = linear(Linear(Q4, 32, 64, norm_eps=1e-5), "sm_80")
    rng = np.random.default_rng(5)
    stored, matrix = random_weight(Q4, 32, 64, rng)
    x, weight = rng.standard_normal((9, 64)).astype(np.float32), rng.uniform(0.5, 2, 64).astype(np.float32)
    out = poisoned((9, 32), "float32")
    launched = run(kernel, [x, weight, *stored, out], {"n": 9})
    assert launched[0].startswith("rms_norm_float16_64")
    assert relative_error(out, rms_norm(x, weight, 1e-5) @ matrix.T) < 1e-3
