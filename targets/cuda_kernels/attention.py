"""Attention over KV pages: one kernel for steps in which every sequence decodes, one for all others."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlcgen.errors import UnsupportedError
from mlcgen.runtime.sizes import Size
from mlcgen.targets.device_kernel import (
    Code,
    DeviceKernel,
    Launch,
    Param,
    Variant,
    counters,
    float32,
    int32,
    scratch,
    tensor,
    times,
)

from .code import C_TYPES, HALVES, MULTIPROCESSORS, definition

DECODE_KEYS = 16  # of a tile

# (warps, stages) of decode and (warps, blocks of 16 rows per warp, keys of a tile) of prefill, by head_dim: what 227 KB
# of shared memory a multiprocessor (sm_90) and 255 registers a thread allow, and what 99 KB do (sm_86, sm_89).
DECODE = {64: (4, 3), 96: (4, 3), 128: (4, 3), 256: (4, 2)}
HEAD_DIMS = tuple(DECODE)
DECODE_SMALL = {**DECODE, 256: (2, 3)}
PREFILL = {64: (4, 2, 128), 96: (8, 1, 64), 128: (8, 1, 128), 256: (8, 1, 64)}
PREFILL_SMALL = {**PREFILL, 128: (8, 1, 64), 256: (4, 1, 32)}
PREFILL_MANY = {128: (4, 2, 64)}  # where rows are many, more of them per block
MANY_ROWS = 4096 * 32  # (token, query head) pairs
SMALL_ARCHS = ("sm_86", "sm_89")


def paged_attention(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    kv_dtype: str,
    scale: float,
    window: int,
    arch: str,
) -> DeviceKernel:
    """PrimFunc(q (n, H, D); pages; block_table (seqs, blocks); seq_lens (seqs,); query_start (seqs + 1,); positions
    (n,), which is not read: tokens are the last of their sequences; out (n, H, D))."""
    page = "uint16" if kv_dtype == "bfloat16" else kv_dtype
    q_shape = ("n", num_heads, head_dim)
    params = (
        Param("q", q_shape, "float32", HALVES),
        Param("pages", ("num_pages", 2, num_kv_heads, page_size, head_dim), page),
        Param("block_table", ("seqs", "blocks"), "int32"),
        Param("seq_lens", ("seqs",), "int32"),
        Param("query_start", ("seqs+1",), "int32"),
        Param("positions", ("n",), "int32"),
        Param("out", q_shape, "float32", HALVES),
    )
    group, multiprocessors = num_heads // num_kv_heads, MULTIPROCESSORS.get(arch, MULTIPROCESSORS["sm_80"])
    sizes = f"{num_kv_heads}, {group}, {head_dim}, {page_size}, {window}"

    def code(dtypes: Sequence[str]) -> Code:
        activation = _activation(dtypes)
        layer = _Layer(
            f"AttentionLayer<{C_TYPES[page]}, {C_TYPES[activation]}, {sizes}>",
            f"{kv_dtype}_{activation}_{sizes.replace(', ', '_')}",
            (C_TYPES[activation], C_TYPES[page]),
            num_kv_heads,
            group,
            head_dim,
            page_size,
            scale,
            multiprocessors,
        )
        is_small = arch in SMALL_ARCHS
        shape = (PREFILL_SMALL if is_small else PREFILL)[head_dim]
        many = PREFILL_MANY.get(head_dim, shape)
        launches = [_decode(layer, (DECODE_SMALL if is_small else DECODE)[head_dim]), _prefill(layer, shape)]
        variants = [Variant("is_decode", (launches[0][0],)), Variant(1, (launches[1][0],))]
        if many != shape and window == 0:
            launches.append(_prefill(layer, many))
            variants.insert(1, Variant(["<=", MANY_ROWS, times("n", num_heads)], (launches[2][0],)))
        return Code(
            ("attention_decode.cuh", "attention_prefill.cuh"),
            {launch.function: text for launch, text in launches},
            tuple(variants),
            scratch=times(_blocks(num_kv_heads, multiprocessors), num_heads * (head_dim + 1) * 4),
            counters=times("seqs", num_kv_heads * 4),
        )

    return DeviceKernel("paged_attention", params, code, "kernel: targets/cuda_kernels/attention.py")


def _activation(dtypes: Sequence[str]) -> str:
    if dtypes[0] != dtypes[-1] or dtypes[0] not in HALVES:
        raise UnsupportedError(f"cuda attention takes queries in 16 bits, not {dtypes[0]} to {dtypes[-1]}")
    return dtypes[0]


@dataclass(frozen=True)
class _Layer:
    cpp: str  # the C++ type of its constants
    suffix: str  # of its functions' names
    types: tuple[str, str]  # of queries and outputs, and of the cache
    num_kv_heads: int
    group: int
    head_dim: int
    page_size: int
    scale: float
    multiprocessors: int

    @property
    def params(self) -> list[str]:
        pointers = [f"{self.types[0]}* out", f"const {self.types[0]}* q", f"const {self.types[1]}* pages"]
        return [*pointers, "const i32* block_table", "const i32* seq_lens"]


def _blocks(num_kv_heads: int, multiprocessors: int) -> Size:
    """Blocks that share the keys of all sequences: one for each, and more for the longest to be cut into pieces.

    One wave of blocks where sequences are few; where they are many, smaller pieces, which even out their lengths.
    """
    few = max(multiprocessors // num_kv_heads, 1)
    is_few = ["<=", "seqs", few]
    return ["+", "seqs", ["+", times(is_few, few), times(["-", 1, is_few], 4 * few)]]


def _decode(layer: _Layer, shape: tuple[int, int]) -> tuple[Launch, str]:
    warps, stages = shape
    name = f"attention_decode_{layer.suffix}"
    params = [*layer.params, "float* partials", "u32* arrivals", "int seqs", "int table_stride", "float scale"]
    body = f"attention_decode<{layer.cpp}, {warps}, {stages}>"
    body += "(out, q, pages, block_table, seq_lens, partials, arrivals, seqs, table_stride, scale, 0);"
    args = (*map(tensor, (6, 0, 1, 2, 3)), scratch(), counters(), int32("seqs"), int32("blocks"), float32(layer.scale))
    shared = warps * stages * 2 * DECODE_KEYS * layer.head_dim * 2
    grid = (layer.num_kv_heads, _blocks(layer.num_kv_heads, layer.multiprocessors), 1)
    return Launch(name, grid, warps * 32, args, shared), definition(name, params, body, warps * 32)


def _prefill(layer: _Layer, shape: tuple[int, int, int]) -> tuple[Launch, str]:
    warps, blocks, keys = shape
    name = f"attention_prefill_{layer.suffix}_{warps}_{blocks}_{keys}"
    params = [*layer.params, "const i32* query_start", "int seqs", "int table_stride", "float scale"]
    body = f"attention_prefill<{layer.cpp}, {warps}, {blocks}, {keys}>"
    body += "(out, q, pages, block_table, seq_lens, query_start, seqs, table_stride, scale, 0);"
    args = (*map(tensor, (6, 0, 1, 2, 3, 4)), int32("seqs"), int32("blocks"), float32(layer.scale))
    rows = warps * blocks * 16  # (token, head of the group) pairs of a block
    tiles = ["+", ["//", times("n", layer.group), rows], "seqs"]
    shared = (rows + 4 * keys) * layer.head_dim * 2 + 8 * max(keys // layer.page_size, 1)
    launch = Launch(name, (layer.num_kv_heads, tiles, 1), warps * 32, args, -(-shared // 16) * 16)
    return launch, definition(name, params, body, warps * 32)
