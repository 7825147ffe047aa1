"""Attention of the cuda target, emulated, against NumPy: ragged batches, permuted block tables, windows, soft-caps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest

from .emulate_cuda import EmulatedKernel, Order, compile_kernel, needs_compiler

pytestmark = needs_compiler

NUMBERS = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
# Weights are rounded to the cache's type before they are multiplied, and so are outputs.
TOLERANCE = {"f16": 2e-3, "bf16": 1.6e-2}
CAP = 3.0
DECODE = (4, 3)  # warps, stages
PREFILLS = [(4, 1, 32), (2, 2, 64)]  # warps, blocks of rows of each, keys of a tile


@dataclass(frozen=True)
class Layer:
    number: str
    kv: int
    group: int
    head_dim: int
    page: int
    window: int = 0
    capped: bool = False
    activation: str = "f16"
    spread: float = 2  # of queries: the larger, the more the largest logit changes from tile to tile

    @property
    def type(self) -> str:
        constants = (self.kv, self.group, self.head_dim, self.page, self.window, str(self.capped).lower())
        return f"AttentionLayer<{self.number}, {self.activation}, {', '.join(map(str, constants))}>"

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.head_dim)


LAYERS = [
    Layer("f16", 2, 1, 64, 16, spread=16),
    Layer("bf16", 1, 3, 64, 1, activation="bf16"),
    Layer("f16", 2, 4, 96, 64, capped=True),
    Layer("bf16", 2, 3, 128, 16, window=20),
    Layer("f16", 1, 4, 128, 64, window=33, capped=True, activation="bf16"),
    Layer("bf16", 1, 1, 96, 1, window=1, activation="bf16"),
]
each_layer = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.type)
CONTEXTS = {
    "few": [1, 0, 15, 16, 17, 70],
    "long and short": [1000, 1, 0],
    "more than lanes": [200 if i // 32 == 1 else i % 3 for i in range(70)],
}
# Sequences as (cached positions, new tokens).
BATCHES = {
    "first token": [(0, 1)],
    "whole prompts": [(0, 15), (0, 16), (0, 17), (0, 70)],
    "cached prefixes": [(63, 7), (16, 16), (1, 33), (130, 40)],
    "ragged": [(0, 0), (69, 1), (0, 40), (14, 1), (0, 0), (100, 3), (0, 0)],
}


def kernel_of(function: str, layer: Layer, shape: Sequence[int], lengths: str) -> EmulatedKernel:
    """attention_decode or attention_prefill for a layer; `lengths`: the parameters that tell of sequences."""
    names = ", ".join(word for part in lengths.split(",") for word in part.split(" ")[-1:])
    source = f"""#include "{function}.cuh"
    extern "C" __global__ void kernel({layer.activation}* out, const {layer.activation}* q, const {layer.number}* pages,
                                      const i32* block_table, const i32* seq_lens, {lengths}, int table_stride,
                                      float scale, float cap) {{
      {function}<{layer.type}, {", ".join(map(str, shape))}>(out, q, pages, block_table, seq_lens, {names},
          table_stride, scale, cap);
    }}"""
    return compile_kernel(source, "kernel")


@dataclass
class Batch:
    """What attention reads, and what it should give for each new token."""

    q: np.ndarray
    pages: np.ndarray
    block_table: np.ndarray
    lengths: np.ndarray
    expected: np.ndarray

    @classmethod
    def random(cls, layer: Layer, sequences: Sequence[tuple[int, int]]) -> "Batch":
        """Slots of pages that no token fills hold NaN, and entries of the table that no page fills are out of range."""
        rng = np.random.default_rng(0)
        counts = [-(-(cached + new) // layer.page) for cached, new in sequences]
        shape = (sum(counts) + 1, 2, layer.kv, layer.page, layer.head_dim)
        pages = np.full(shape, np.nan, NUMBERS[layer.number])
        table = np.full((len(sequences), max(counts) + 1), 2**30, np.int32)
        free = list(rng.permutation(len(pages)))
        heads = layer.kv * layer.group
        q = layer.spread * rng.standard_normal((sum(new for _, new in sequences), heads, layer.head_dim))
        q = q.astype(NUMBERS[layer.activation])
        expected: list[np.ndarray] = []
        for s, (cached, new) in enumerate(sequences):
            for i in range(counts[s]):
                table[s, i] = page = free.pop()
                filled = min(layer.page, cached + new - i * layer.page)
                pages[page, :, :, :filled] = rng.standard_normal((2, layer.kv, filled, layer.head_dim))
            tokens = pages[table[s, : counts[s]]].transpose(1, 0, 3, 2, 4).reshape(2, -1, layer.kv, layer.head_dim)
            for position in range(cached, cached + new):
                expected.append(attend(layer, q[len(expected)], tokens[0], tokens[1], position))
        lengths = np.array([cached + new for cached, new in sequences], np.int32)
        return cls(q, pages, table, lengths, np.array(expected))


def attend(layer: Layer, q: np.ndarray, keys: np.ndarray, values: np.ndarray, position: int) -> np.ndarray:
    """One token: q (H, D), keys and values (positions, KV, D) -> (H, D)."""
    first = max(0, position - layer.window + 1) if layer.window else 0
    k, v = (np.repeat(a[first : position + 1].astype(np.float64), layer.group, axis=1) for a in (keys, values))
    logits = np.einsum("hd,phd->hp", q.astype(np.float64), k) * layer.scale
    if layer.capped:
        logits = CAP * np.tanh(logits / CAP)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(np.einsum("hp,phd->hd", p / p.sum(-1, keepdims=True), v))


def assert_close(layer: Layer, out: np.ndarray, expected: np.ndarray) -> None:
    tolerance = max(TOLERANCE[layer.number], TOLERANCE[layer.activation])
    np.testing.assert_allclose(out.astype(np.float64), expected, rtol=tolerance, atol=tolerance)


@each_layer
def test_decode(layer: Layer) -> None:
    """Pieces: how many the keys of one head are cut into, at least; then several blocks share a sequence."""
    warps, stages = DECODE
    kernel = kernel_of("attention_decode", layer, DECODE, "float* partials, u32* arrivals, int sequences")

    def run(batch: Batch, q: np.ndarray, pieces: int, order: Order) -> np.ndarray:
        count = len(batch.lengths)
        out, arrivals = np.full_like(q, 7), np.zeros(count * layer.kv, np.uint32)
        partials = np.full((count + pieces) * q[0, :, 0].size * (layer.head_dim + 1), np.nan, np.float32)
        sequences = (batch.block_table, batch.lengths, partials, arrivals, count, batch.block_table.shape[1])
        shared = warps * stages * 2 * 16 * layer.head_dim * 2
        args = (out, q, batch.pages, *sequences, layer.scale, CAP)
        kernel((layer.kv, count + pieces), warps * 32, args, shared, order)
        assert not arrivals.any()  # ready for the next launch
        return out

    for contexts in CONTEXTS.values():
        batch = Batch.random(layer, [(tokens - 1, 1) if tokens else (0, 0) for tokens in contexts])
        used = batch.lengths > 0
        q = np.ones((len(contexts), *batch.q.shape[1:]), batch.q.dtype)
        q[used] = batch.q
        for pieces in (1, 3, 40):
            out = run(batch, q, pieces, "ascending")
            assert_close(layer, out[used], batch.expected)
            assert (out[~used] == 7).all()
            np.testing.assert_array_equal(run(batch, q, pieces, "descending"), out)


@each_layer
@pytest.mark.parametrize("shape", PREFILLS)
def test_prefill(layer: Layer, shape: tuple[int, int, int]) -> None:
    kernel = kernel_of("attention_prefill", layer, shape, "const i32* query_start, int sequences")
    warps, blocks, keys = shape
    rows = warps * blocks * 16

    def run(batch: Batch, starts: np.ndarray, order: Order) -> np.ndarray:
        out = np.full((len(batch.q) + 2, *batch.q.shape[1:]), 7, batch.q.dtype)
        tiles = len(batch.q) * layer.group // rows + len(batch.lengths)
        page_numbers = 2 * max(1, keys // layer.page) * 4
        shared = (rows + 4 * keys) * layer.head_dim * 2 + page_numbers
        sequences = (batch.block_table, batch.lengths, starts, len(batch.lengths), batch.block_table.shape[1])
        args = (out, batch.q, batch.pages, *sequences, layer.scale, CAP)
        kernel((layer.kv, tiles), warps * 32, args, shared, order)
        return out

    for sequences in BATCHES.values():
        batch = Batch.random(layer, sequences)
        starts = np.cumsum([0, *(new for _, new in sequences)], dtype=np.int32)
        out = run(batch, starts, "ascending")
        assert_close(layer, out[:-2], batch.expected)
        assert (out[-2:] == 7).all()
        np.testing.assert_array_equal(run(batch, starts, "descending"), out)
