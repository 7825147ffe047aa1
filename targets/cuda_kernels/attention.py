"""Attention over KV pages: one kernel for steps in which every sequence decodes, one for all others."""

from collections.abc import Sequence

from mlcgen.errors import UnsupportedError
from mlcgen.runtime.sizes import Size
from mlcgen.targets.device_kernel import (
    Code,
    DeviceKernel,
    Launch,
    Param,
    Variant,
    ceildiv,
    counters,
    float32,
    int32,
    scratch,
    tensor,
    times,
)

from .code import C_TYPES, HALVES, definition

DECODE_WARPS, DECODE_STAGES, DECODE_KEYS = 4, 4, 16
PREFILL_WARPS, PREFILL_BLOCKS, PREFILL_KEYS = 4, 2, 64
DECODE_BLOCKS = 264  # that fill a GPU: two for each of 132 multiprocessors
MIN_PIECE = 64  # keys of a block, at least


def paged_attention(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    kv_dtype: str,
    scale: float,
    window: int,
) -> DeviceKernel:
    """PrimFunc(q (n, H, D); pages; block_table (seqs, blocks); seq_lens (seqs,); query_start (seqs + 1,); positions
    (n,), which is not read: tokens are the last of their sequences; out (n, H, D))."""
    if kv_dtype == "float32":
        raise UnsupportedError("cuda keeps keys and values in 16 bits; compile with --kv-dtype float16 or bfloat16")
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
    group = num_heads // num_kv_heads
    sizes = f"{num_kv_heads}, {group}, {head_dim}, {page_size}, {window}"

    def code(dtypes: Sequence[str]) -> Code:
        activation = _activation(dtypes)
        layer = f"AttentionLayer<{C_TYPES[page]}, {C_TYPES[activation]}, {sizes}>"
        suffix = f"{kv_dtype}_{activation}_{sizes.replace(', ', '_')}"
        types = (C_TYPES[activation], C_TYPES[page])
        decode, decode_text = _decode(suffix, layer, types, num_heads, num_kv_heads, head_dim, scale)
        prefill, prefill_text = _prefill(suffix, layer, types, num_kv_heads, group, head_dim, page_size, scale)
        partials = times(_blocks(num_kv_heads), num_heads * (head_dim + 1) * 4)
        return Code(
            ("attention_decode.cuh", "attention_prefill.cuh"),
            {decode.function: decode_text, prefill.function: prefill_text},
            (Variant("is_decode", (decode,)), Variant(1, (prefill,))),
            scratch=partials,
            counters=times("seqs", num_kv_heads * 4),
        )

    return DeviceKernel("paged_attention", params, code, "kernel: targets/cuda_kernels/attention.py")


def _activation(dtypes: Sequence[str]) -> str:
    if dtypes[0] != dtypes[-1] or dtypes[0] not in HALVES:
        raise UnsupportedError(f"cuda attention takes queries in 16 bits, not {dtypes[0]} to {dtypes[-1]}")
    return dtypes[0]


def _blocks(num_kv_heads: int) -> Size:
    """Blocks that share the keys of all sequences: as many as fill the GPU, and no more than there is work for."""
    pieces = times("seqs", ceildiv("longest", MIN_PIECE))
    return ["+", ["max", ["min", DECODE_BLOCKS // num_kv_heads, pieces], 1], "seqs"]


def _decode(
    suffix: str, layer: str, types: tuple[str, str], heads: int, kv_heads: int, head_dim: int, scale: float
) -> tuple[Launch, str]:
    name = f"attention_decode_{suffix}"
    params = [f"{types[0]}* out", f"const {types[0]}* q", f"const {types[1]}* pages", "const i32* block_table"]
    params += ["const i32* seq_lens", "float* partials", "u32* arrivals", "int seqs", "int table_stride"]
    params += ["float scale"]
    body = f"attention_decode<{layer}, {DECODE_WARPS}, {DECODE_STAGES}>"
    body += "(out, q, pages, block_table, seq_lens, partials, arrivals, seqs, table_stride, scale, 0);"
    args = (*map(tensor, (6, 0, 1, 2, 3)), scratch(), counters(), int32("seqs"), int32("blocks"), float32(scale))
    shared = DECODE_WARPS * DECODE_STAGES * 2 * DECODE_KEYS * head_dim * 2
    threads = DECODE_WARPS * 32
    launch = Launch(name, (kv_heads, _blocks(kv_heads), 1), threads, args, shared)
    return launch, definition(name, params, body, threads)


def _prefill(
    suffix: str,
    layer: str,
    types: tuple[str, str],
    kv_heads: int,
    group: int,
    head_dim: int,
    page_size: int,
    scale: float,
) -> tuple[Launch, str]:
    name = f"attention_prefill_{suffix}"
    params = [f"{types[0]}* out", f"const {types[0]}* q", f"const {types[1]}* pages", "const i32* block_table"]
    params += ["const i32* seq_lens", "const i32* query_start", "int seqs", "int table_stride", "float scale"]
    body = f"attention_prefill<{layer}, {PREFILL_WARPS}, {PREFILL_BLOCKS}, {PREFILL_KEYS}>"
    body += "(out, q, pages, block_table, seq_lens, query_start, seqs, table_stride, scale, 0);"
    args = (*map(tensor, (6, 0, 1, 2, 3, 4)), int32("seqs"), int32("blocks"), float32(scale))
    rows = PREFILL_WARPS * PREFILL_BLOCKS * 16
    tiles = ["+", ["//", times("n", group), rows], "seqs"]
    pages = max(PREFILL_KEYS // page_size, 1)
    shared = (rows + 4 * PREFILL_KEYS) * head_dim * 2 + 2 * pages * 4
    threads = PREFILL_WARPS * 32
    launch = Launch(name, (kv_heads, tiles, 1), threads, args, -(-shared // 16) * 16)
    return launch, definition(name, params, body, threads)
