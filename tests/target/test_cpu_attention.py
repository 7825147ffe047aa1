"""paged_attention of the CPU target, against NumPy: ragged batches, permuted block tables, windows, splits, trees."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from tvm import tirx

from mlcgen.targets.cpu_kernels import Isa, paged_attention

from .cpu_build import HAS_BF16_UNITS, assert_close, build, compiles_for_aarch64, every_float_isa, normal, unset
from .emulate import without_emulator
from .reference import attend_to, from_storage, to_storage
from .trees import NewTokens


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    kv_dtype: str = "float32"
    window: int = 0

    def kernel(self, isa: Isa) -> tirx.PrimFunc:
        scale = 1 / math.sqrt(self.head_dim)
        args = (self.heads, self.kv_heads, self.head_dim, self.page_size, self.kv_dtype, scale, self.window)
        return paged_attention(*args, isa)


SHAPES = [
    Shape(9, 3, 64, 16),
    Shape(4, 4, 96, 5, "float16"),
    Shape(7, 1, 128, 1, "bfloat16"),
    Shape(8, 2, 64, 256, "float16", window=33),
    Shape(10, 2, 256, 32, window=7),
    Shape(12, 1, 80, 48),
    Shape(9, 3, 64, 16, "float16"),
]
# Sequences as (cached positions, new tokens).
BATCHES = {
    "first token": [(0, 1)],
    "one page": [(3, 1), (0, 2)],
    "vector boundary": [(14, 1), (15, 1), (16, 1)],
    "long context, split": [(700, 1)],
    "prefill": [(0, 100)],
    "mixed": [(300, 40), (17, 1), (0, 3), (1000, 1), (63, 64)],
    "many decodes": [(3 * i, 1) for i in range(40)],
}
# As (cached positions, new tokens of no tree, tokens of a tree).
TREES = {
    "no cache": [(0, 0, 32), (0, 0, 2), (0, 0, 1), (0, 3, 5)],
    "across splits": [(60, 0, 32)],
    "a few, split": [(700, 0, 2)],
    "mixed": [(300, 1, 9), (17, 1), (63, 0, 20), (64, 3, 29), (40, 90), (5, 0, 1), (1000, 0, 2), (130, 20, 12)],
}


def run(
    kernel: Callable[..., None], shape: Shape, batch: Sequence[tuple[int, ...]], seed: int, tolerance: float = 3e-6
) -> None:
    """Pages that no position fills hold NaN, and block table entries that no page fills are out of range."""
    rng = np.random.default_rng(seed)
    kv, size = shape.kv_heads, shape.page_size
    sequences = [NewTokens.random(rng, *counts) for counts in batch]
    lengths = np.int32([new.base + len(new) for new in sequences])
    counts = [-(-int(length) // size) for length in lengths]
    pages = to_storage(np.full((sum(counts) + 1, 2, kv, size, shape.head_dim), np.nan, np.float32), shape.kv_dtype)
    block_table = np.full((len(batch), max(counts)), 2**30, np.int32)
    free = list(rng.permutation(len(pages)))
    q = normal(rng, sum(map(len, sequences)), shape.heads, shape.head_dim) * 2
    expected: list[np.ndarray] = []
    for sequence, (new, length) in enumerate(zip(sequences, lengths, strict=True)):
        keys, values = (to_storage(normal(rng, length, kv, shape.head_dim), shape.kv_dtype) for _ in range(2))
        for i in range(counts[sequence]):
            block_table[sequence, i] = page = free.pop()
            here = slice(i * size, min((i + 1) * size, length))
            pages[page, :, :, : here.stop - here.start] = np.stack([keys[here], values[here]]).transpose(0, 2, 1, 3)
        keys, values = from_storage(keys, shape.kv_dtype), from_storage(values, shape.kv_dtype)
        for i in range(len(new)):
            seen = new.seen(i, shape.window)
            expected.append(attend_to(q[len(expected)], keys, values, seen, 1 / math.sqrt(shape.head_dim)))
    starts = np.cumsum([0, *map(len, sequences)], dtype=np.int32)
    masks, positions = (np.concatenate([getattr(new, name) for new in sequences]) for name in ("masks", "positions"))
    out = unset(*q.shape)
    kernel(q, pages, block_table, lengths, starts, masks, positions, out)
    assert_close(out, np.stack(expected), tolerance)


@functools.cache
def native(mcpu: str, shape: Shape) -> Callable[..., None]:
    return build(mcpu, shape.kernel)


@every_float_isa
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_paged_attention(mcpu: str, shape: Shape) -> None:
    kernel = native(mcpu, shape)
    rounds = mcpu in HAS_BF16_UNITS and shape.kv_dtype != "float32"  # units of bfloat16
    for seed, batch in enumerate(BATCHES.values()):
        run(kernel, shape, batch, seed, 1e-2 if rounds else 3e-6)


@every_float_isa
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_trees(mcpu: str, shape: Shape) -> None:
    kernel, seed = native(mcpu, shape), int(np.random.default_rng().integers(1 << 30))
    rounds = mcpu in HAS_BF16_UNITS and shape.kv_dtype != "float32"
    for batch in TREES.values():
        run(kernel, shape, batch, seed, 1e-2 if rounds else 3e-6)


def test_a_sequence_without_new_tokens_is_skipped() -> None:
    shape = SHAPES[0]
    run(native("x86-64", shape), shape, [(20, 1), (30, 0), (0, 2)], seed=1)


def test_two_query_heads_per_kv_head() -> None:
    """1, 3, 4, 5, 7 and 12 are among SHAPES."""
    shape = Shape(4, 2, 32, 8)
    run(native("x86-64", shape), shape, [(20, 1), (0, 30), (90, 2)], seed=2)


@without_emulator
def test_aarch64() -> None:
    compiles_for_aarch64([SHAPES[i].kernel for i in (0, 2, 3)])
