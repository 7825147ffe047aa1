"""rope_append of the CPU target, against NumPy: rotation, and what lands in which slot of the pages."""

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import relax, tirx
from tvm.runtime import tensor

from mlcgen.targets.cpu_kernels import Isa, rope_append

from .cpu_build import assert_close, build, compiles_for_aarch64, every_float_isa, normal, unset
from .emulate import without_emulator
from .reference import from_storage, rotate, to_storage

TOLERANCE = {"float32": 5e-7, "float16": 4e-4, "bfloat16": 4e-3}


def rotated(qkv: np.ndarray, cos: np.ndarray, sin: np.ndarray, h: int, kv: int) -> tuple[np.ndarray, ...]:
    heads = qkv.reshape(len(qkv), h + 2 * kv, -1)
    return rotate(heads[:, :h], cos, sin), rotate(heads[:, h : h + kv], cos, sin), heads[:, h + kv :]


def check(kernel: Callable[..., None], h: int, kv: int, d: int, page_size: int, kv_dtype: str) -> None:
    rng = np.random.default_rng(d)
    for rows in (1, 9):
        qkv, q_out = normal(rng, rows, (h + 2 * kv) * d), unset(rows, h, d)
        cos, sin = normal(rng, rows, d // 2), normal(rng, rows, d // 2)
        pages = to_storage(normal(rng, 20, 2, kv, page_size, d), kv_dtype)
        slots = rng.permutation(20 * page_size)[:rows].astype(np.int32)
        slots[1:2] = -1  # a token that is not cached
        expected = from_storage(pages.copy(), kv_dtype)
        kernel(qkv, cos, sin, slots, pages, q_out)
        q, k, v = rotated(qkv, cos, sin, h, kv)
        for token, slot in enumerate(slots):
            if slot >= 0:
                expected[slot // page_size, :, :, slot % page_size] = k[token], v[token]
        assert_close(q_out, q, 5e-7)
        assert_close(from_storage(pages, kv_dtype), expected, TOLERANCE[kv_dtype])


@every_float_isa
@pytest.mark.parametrize("kv_dtype", TOLERANCE)
@pytest.mark.parametrize(("h", "kv", "d", "page_size"), [(6, 2, 64, 16), (3, 3, 80, 5), (1, 1, 256, 1)])
def test_rope_append(mcpu: str, kv_dtype: str, h: int, kv: int, d: int, page_size: int) -> None:
    sizes = (h, kv, d, page_size, kv_dtype)
    check(build(mcpu, lambda isa: rope_append(*sizes, isa)), *sizes)


@every_float_isa
def test_float16_rounds_to_nearest_even(mcpu: str) -> None:
    values = np.float32(
        [0, 1, -1, 65504, -65504, 2**-14, 2**-15, 3e-8, -3e-8, 2**-24, 1e-9, 1 + 2**-11, 1 + 3 * 2**-11]
    )
    values = np.concatenate([values, np.float32([2049, 2051])])
    qkv = np.zeros((1, 3 * 16), np.float32)
    qkv[0, 32 : 32 + len(values)] = values
    pages, q_out = np.zeros((1, 2, 1, 1, 16), np.float16), unset(1, 1, 16)
    cos, sin = np.ones((1, 8), np.float32), np.zeros((1, 8), np.float32)
    build(mcpu, lambda isa: rope_append(1, 1, 16, 1, "float16", isa))(
        qkv, cos, sin, np.zeros(1, np.int32), pages, q_out
    )
    np.testing.assert_array_equal(pages[0, 1, 0, 0, : len(values)], values.astype(np.float16))


def test_relax_updates_the_pages_in_place() -> None:
    h, kv, d, page_size = 2, 1, 32, 4
    target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64"})
    n, num_pages = tirx.Var("n", "int64"), tirx.Var("num_pages", "int64")
    types = {
        "qkv": relax.TensorType((n, (h + 2 * kv) * d), "float32"),
        "cos": relax.TensorType((n, d // 2), "float32"),
        "sin": relax.TensorType((n, d // 2), "float32"),
        "slots": relax.TensorType((n,), "int32"),
        "pages": relax.TensorType((num_pages, 2, kv, page_size, d), "float16"),
    }
    args = [relax.Var(name, ty) for name, ty in types.items()]
    bb = relax.BlockBuilder()
    with bb.function("main", args):
        with bb.dataflow():
            append = bb.add_func(rope_append(h, kv, d, page_size, "float16", Isa.from_target(target)), "rope_append")
            out_types = [relax.TensorType((n, h, d), "float32"), types["pages"]]
            both = bb.emit_output(relax.call_tir_inplace(append, args, [-1, 4], out_types))
        bb.emit_func_output(both)
    vm = relax.VirtualMachine(tvm.compile(bb.get(), target=target), tvm.cpu())

    rng = np.random.default_rng(0)
    qkv, cos, sin = normal(rng, 3, (h + 2 * kv) * d), normal(rng, 3, d // 2), normal(rng, 3, d // 2)
    pages = tensor(np.zeros((2, 2, kv, page_size, d), np.float16))
    q, _ = vm["main"](*(tensor(a) for a in (qkv, cos, sin, np.int32([5, 6, 7]))), pages)
    expected_q, k, v = rotated(qkv, cos, sin, h, kv)
    assert_close(q.numpy(), expected_q, 5e-7)
    assert_close(pages.numpy()[1, 0, 0, 1:].astype(np.float32), k[:, 0], 1e-3)
    assert_close(pages.numpy()[1, 1, 0, 1:].astype(np.float32), v[:, 0], 1e-3)
    np.testing.assert_array_equal(pages.numpy()[0], 0)


@without_emulator
def test_aarch64() -> None:
    compiles_for_aarch64([lambda isa, dtype=dtype: rope_append(3, 1, 80, 5, dtype, isa) for dtype in TOLERANCE])
