"""The CUDA emulator: each primitive against NumPy, and the mistakes that it must find."""

import re
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from .emulate_cuda import (
    EMULATOR,
    KERNELS,
    Argument,
    EmulatedKernel,
    EmulationError,
    Order,
    compile_kernel,
    compile_kernels,
    needs_compiler,
)

pytestmark = needs_compiler

TYPES = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
each_type = pytest.mark.parametrize("number", TYPES)
both_orders = pytest.mark.parametrize("order", ["ascending", "descending"])


def kernel(parameters: str, body: str) -> EmulatedKernel:
    return compile_kernel(
        f'#include "primitives.cuh"\nextern "C" __global__ void test({parameters}) {{\n{body}\n}}', "test"
    )


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def pairs(values: np.ndarray) -> np.ndarray:
    """16-bit values as registers of two."""
    return np.ascontiguousarray(values).view(np.uint32)


def names_of(header: str) -> set[str]:
    header = re.sub(r"(?ms)^namespace emulator \{.*?^\}", "", header)
    functions = re.findall(r"^(?:template <.*?> ?)?DEVICE .*?(\w+)(?:<\w+>)?\(", header, re.M)
    return {*functions, *re.findall(r"^(?:using|#define|constexpr \w+) (\w+)", header, re.M)}


def test_names_are_those_of_the_kernels() -> None:
    real, emulated = ((folder / "primitives.cuh").read_text() for folder in (KERNELS, EMULATOR))
    assert {"mma", "f16", "WARP", "DYNAMIC_SHARED", "from_float", "ldmatrix"} <= names_of(real)
    assert names_of(emulated) == names_of(real)


# ---- numbers ----


@each_type
def test_rounding(number: str) -> None:
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.99, 65520, 3.39e38, 6e-8, 2.98e-8, 2.99e-8, 1e-40]
    halves = np.arange(2048, 4096, dtype=np.float32) / 2 ** np.arange(0, 32, dtype=np.float32).repeat(64)
    x = np.concatenate([special, halves, halves / 256 + 1, normal(10000) * 100, [0]]).astype(np.float32)
    x = x[: len(x) // 2 * 2]
    rounded, packed, unpacked = np.zeros(len(x), TYPES[number]), np.zeros(len(x), TYPES[number]), np.zeros_like(x)
    kernel(
        f"const float2* x, {number}* rounded, u32* packed, float2* unpacked, int n",
        f"""for (int i = threadIdx.x; i < n; i += WARP) {{
          rounded[2 * i] = from_float<{number}>(x[i].x), rounded[2 * i + 1] = from_float<{number}>(x[i].y);
          packed[i] = pack<{number}>(x[i].x, x[i].y);
          unpacked[i] = unpack<{number}>(packed[i]);
        }}""",
    )(1, 32, [x, rounded, packed, unpacked, len(x) // 2])
    with np.errstate(over="ignore"):
        expected = x.astype(TYPES[number])
    for result in (rounded, packed, unpacked):
        np.testing.assert_array_equal(result.astype(np.float32), expected.astype(np.float32))


@each_type
def test_arithmetic_rounds_each_result(number: str) -> None:
    a, b = (normal(1000, seed=seed).astype(TYPES[number]) for seed in range(2))
    sums, products = np.zeros_like(a), np.zeros_like(a)
    kernel(
        f"const {number}* a, const {number}* b, {number}* sums, {number}* products",
        "for (int i = threadIdx.x; i < 1000; i += WARP) sums[i] = a[i] + b[i], products[i] = a[i] * b[i];",
    )(1, 32, [a, b, sums, products])
    np.testing.assert_array_equal(sums, a + b)
    np.testing.assert_array_equal(products, a * b)


def round_exactly(x: Fraction, dtype: np.dtype) -> float:
    """The nearest, or of two the one with an even last bit."""
    near = np.array(float(x)).astype(dtype).view(np.uint16)
    candidates = np.array([near - 1, near, near + 1], np.uint16).view(dtype)
    finite = (c for c in candidates if np.isfinite(c))
    return float(min(finite, key=lambda c: (abs(Fraction(float(c)) - x), c.view(np.uint16) % 2)))


@each_type
def test_fma_rounds_once(number: str) -> None:
    dtype = TYPES[number]
    a, b, c = (normal(2000, seed=seed).astype(dtype) for seed in range(3))
    # Ties of the sum but for a product far too small for a double's last bit.
    a[:100], b[:100] = np.array(2.0**-12).astype(dtype), (np.array(2.0**-12) * (-1.0) ** np.arange(100)).astype(dtype)
    a[100:200], b[100:200] = 1 + 2 * np.finfo(dtype).eps if number == "f16" else 1.0, 0.5
    result = np.zeros_like(a)
    kernel(
        "const u32* a, const u32* b, const u32* c, u32* result",
        f"for (int i = threadIdx.x; i < 1000; i += WARP) result[i] = fma_pair<{number}>(a[i], b[i], c[i]);",
    )(1, 32, [pairs(a), pairs(b), pairs(c), result])
    exact = [Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in zip(*(v.tolist() for v in (a, b, c)), strict=True)]
    np.testing.assert_array_equal(result, [round_exactly(x, dtype) for x in exact])


def test_bytes_and_differences() -> None:
    a, b = normal(64).astype(np.float16), normal(64, seed=1).astype(np.float16)
    picked, differences = np.zeros(32, np.uint32), np.zeros_like(a)
    kernel(
        "const u32* a, const u32* b, u32* picked, u32* differences",
        """int i = threadIdx.x;
        picked[i] = pick_bytes(a[i], b[i], 0x7061);
        differences[i] = subtract_pair_f16(a[i], b[i]);""",
    )(1, 32, [a, b, picked, differences])
    eight = np.hstack([a.view(np.uint8).reshape(-1, 4), b.view(np.uint8).reshape(-1, 4)])
    np.testing.assert_array_equal(picked.view(np.uint8).reshape(-1, 4), eight[:, [1, 6, 0, 7]])
    np.testing.assert_array_equal(differences, a - b)


# ---- warps ----


@each_type
@both_orders
def test_mma(number: str, order: Order) -> None:
    a, b = normal(16, 16).astype(TYPES[number]), normal(16, 8, seed=1).astype(TYPES[number])
    d = normal(16, 8, seed=2)
    expected = d + a.astype(np.float64) @ b.astype(np.float64)
    kernel(
        "const u32* a, const u32* b, float2* d",
        f"""int g = threadIdx.x / 4, t = threadIdx.x % 4;
        u32 left[4] = {{a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4], a[(g + 8) * 8 + t + 4]}};
        u32 right[2] = {{b[g * 8 + t], b[g * 8 + t + 4]}};
        float2 &upper = d[g * 4 + t], &lower = d[(g + 8) * 4 + t];
        float sum[4] = {{upper.x, upper.y, lower.x, lower.y}};
        mma<{number}>(sum, left, right);
        upper = {{sum[0], sum[1]}}, lower = {{sum[2], sum[3]}};""",
    )(1, 32, [a, np.ascontiguousarray(b.T), d], order=order)
    np.testing.assert_allclose(d, expected, rtol=1e-6, atol=1e-6)


@both_orders
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed: bool, order: Order) -> None:
    matrices = np.random.default_rng(0).integers(0, 1 << 16, (4, 8, 8), np.uint16)
    registers = np.zeros((32, 4, 2), np.uint16)
    kernel(
        "const uint4* rows, u32* registers",
        f"""__shared__ uint4 copy[32];
        copy[threadIdx.x] = rows[threadIdx.x];
        sync_warp();
        u32 r[4];
        {"ldmatrix_transposed" if transposed else "ldmatrix"}(r, &copy[threadIdx.x]);
        copy[threadIdx.x] = {{}};  // all lanes have read
        for (int i = 0; i < 4; i++) registers[threadIdx.x * 4 + i] = r[i];""",
    )(1, 32, [matrices, registers], order=order)
    expected = matrices.swapaxes(1, 2) if transposed else matrices
    np.testing.assert_array_equal(registers.transpose(1, 0, 2).reshape(4, 8, 8), expected)


@both_orders
def test_shuffles(order: Order) -> None:
    x = normal(2, 32)
    result = np.zeros((2, 5, 32), np.float32)
    kernel(
        "const float* x, float* result",
        """int lane = threadIdx.x % WARP;
        float v = x[threadIdx.x];
        result += threadIdx.x / WARP * 5 * WARP + lane;
        result[0] = shuffle_xor(v, 5);
        result[WARP] = shuffle(v, lane * 7 + 3);
        result[2 * WARP] = warp_sum(v);
        result[3 * WARP] = warp_max(v);
        result[4 * WARP] = any_lane(threadIdx.x == 40);""",
    )(1, 64, [x, result], order=order)
    lanes = np.arange(32)
    np.testing.assert_array_equal(result[:, 0], x[:, lanes ^ 5])
    np.testing.assert_array_equal(result[:, 1], x[:, (lanes * 7 + 3) % 32])
    np.testing.assert_allclose(result[:, 2], x.sum(1, keepdims=True).repeat(32, 1), rtol=1e-5)
    np.testing.assert_array_equal(result[:, 3], x.max(1, keepdims=True).repeat(32, 1))
    np.testing.assert_array_equal(result[:, 4], np.array([[0.0], [1.0]]).repeat(32, 1))


# ---- blocks ----


@both_orders
def test_sum_of_a_block(order: Order) -> None:
    x, sums = normal(3, 1000), np.zeros(3, np.float32)
    kernel(
        "const float* x, float* sums, int n, float factor",
        """DYNAMIC_SHARED(shared);
        float* parts = reinterpret_cast<float*>(shared);
        parts[threadIdx.x] = 0;
        for (int i = threadIdx.x; i < n; i += blockDim.x) parts[threadIdx.x] += factor * x[blockIdx.x * n + i];
        for (int m = blockDim.x / 2; m; m /= 2) {
          __syncthreads();
          if (threadIdx.x < m) parts[threadIdx.x] += parts[threadIdx.x + m];
        }
        if (threadIdx.x == 0) sums[blockIdx.x] = parts[0];""",
    )(3, 1024, [x, sums, 1000, 2.0], shared=4096, order=order)
    np.testing.assert_allclose(sums, 2 * x.sum(1), rtol=1e-4)


def test_positions() -> None:
    where = np.zeros((2, 3, 4, 5, 6), np.int32)
    kernel(
        "int* where",
        """int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
        where[(block * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x] = 10000 * blockIdx.z +
            1000 * blockIdx.y + 100 * blockIdx.x + 10 * threadIdx.y + threadIdx.x;""",
    )((4, 3, 2), (6, 5), [where])
    digits = np.indices(where.shape)
    np.testing.assert_array_equal(where, np.tensordot([10000, 1000, 100, 10, 1], digits, 1))


def test_atomics() -> None:
    counters, total, arrived = np.zeros(4, np.int32), np.zeros(1, np.float32), np.zeros(3, np.uint32)
    kernel(
        "int* counters, float* total, u32* arrived",
        """atomicAdd(&counters[0], 2);
        atomicMax(&counters[1], int(blockIdx.x * blockDim.x + threadIdx.x));
        atomicAdd(total, 0.5f);
        atomicInc(&arrived[0], 9);
        if (threadIdx.x == 0 && arrives_last(&arrived[1], gridDim.x)) arrived[2] += blockIdx.x + 1;""",
    )(5, 33, [counters, total, arrived])
    assert counters.tolist() == [330, 164, 0, 0]
    assert total == 82.5
    assert arrived.tolist() == [165 % 10, 0, 5]


COPIES = """
__shared__ uint4 copies[2][32];
for (int i = 0; i < 2; i++) {
  copy_async(&copies[i][threadIdx.x], from + i * WARP + threadIdx.x, threadIdx.x != 3);
  COMMIT;
}
WAIT;
for (int i = 0; i < 2; i++) to[i * WARP + threadIdx.x] = copies[i][threadIdx.x];
"""


def copied(commit: str, wait: str) -> tuple[np.ndarray, np.ndarray]:
    """What COPIES reads and should have read."""
    x, y = normal(2, 32, 4), np.zeros((2, 32, 4), np.float32)
    copy = kernel("const uint4* from, uint4* to", COPIES.replace("COMMIT", commit).replace("WAIT", wait))
    copy(1, 32, [x, y])
    x[:, 3] = 0
    return y, x


def test_copy_async() -> None:
    y, x = copied("commit_copies()", "wait_copies<0>()")
    np.testing.assert_array_equal(y, x)
    y, x = copied("commit_copies()", "wait_copies<1>()")
    np.testing.assert_array_equal(y[0], x[0])
    assert np.isnan(y[1]).all()


@pytest.mark.parametrize(("commit", "wait"), [("commit_copies()", ""), ("", "wait_copies<0>()")])
def test_copies_without_commit_or_wait_do_not_arrive(commit: str, wait: str) -> None:
    assert np.isnan(copied(commit, wait)[0]).all()


# ---- mistakes ----

MISTAKES = {
    "barrier that some threads do not reach": (
        "if (threadIdx.x < 40) __syncthreads();",
        r"deadlock in block \(0, 0, 0\): thread 0 waits at __syncthreads, thread 40 is at return",
    ),
    "exchange that some lanes do not reach": (
        "if (threadIdx.x != 5) x[0] = shuffle_xor(1.f, 1);",
        "thread 0 waits at shuffle_xor, thread 5 is at return",
    ),
    "lanes at different operations": (
        "if (threadIdx.x % 2) sync_warp(); else x[0] = shuffle_xor(1.f, 1);",
        r"thread \(1, 0, 0\) of block \(0, 0, 0\): this lane is at sync_warp, others of its warp are elsewhere",
    ),
    "wait for another block": ("while (*(volatile float*)x == 1) {}", "still running"),
    "write beyond an array": ("x[64 + threadIdx.x] = 1;", "access to byte 256 of argument 0, which has 256"),
    "write before an array": ("x[-1 - int(threadIdx.x)] = 1;", "write outside argument 0"),
    "write to a constant array": ("*const_cast<float*>(c) = 1;", "write to argument 1, which is read-only"),
    "read beyond an array": ("x[0] = c[10000];", "access to byte 40000 of argument 1"),
    "null pointer": ("*none = 1;", "invalid address"),
    "beyond dynamic shared memory": (
        "DYNAMIC_SHARED(s); s[1024 + threadIdx.x] = 1;",
        "access to byte 1024 of 1000 bytes of dynamic shared memory",
    ),
    "little beyond dynamic shared memory": (
        "DYNAMIC_SHARED(s); s[1000] = 1;",
        r"block \(0, 0, 0\) wrote beyond its dynamic shared memory",
    ),
    "index outside a shared array": ("__shared__ float s[4]; s[threadIdx.x] = 1; x[0] = s[0];", "outside an array"),
    "index outside a local array": ("float v[4] = {}; x[0] = v[threadIdx.x];", "outside an array"),
    "misaligned vector": ("*reinterpret_cast<float4*>(x + 2) = {};", "misaligned"),
    "misaligned row": ("__shared__ u16 s[512]; u32 r[4]; ldmatrix(r, s + 1);", "misaligned address in ldmatrix"),
    "row outside shared memory": ("u32 r[4]; ldmatrix(r, x);", "ldmatrix outside shared memory"),
    "copies of other lanes without a barrier": (
        "DYNAMIC_SHARED(s); copy_async(s + threadIdx.x % 32 * 16, x); commit_copies(); wait_copies<0>();"
        "u32 r[4]; ldmatrix(r, s);",
        "ldmatrix of what thread 0 copied, without a barrier after its wait",
    ),
    "copies of another warp without a barrier": (
        "DYNAMIC_SHARED(s); if (threadIdx.x / 32 == 0) copy_async(s, x); commit_copies(); wait_copies<0>();"
        "sync_warp(); u32 r[4]; ldmatrix(r, s + threadIdx.x % 32 * 16);",
        r"thread \(63, 0, 0\) of block \(0, 0, 0\): ldmatrix of what thread 31 copied",
    ),
    "unset bool": ("__shared__ bool b; if (b) x[0] = 1;", "unset bool"),
    "stack overflow": ("volatile char s[100000]; s[0] = 1;", "stack overflow"),
}


@pytest.fixture(scope="module")
def mistaken() -> dict[str, EmulatedKernel]:
    """A kernel for each mistake."""
    names = {mistake: mistake.replace(" ", "_") for mistake in MISTAKES}
    kernels = (
        f'extern "C" __global__ void {names[mistake]}(float* x, const float* c, float* none) {{ {body} }}\n'
        for mistake, (body, _) in MISTAKES.items()
    )
    compiled = compile_kernels('#include "primitives.cuh"\n' + "".join(kernels), list(names.values()))
    return {mistake: compiled[name] for mistake, name in names.items()}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(mistaken: dict[str, EmulatedKernel], mistake: str) -> None:
    run, message = mistaken[mistake], MISTAKES[mistake][1]
    x, constant = np.ones(64, np.float32), np.ones(64, np.float32)
    constant.flags.writeable = False
    with pytest.raises(EmulationError, match=message):
        run(1, 64, [x, constant, None], shared=1000, seconds=1)
    with pytest.raises(EmulationError, match=message):  # the failure left the emulator as it was
        run(1, 64, [x, constant, None], shared=1000, seconds=1)


@pytest.mark.parametrize(
    "variable", ["__shared__ float v[1];", "DYNAMIC_SHARED(s); auto v = (float*)s;", "float v[1];"]
)
def test_unset_variables_show(variable: str) -> None:
    x = np.zeros(2, np.float32)
    kernel("float* x", f"{variable} x[blockIdx.x] = v[0]; v[0] = 1;")(2, 1, [x], shared=4)
    assert not (np.abs(x) < 1e38).any()  # NaN; locals compiled by GCC are huge


def test_order_exposes_a_missing_barrier() -> None:
    body = """__shared__ int v[64];
    v[threadIdx.x] = threadIdx.x;
    BARRIER
    x[threadIdx.x] = threadIdx.x ? v[threadIdx.x - 1] : 0;"""

    def results(body: str) -> list[list[int]]:
        run, x, y = kernel("int* x", body), np.zeros(64, np.int32), np.zeros(64, np.int32)
        run(1, 64, [x])
        run(1, 64, [y], order="descending")
        return [x.tolist(), y.tolist()]

    assert results(body.replace("BARRIER", "__syncthreads();")) == [[0, *range(63)]] * 2
    right, wrong = results(body.replace("BARRIER", ""))
    assert right == [0, *range(63)]
    assert wrong == [0, *[-1] * 63]


def test_arguments_must_fit() -> None:
    run = kernel("float* x, int n, float f, i64 l, double d", "x[0] = n + f + l + d;")
    x = np.zeros(1, np.float32)
    run(1, 1, [x, 1, 2.0, np.int64(3), np.float64(4)])
    assert x == 10
    wrong: list[list[Argument]] = [[x, 1, 2, np.int64(3), np.float64(4)], [x, 1, 2.0, 3, 4.0], [x], [1, x, 2.0, 3, 4.0]]
    for args in wrong:
        with pytest.raises(TypeError, match="has parameters p4f8d, given"):
            run(1, 1, args)


def test_one_array_given_twice_is_in_one_place() -> None:
    x = normal(32)
    expected = x + 1
    kernel("const float* x, float* y", "y[threadIdx.x] = x[threadIdx.x] + 1;")(1, 32, [x, x])
    np.testing.assert_array_equal(x, expected)
