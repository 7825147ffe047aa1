"""Lookups of WebGPU's devices against NumPy: embedding, rotation with the append to the pages, choice of tokens."""

import numpy as np
import pytest

from mlcgen.formats import BF16, F16, F32, Q4, Q8, WeightFormat, grouped
from mlcgen.runtime.argmax_sampler import PARTS
from mlcgen.targets.webgpu_kernels import argmax, code, embedding, rope_append, take_tokens

from .reference import from_storage, random_weight, rotate, to_storage
from .webgpu_build import run

FORMATS = [F32, F16, BF16, Q8, Q4, grouped(4, 16, True), grouped(8, 64), grouped(8, 32, True)]
ROUNDING = {"float32": 0.0, "float16": 2.0**-10, "bfloat16": 2.0**-8}  # float16: a driver may round either way


def assert_rounded(actual: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    np.testing.assert_allclose(actual, expected, rtol=ROUNDING[dtype] * 1.02, atol=2e-6)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_embedding(fmt: WeightFormat) -> None:
    """1216 columns are more than a workgroup takes, and no multiple of them; 37 rows fill no tile."""
    stored, matrix = random_weight(fmt, 37, 1216, np.random.default_rng(1))
    ids = np.array([0, 36, 16, 15, 36, 7], np.int32)
    out = np.full((len(ids), 1216), np.nan, np.float32)
    run(embedding(fmt, 37, 1216), [ids, *stored, out], {"n": len(ids)})
    np.testing.assert_allclose(out, matrix[ids], rtol=1e-6, atol=1e-6)


def test_embedding_of_more_rows_than_a_buffer_may_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    stored, matrix = random_weight(Q8, 300, 96, np.random.default_rng(1))
    monkeypatch.setattr(code, "MOST_BYTES", 130 * 96)
    ids = np.array([0, 299, 127, 128, 255, 256, 128], np.int32)
    out = np.full((len(ids), 96), np.nan, np.float32)
    assert len(run(embedding(Q8, 300, 96), [ids, *stored, out], {"n": len(ids)})) == 3
    np.testing.assert_allclose(out, matrix[ids], rtol=1e-6, atol=1e-6)


def test_scales_below_the_normal_float16s() -> None:
    """4-bit codes of a small weight have such scales; drivers that round them to 0 lose the weight."""
    stored, _ = random_weight(Q8, 16, 32, np.random.default_rng(2))
    stored[1][:] = 3e-5
    ids, out = np.arange(16, dtype=np.int32), np.full((16, 32), np.nan, np.float32)
    run(embedding(Q8, 16, 32), [ids, *stored, out], {"n": 16})
    codes = stored[0][0].transpose(1, 0, 2).reshape(16, 32).astype(np.float32) - 128
    np.testing.assert_array_equal(out, codes * np.float32(np.float16(3e-5)))


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("kv_dtype", ["float32", "float16", "bfloat16"])
def test_rope_append(page_size: int, kv_dtype: str) -> None:
    """Tokens without a slot get their queries, and leave the pages alone; so does what has no token."""
    heads, kv_heads, dim, tokens = 3, 2, 96, 5
    rng = np.random.default_rng(page_size)
    kernel = rope_append(heads, kv_heads, dim, page_size, kv_dtype)
    pages_shape = (64 // page_size, 2, kv_heads, page_size, dim)
    slots = np.array([17, -1, 0, 39, -5], np.int32)
    qkv = rng.standard_normal((tokens, heads + 2 * kv_heads, dim)).astype(np.float32)
    angles = rng.uniform(0, 7, (tokens, dim // 2)).astype(np.float32)
    before = to_storage(rng.standard_normal(pages_shape).astype(np.float32), kv_dtype)
    pages, q = before.copy(), np.full((tokens, heads, dim), np.nan, np.float32)
    run(kernel, [qkv, np.cos(angles), np.sin(angles), slots, pages, q], {"n": tokens, "num_pages": len(pages)})

    rotated = rotate(qkv.astype(np.float64), np.cos(angles), np.sin(angles))
    assert_rounded(q, rotated[:, :heads], "float32")
    expected = before.copy()
    for token, slot in enumerate(slots):
        if slot < 0:
            continue
        page, at = divmod(int(slot), page_size)
        held = from_storage(pages[page, :, :, at], kv_dtype)
        assert_rounded(held[0], rotated[token, heads : heads + kv_heads], kv_dtype)
        assert_rounded(held[1], qkv[token, heads + kv_heads :], kv_dtype)
        expected[page, :, :, at] = pages[page, :, :, at]
    np.testing.assert_array_equal(pages, expected)  # all other slots are as they were


def test_bfloat16_pages_are_rounded_to_even() -> None:
    """Values are stored as they are, so their rounding is NumPy's bit for bit: ties, carries and signs."""
    bits = np.random.default_rng(0).integers(0x30000000, 0x50000000, (4, 1, 64), dtype=np.uint32)
    bits[:2, :, ::2] = bits[:2, :, ::2] & 0xFFFF0000 | 0x8000
    bits[3] |= 0x80000000
    values = bits.view(np.float32)
    qkv = np.concatenate([np.zeros((4, 2, 64), np.float32), values], 1)
    slots, pages = np.arange(4, dtype=np.int32), np.zeros((1, 2, 1, 4, 64), np.uint16)
    angles, q = np.zeros((4, 32), np.float32), np.zeros((4, 1, 64), np.float32)
    run(rope_append(1, 1, 64, 4, "bfloat16"), [qkv, angles, angles, slots, pages, q], {"n": 4, "num_pages": 1})
    np.testing.assert_array_equal(pages[0, 1, 0], to_storage(values[:, 0], "bfloat16"))


@pytest.mark.parametrize("columns", [3, 256, 9000])
def test_argmax(columns: int) -> None:
    """Few different values, so that several are the largest; a row that is -inf but for its last, and zeros."""
    logits = np.random.default_rng(columns).integers(-9, 2, (5, columns)).astype(np.float32)
    logits[2] = -np.inf
    logits[2, -1] = -1e30
    logits[3] = 0.0
    logits[3, 0] = -0.0
    ids, values = chosen(logits)
    np.testing.assert_array_equal(ids, logits.argmax(-1))
    np.testing.assert_array_equal(values, logits.max(-1))


def test_argmax_notices_what_is_not_finite() -> None:
    logits = np.zeros((4, 1000), np.float32)
    logits[0, 7] = np.nan
    logits[1].view(np.uint32)[999] = 0xFFC00000  # a NaN with a sign
    logits[1, 3] = np.inf
    logits[2, 5] = np.inf
    logits[3] = -np.inf
    ids, values = chosen(logits)
    np.testing.assert_array_equal(values, [np.nan, np.nan, np.inf, -np.inf])
    np.testing.assert_array_equal(ids[:3], [7, 999, 5])


def chosen(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows, vocab = logits.shape
    parts, results = np.full((rows, PARTS, 2), 0xFFFFFFFF, np.uint32), np.full((2, rows), 0xFFFFFFFF, np.uint32)
    run(argmax(), [logits, parts, results], {"rows": rows, "vocab": vocab})
    return results[0].view(np.int32), results[1].view(np.float32)


@pytest.mark.parametrize("n", [1, 300])
def test_take_tokens(n: int) -> None:
    rng = np.random.default_rng(n)
    ids, rows, tokens = (rng.integers(*span).astype(np.int32) for span in ((0, 99, n), (-1, 9, n), (0, 99, 9)))
    found = ids.copy()
    run(take_tokens(), [found, rows, tokens], {"n": n, "rows": len(tokens)})
    np.testing.assert_array_equal(found, np.where(rows < 0, ids, tokens[rows]))
