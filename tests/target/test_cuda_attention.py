"""Attention of the cuda target, emulated, against NumPy: ragged batches, permuted block tables, windows, soft-caps; in
decoding with the rotation and the append to the pages before it."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest

from mlcgen.targets.base import Attention
from mlcgen.targets.cuda_kernels import paged_attention, rope_append, rope_attention
from mlcgen.targets.device_kernel import DeviceKernel

from .cuda_build import run as run_kernel
from .emulate_cuda import EmulatedKernel, Order, compile_kernel, needs_compiler
from .reference import rotate
from .trees import NewTokens

pytestmark = needs_compiler

NUMBERS = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16), "float": np.dtype(np.float32)}
CAP = 3.0
DECODE = (4, 3)  # warps, stages
LARGE_DECODE = (4, 2)  # of heads of 256 values
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
    projected: str = "f16"  # the type of what queries, keys and values are made of
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
    Layer("bf16", 1, 3, 64, 1, activation="bf16", projected="bf16"),
    Layer("f16", 2, 4, 96, 64, capped=True),
    Layer("bf16", 2, 3, 128, 16, window=20),
    Layer("f16", 1, 4, 128, 64, window=33, capped=True, activation="bf16", projected="float"),
    Layer("bf16", 1, 1, 96, 1, window=1, activation="bf16"),
]
LARGE = Layer("f16", 1, 8, 256, 16, projected="float")
CONTEXTS = {
    "few": [1, 0, 15, 16, 17, 70],
    "long and short": [4096, 1, 0],
    "more than lanes": [200 if i // 32 == 1 else i % 3 for i in range(70)],
}
# Sequences as (cached positions, new tokens).
BATCHES = {
    "first token": [(0, 1)],
    "whole prompts": [(0, 15), (0, 16), (0, 17), (0, 70)],
    "cached prefixes": [(63, 7), (16, 16), (1, 33), (130, 40)],
    "ragged": [(0, 0), (69, 1), (0, 40), (14, 1), (0, 0), (100, 3), (0, 0)],
}
# As (cached positions, new tokens of no tree, tokens of a tree).
TREES = {
    "no cache": [(0, 0, 32), (0, 0, 2), (0, 0, 1), (0, 3, 5)],
    "beside others": [(130, 1, 9), (17, 1), (63, 0, 20), (64, 3, 29), (40, 40), (5, 0, 1), (100, 20, 12), (0, 0)],
}


def kernel_of(
    function: str, layer: Layer, shape: Sequence[int | str], inputs: str, lengths: str, trees: str = ""
) -> EmulatedKernel:
    """attention_decode or attention_prefill for a layer; `inputs`: the parameters before the block table, `lengths`:
    those that tell of sequences, after it, `trees`: the last ones."""
    inputs_, lengths_, trees_ = (
        ", ".join(part.split(" ")[-1] for part in params.split(",")) for params in (inputs, lengths, trees)
    )
    source = f"""#include "{function}.cuh"
    extern "C" __global__ void kernel({layer.activation}* out, {inputs}, const i32* block_table, const i32* seq_lens,
                                      {lengths}, int table_stride, float scale, float cap{trees}) {{
      {function}<{layer.type}, {", ".join(map(str, shape))}>(out, {inputs_}, block_table, seq_lens, {lengths_},
          table_stride, scale, cap{", " * bool(trees)}{trees_.removeprefix(", ")});
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
    error: np.ndarray  # how far from that a result may be

    tree_masks: np.ndarray
    positions: np.ndarray  # of tokens in trees; no kernel reads the others'

    @classmethod
    def random(
        cls,
        layer: Layer,
        sequences: Sequence[tuple[int, ...]],
        made: tuple[np.ndarray, np.ndarray] | None = None,
        seed: int = 0,
    ) -> "Batch":
        """Slots of pages that no token fills hold NaN, and entries of the table that no page fills are out of range.

        made: queries (n, H, D), and keys and values (n, 2, KV, D), of the new tokens, where they are not random.
        """
        rng = np.random.default_rng(seed)
        tokens = [NewTokens.random(rng, *counts) for counts in sequences]
        lengths = np.array([new.base + len(new) for new in tokens], np.int32)
        counts = [-(-int(length) // layer.page) for length in lengths]
        shape = (sum(counts) + 1, 2, layer.kv, layer.page, layer.head_dim)
        pages = np.full(shape, np.nan, NUMBERS[layer.number])
        table = np.full((len(sequences), max(counts) + 1), 2**30, np.int32)
        free = list(rng.permutation(len(pages)))
        heads = layer.kv * layer.group
        q = layer.spread * rng.standard_normal((sum(map(len, tokens)), heads, layer.head_dim))
        q = (q if made is None else made[0]).astype(NUMBERS[layer.activation])
        expected: list[np.ndarray] = []
        errors: list[np.ndarray] = []
        for s, new in enumerate(tokens):
            for i in range(counts[s]):
                table[s, i] = page = free.pop()
                filled = min(layer.page, int(lengths[s]) - i * layer.page)
                pages[page, :, :, :filled] = rng.standard_normal((2, layer.kv, filled, layer.head_dim))
            for i in range(len(new) if made is not None else 0):
                page, row = table[s, (new.base + i) // layer.page], (new.base + i) % layer.page
                pages[page, :, :, row] = made[1][len(expected) + i]
            held = pages[table[s, : counts[s]]].transpose(1, 0, 3, 2, 4).reshape(2, -1, layer.kv, layer.head_dim)
            for i in range(len(new)):
                out, error = attend(layer, q[len(expected)], *held[:, new.seen(i, layer.window)])
                expected.append(out)
                errors.append(error)
        masks, positions = (np.concatenate([getattr(new, name) for new in tokens]) for name in ("masks", "positions"))
        positions = np.where(masks == 0, 2**30, positions).astype(np.int32)
        return cls(q, pages, table, lengths, np.array(expected), np.array(errors), masks, positions)

    def assert_close(self, out: np.ndarray) -> None:
        worst = (np.abs(out.astype(np.float64) - self.expected) / self.error).max(initial=0)
        assert worst <= 1, f"an error of {worst:.2f} times what rounding makes"


def attend(layer: Layer, q: np.ndarray, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One token: q (H, D), keys and values that it sees (keys, KV, D) -> (H, D), and how far a result may be from it.

    Queries and weights are rounded to the cache's type before they are multiplied, outputs to that of activations.
    """
    k, v = (np.repeat(a.astype(np.float64), layer.group, axis=1) for a in (keys, values))
    logits = np.einsum("hd,phd->hp", q.astype(NUMBERS[layer.number]).astype(np.float64), k) * layer.scale
    if layer.capped:
        logits = CAP * np.tanh(logits / CAP)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out, largest = (np.asarray(np.einsum("hp,phd->hd", p, of)) for of in (v, np.abs(v)))
    # An eps is twice what rounding to nearest makes: the other half is for exponentials and sums in float32.
    return out, eps(layer.number) * largest + eps(layer.activation) * np.abs(out) + 1e-6


def eps(number: str) -> float:
    return float(ml_dtypes.finfo(NUMBERS[number]).eps)


@dataclass
class DecodeStep:
    """A step in which every sequence of a batch decodes: what its new tokens are made of, a row for each sequence.

    Rows of sequences without tokens are NaN.
    """

    batch: Batch
    qkv: np.ndarray
    angles: tuple[np.ndarray, np.ndarray]  # cosines and sines
    slots: np.ndarray
    pages: np.ndarray  # before the step: NaN where the new tokens' keys and values go

    @classmethod
    def random(cls, layer: Layer, contexts: Sequence[int]) -> "DecodeStep":
        rng = np.random.default_rng(len(contexts))
        heads, used = layer.kv * layer.group, np.array(contexts) > 0
        qkv = np.full((len(contexts), heads + 2 * layer.kv, layer.head_dim), np.nan)
        qkv[used] = rng.standard_normal((used.sum(), *qkv.shape[1:]))
        qkv[:, :heads] *= layer.spread
        qkv = qkv.astype(NUMBERS[layer.projected])
        turn = rng.uniform(0, 7, (len(contexts), layer.head_dim // 2))
        angles = np.cos(turn).astype(np.float32), np.sin(turn).astype(np.float32)
        turned = rotate(qkv.astype(np.float64), *angles)[used]
        keys_values = np.stack([turned[:, heads : heads + layer.kv], qkv[used, heads + layer.kv :]], 1)
        sequences = [(tokens - 1, 1) if tokens else (0, 0) for tokens in contexts]
        batch = Batch.random(layer, sequences, (turned[:, :heads], keys_values))
        slots, pages = np.full(len(contexts), -1, np.int32), batch.pages.copy()
        for s in np.flatnonzero(used):
            page, row = batch.block_table[s, (contexts[s] - 1) // layer.page], (contexts[s] - 1) % layer.page
            pages[page, :, :, row] = np.nan
            slots[s] = page * layer.page + row
        return cls(batch, qkv, angles, slots, pages)

    def assert_appended(self, layer: Layer, pages: np.ndarray) -> None:
        """Keys and values are in the slots of the new tokens, and nothing else has changed."""
        expected, rounding = self.pages.copy(), eps(layer.number)
        for slot in self.slots[self.slots >= 0]:
            at = np.s_[slot // layer.page, :, :, slot % layer.page]
            found, wanted = (held[at].astype(np.float64) for held in (pages, self.batch.pages))
            np.testing.assert_allclose(found, wanted, rtol=rounding, atol=1e-6)
            expected[at] = pages[at]
        np.testing.assert_array_equal(pages.view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("layer", [*LAYERS, LARGE], ids=lambda layer: layer.type)
def test_decode(layer: Layer) -> None:
    """Pieces: how many the keys of one head are cut into, at least; then several blocks share a sequence."""
    warps, stages = shape = LARGE_DECODE if layer == LARGE else DECODE
    qkv = f"const {layer.projected}* qkv, const float* cos, const float* sin, const i32* slots"
    lengths = "float* partials, u32* arrivals, int sequences"
    kernel = kernel_of("attention_decode", layer, shape, f"{qkv}, {layer.number}* pages", lengths)

    def run(step: DecodeStep, pieces: int, order: Order) -> np.ndarray:
        batch, count = step.batch, len(step.slots)
        out = np.full((count, *batch.q.shape[1:]), 7, batch.q.dtype)
        arrivals = np.zeros(count * layer.kv, np.uint32)
        partials = np.full((count + pieces) * out[0, :, 0].size * (layer.head_dim + 1), np.nan, np.float32)
        sequences = (batch.block_table, batch.lengths, partials, arrivals, count, batch.block_table.shape[1])
        pages = step.pages.copy()
        args = (out, step.qkv, *step.angles, step.slots, pages, *sequences, layer.scale, CAP)
        shared = warps * stages * 2 * 16 * layer.head_dim * 2
        kernel((layer.kv, count + pieces), warps * 32, args, shared, order)
        assert not arrivals.any()  # ready for the next launch
        step.assert_appended(layer, pages)
        return out

    for contexts in CONTEXTS.values():
        step = DecodeStep.random(layer, contexts)
        used = step.batch.lengths > 0
        step.slots[np.flatnonzero(used)[-1]] = -1  # it is not kept, but attends to itself
        for pieces in (1, 3, 40):
            out = run(step, pieces, "ascending")
            step.batch.assert_close(out[used])
            assert (out[~used] == 7).all()
            np.testing.assert_array_equal(run(step, pieces, "descending"), out)


@pytest.mark.parametrize(
    ("layer", "shape"),
    # Pages of one token, of a part of a tile, and of a tile or more; windows, caps and types with each shape.
    [(LAYERS[i], PREFILLS[0]) for i in (0, 1, 2, 4)] + [(LAYERS[i], PREFILLS[1]) for i in (1, 2, 3, 5)],
    ids=lambda value: value.type if isinstance(value, Layer) else "-".join(map(str, value)),
)
def test_prefill(layer: Layer, shape: tuple[int, int, int]) -> None:
    inputs = f"const {layer.activation}* q, const {layer.number}* pages"
    lengths = "const i32* query_start, int sequences"
    masks = ", const i32* tree_masks, const i32* positions"
    plain = kernel_of("attention_prefill", layer, shape, inputs, lengths)
    for_trees = kernel_of("attention_prefill", layer, (*shape, "Tree"), inputs, lengths, masks)
    warps, blocks, keys = shape
    rows = warps * blocks * 16

    def run(batch: Batch, starts: np.ndarray, order: Order, has_trees: bool) -> np.ndarray:
        out = np.full((len(batch.q) + 2, *batch.q.shape[1:]), 7, batch.q.dtype)
        tiles = len(batch.q) * layer.group // rows + len(batch.lengths)
        page_numbers = 2 * max(1, keys // layer.page) * 4
        shared = (rows + 4 * keys) * layer.head_dim * 2 + page_numbers
        sequences = (batch.block_table, batch.lengths, starts, len(batch.lengths), batch.block_table.shape[1])
        args = (
            out,
            batch.q,
            batch.pages,
            *sequences,
            layer.scale,
            CAP,
            *[batch.tree_masks, batch.positions] * has_trees,
        )
        (for_trees if has_trees else plain)((layer.kv, tiles), warps * 32, args, shared, order)
        return out

    seed = int(np.random.default_rng().integers(1 << 30))
    for sequences in [*BATCHES.values(), *TREES.values()]:
        batch = Batch.random(layer, sequences, seed=seed)
        starts = np.cumsum([0, *(sum(new) for _, *new in sequences)], dtype=np.int32)
        for has_trees in {bool(batch.tree_masks.any()), True}:  # what is made for trees does for others, too
            out = run(batch, starts, "ascending", has_trees)
            batch.assert_close(out[:-2])
            assert (out[-2:] == 7).all()
            np.testing.assert_array_equal(run(batch, starts, "descending", has_trees), out)


def test_a_step_of_decodes_in_one_kernel_and_in_two() -> None:
    """As the plan launches them: one for steps of decodes, two for others; and two calls where something stands between
    rotation and attention."""
    layer = Layer("f16", 2, 2, 96, 16)
    spec = Attention(layer.kv * layer.group, layer.kv, layer.head_dim, layer.page, "float16", layer.scale, 0)
    step = DecodeStep.random(layer, [70, 1, 16, 300, 33])
    batch, count = step.batch, len(step.slots)
    symbols = {"n": count, "seqs": count, "blocks": batch.block_table.shape[1], "num_pages": len(step.pages)}
    projections = (step.qkv.reshape(count, -1), *step.angles, step.slots)
    starts, no_trees = np.arange(count + 1, dtype=np.int32), np.zeros(count, np.int32)
    sequences = (batch.block_table, batch.lengths, starts, no_trees, batch.lengths - 1)

    def run(kernel: DeviceKernel, is_decode: int, *arrays: np.ndarray) -> list[str]:
        dtypes = ["float16" if p.narrow else p.dtype for p in kernel.params]
        return run_kernel(kernel, arrays, symbols | {"is_decode": is_decode, "has_trees": 0}, dtypes)

    pages = [step.pages.copy() for _ in range(3)]
    q, *outs = (np.full(batch.q.shape, np.nan, np.float16) for _ in range(4))
    fused = rope_attention(spec, "sm_90")
    names = run(fused, 1, *projections, pages[0], *sequences, outs[0])
    assert [name.split("_float16")[0] for name in names] == ["attention_decode"]
    names = run(fused, 0, *projections, pages[1], *sequences, outs[1])
    assert [name.split("_f")[0] for name in names] == ["rope_append", "attention_prefill"]
    run(rope_append(*dataclasses.astuple(spec)[:5]), 1, *projections, pages[2], q)
    run(paged_attention(spec, "sm_90"), 1, q, pages[2], *sequences, outs[2])
    for after in pages:
        step.assert_appended(layer, after)
    for out in outs:
        batch.assert_close(out)
    np.testing.assert_array_equal(outs[1], outs[2])
