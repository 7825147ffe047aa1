"""Attention of WebGPU's devices against NumPy: ragged batches, permuted block tables, windows, sequences in pieces."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from mlcgen.errors import UnsupportedError
from mlcgen.runtime.sizes import evaluate
from mlcgen.targets.base import Attention
from mlcgen.targets.device_kernel import DeviceKernel
from mlcgen.targets.webgpu_kernels import HEAD_DIMS, paged_attention

from .reference import attend_to, from_storage, to_storage
from .trees import NewTokens
from .webgpu_build import run


@dataclass(frozen=True)
class Layer:
    kv_dtype: str
    kv: int
    group: int
    head_dim: int
    page: int
    window: int = 0
    spread: float = 2  # of queries: the larger, the more the largest logit changes from tile to tile

    @functools.cached_property
    def kernel(self) -> DeviceKernel:
        scale = 1 / math.sqrt(self.head_dim)
        heads = self.kv * self.group
        return paged_attention(Attention(heads, self.kv, self.head_dim, self.page, self.kv_dtype, scale, self.window))


LAYERS = [
    Layer("float16", 2, 1, 64, 16, spread=16),
    Layer("bfloat16", 2, 4, 96, 64),
    Layer("float16", 1, 7, 128, 16, window=20),
    Layer("float32", 1, 3, 256, 1),
]
DECODED = [
    Layer("float16", 2, 3, 128, 1, spread=16),
    Layer("float32", 1, 40, 96, 64, window=200),
]


def each_layer(layers: list[Layer]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("layer", layers, ids=lambda layer: f"{layer.kv_dtype}-{layer.head_dim}")


# Sequences as (cached positions, new tokens).
BATCHES = {
    "first token": [(0, 1)],
    "whole prompts": [(0, 15), (0, 16), (0, 17), (0, 70)],
    "cached prefixes": [(63, 7), (16, 16), (1, 33), (300, 40)],
    "ragged": [(0, 0), (69, 1), (0, 40), (14, 1), (0, 0), (100, 3), (0, 0)],
    # And tokens of a tree.
    "trees": [(0, 0, 32), (0, 0, 1), (0, 3, 5), (0, 0)],
    "trees beside others": [(130, 1, 9), (17, 1), (63, 0, 20), (64, 3, 29), (40, 40), (5, 0, 1), (100, 20, 12)],
}
CONTEXTS = {
    "first token": [1],
    "few": [1, 0, 15, 16, 17, 70, 128],
    "in pieces": [300, 1, 129, 0, 256],
    "long and short": [700, 17, 600],
}


@dataclass
class Batch:
    """What attention reads, and what it should give for each new token."""

    q: np.ndarray
    pages: np.ndarray
    block_table: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    tree_masks: np.ndarray
    positions: np.ndarray  # of tokens in trees; nobody reads the others'
    expected: np.ndarray

    @classmethod
    def random(cls, layer: Layer, sequences: Sequence[tuple[int, ...]]) -> "Batch":
        """Slots of pages that no token fills hold NaN, and entries of the table that no page fills are out of range."""
        rng = np.random.default_rng(len(sequences))
        tokens = [NewTokens.random(rng, *counts) for counts in sequences]
        lengths = np.array([new.base + len(new) for new in tokens], np.int32)
        counts = [-(-int(length) // layer.page) for length in lengths]
        shape = (sum(counts) + 1, 2, layer.kv, layer.page, layer.head_dim)
        values = np.full(shape, np.nan, np.float32)
        table = np.full((len(sequences), max(counts) + 1), 2**30, np.int32)
        free = list(rng.permutation(len(values)))
        for s, length in enumerate(lengths):
            for i in range(counts[s]):
                table[s, i] = page = free.pop()
                filled = min(layer.page, int(length) - i * layer.page)
                values[page, :, :, :filled] = rng.standard_normal((2, layer.kv, filled, layer.head_dim))
        pages = to_storage(values, layer.kv_dtype)
        total = sum(map(len, tokens))
        q = layer.spread * rng.standard_normal((total, layer.kv * layer.group, layer.head_dim)).astype(np.float32)
        expected: list[np.ndarray] = []
        for s, new in enumerate(tokens):
            held = from_storage(pages[table[s, : counts[s]]], layer.kv_dtype).transpose(1, 0, 3, 2, 4)
            keys, values_ = held.reshape(2, -1, layer.kv, layer.head_dim)
            scale = 1 / math.sqrt(layer.head_dim)
            for i in range(len(new)):
                expected.append(attend_to(q[len(expected)], keys, values_, new.seen(i, layer.window), scale))
        masks, positions = (np.concatenate([getattr(new, name) for new in tokens]) for name in ("masks", "positions"))
        positions = np.where(masks == 0, 2**30, positions).astype(np.int32)
        starts = np.cumsum([0, *map(len, tokens)], dtype=np.int32)
        return cls(q, pages, table, lengths, starts, masks, positions, np.array(expected))


def symbols(batch: Batch, num_tokens: int, is_decode: int, has_trees: int = 0) -> dict[str, int]:
    longest = 1 << max(int(batch.lengths.max()) - 1, 0).bit_length()
    sizes = {"n": num_tokens, "seqs": len(batch.lengths), "blocks": batch.block_table.shape[1]}
    of_step = {"is_decode": is_decode, "has_trees": has_trees, "longest": longest}
    return sizes | {"num_pages": len(batch.pages)} | of_step


@each_layer(LAYERS)
@pytest.mark.parametrize("sequences", BATCHES.values(), ids=BATCHES)
def test_any_step(layer: Layer, sequences: list[tuple[int, ...]]) -> None:
    batch = Batch.random(layer, sequences)
    out = np.full(batch.q.shape, np.nan, np.float32)
    step = (batch.starts, batch.tree_masks, batch.positions)
    arrays = (batch.q, batch.pages, batch.block_table, batch.lengths, *step, out)
    for has_trees in range(int(batch.tree_masks.any()), 2):  # what is made for trees does for others, too
        out[:] = np.nan
        run(layer.kernel, arrays, symbols(batch, len(out), 0, has_trees))
        np.testing.assert_allclose(out, batch.expected, rtol=2e-5, atol=2e-5)


@each_layer(DECODED)
@pytest.mark.parametrize("contexts", CONTEXTS.values(), ids=CONTEXTS)
def test_decode(layer: Layer, contexts: list[int]) -> None:
    """Sequences without tokens have a row, which stays as it is."""
    batch = Batch.random(layer, [(tokens - 1, 1) if tokens else (0, 0) for tokens in contexts])
    used = batch.lengths > 0
    q = np.full((len(contexts), *batch.q.shape[1:]), np.nan, np.float32)
    q[used] = batch.q
    out = np.full(q.shape, 7, np.float32)
    starts = masks = positions = np.full(len(contexts) + 1, 2**30, np.int32)  # nobody reads them
    arrays = (q, batch.pages, batch.block_table, batch.lengths, starts, masks, positions, out)
    names = run(layer.kernel, arrays, symbols(batch, len(q), 1))
    seen = min(max(contexts), layer.window or max(contexts))
    assert [name.split("_")[1] for name in names] == (["split", "combine"] if seen > 128 else ["decode"])
    np.testing.assert_allclose(out[used], batch.expected, rtol=2e-5, atol=2e-5)
    assert (out[~used] == 7).all()


def test_scratch_memory_is_enough_for_fewer_sequences() -> None:
    """What is set aside is what the most sequences need; fewer are cut into more pieces."""
    layer = DECODED[0]
    code = layer.kernel.generate([p.dtype for p in layer.kernel.params])
    split = next(launch for launch, _ in (v.launches for v in code.variants if len(v.launches) == 2))
    for most in (1, 3, 64, 600):
        for seqs in range(1, most + 1):
            for longest in (256, 700, 8192, 1 << 20):
                _, splits, _ = (evaluate(s, {"seqs": seqs, "longest": longest}) for s in split.grid)
                needed = seqs * splits * layer.kv * layer.group * (layer.head_dim + 4) * 4
                assert 1 < splits <= 65535
                assert needed <= evaluate(code.scratch, {"seqs": most}), (most, seqs, longest)


def test_dimensions_that_there_is_no_kernel_for() -> None:
    with pytest.raises(UnsupportedError, match=f"80 values .* {HEAD_DIMS[0]}"):
        paged_attention(Attention(2, 2, 80, 16, "float16", 1.0, 0))
