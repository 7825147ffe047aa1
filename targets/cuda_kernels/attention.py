"""Attention over KV pages: one kernel for steps in which every sequence decodes, which also turns queries and keys and
appends to the pages, and for all others two: that and the attention of any number of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlcgen.errors import UnsupportedError
from mlcgen.runtime.sizes import Size
from mlcgen.targets.base import Attention
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
from .lookup import rope_launch, rope_params

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
SHARED = 228 * 1024  # of a multiprocessor of sm_90, of which a block takes 1 KB beside its own
HOW = "kernel: targets/cuda_kernels/attention.py"


def rope_attention(spec: Attention, arch: str) -> DeviceKernel:
    """PrimFunc(qkv (n, (H + 2 KV) D); cos, sin (n, D / 2) f32; slots (n,) int32; pages; block_table, seq_lens,
    query_start, tree_masks, positions as below; out (n, H, D)): rope_append, then paged_attention."""
    sizes = (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.page_size)
    params = (*rope_params(*sizes, spec.kv_dtype), *_sequence_params(spec))

    def code(dtypes: Sequence[str]) -> Code:
        qkv, page, activation = dtypes[0], dtypes[4], _activation(dtypes[-1])
        layer = _Layer(spec, activation, arch)
        decode, decode_text = _decode(layer, qkv)
        rope, rope_text = rope_launch(sizes, (qkv, page, activation), scratch())
        prefill, texts = _prefill_variants(layer, scratch(), first=4)
        return Code(
            ("attention_decode.cuh", "attention_prefill.cuh"),
            {decode.function: decode_text, rope.function: rope_text, **texts},
            (Variant("is_decode", (decode,)), *(Variant(v.when, (rope, *v.launches)) for v in prefill)),
            scratch=["max", layer.partial_bytes, times("n", spec.num_heads * spec.head_dim * 2)],
            counters=times("seqs", spec.num_kv_heads * 4),
        )

    return DeviceKernel("rope_attention", params, code, HOW, spec=spec)


def paged_attention(spec: Attention, arch: str) -> DeviceKernel:
    """PrimFunc(q (n, H, D); pages; block_table (seqs, blocks); seq_lens (seqs,); query_start (seqs + 1,); tree_masks,
    positions (n,), which are read of tokens in trees alone: others are the last of their sequences; out (n, H, D)).

    For what rope_attention is not made of; decoding is then that of prompts of one token.
    """
    pages = rope_params(spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.page_size, spec.kv_dtype)[4]
    q = Param("q", ("n", spec.num_heads, spec.head_dim), "float32", HALVES)
    params = (q, pages, *_sequence_params(spec))

    def code(dtypes: Sequence[str]) -> Code:
        activation = _activation(dtypes[-1])
        if dtypes[0] != activation:
            raise UnsupportedError(f"cuda attention takes queries in the type of its result, not {dtypes[0]}")
        variants, texts = _prefill_variants(_Layer(spec, activation, arch), tensor(0), first=1)
        return Code(("attention_prefill.cuh",), texts, variants)

    return DeviceKernel("paged_attention", params, code, HOW, spec=spec)


def _sequence_params(spec: Attention) -> list[Param]:
    return [
        Param("block_table", ("seqs", "blocks"), "int32"),
        Param("seq_lens", ("seqs",), "int32"),
        Param("query_start", ("seqs+1",), "int32"),
        Param("tree_masks", ("n",), "int32"),
        Param("positions", ("n",), "int32"),
        Param("out", ("n", spec.num_heads, spec.head_dim), "float32", HALVES),
    ]


def _activation(dtype: str) -> str:
    if dtype not in HALVES:
        raise UnsupportedError(f"cuda attention gives its result in 16 bits, not {dtype}")
    return dtype


@dataclass(frozen=True)
class _Layer:
    spec: Attention
    activation: str  # the type of turned queries and of outputs
    arch: str

    @property
    def group(self) -> int:
        return self.spec.num_heads // self.spec.num_kv_heads

    @property
    def number(self) -> str:
        """The C++ type of the cache."""
        return C_TYPES[self.spec.kv_dtype]

    @property
    def out(self) -> str:
        """That of the activations."""
        return C_TYPES[self.activation]

    @property
    def constants(self) -> list[str]:
        spec = self.spec
        return [*map(str, (spec.num_kv_heads, self.group, spec.head_dim, spec.page_size, spec.window))]

    @property
    def cpp(self) -> str:
        """The C++ type of its constants."""
        return f"AttentionLayer<{', '.join([self.number, self.out, *self.constants])}>"

    @property
    def suffix(self) -> str:
        """Of its functions' names."""
        return "_".join([self.spec.kv_dtype, self.activation, *self.constants])

    @property
    def blocks(self) -> Size:
        """Blocks that share the keys of all sequences: one for each, and more for the longest to be cut into pieces.

        One wave of blocks where sequences are few; where they are many, smaller pieces, which even out their lengths.
        """
        multiprocessors = MULTIPROCESSORS.get(self.arch, MULTIPROCESSORS["sm_80"])
        few = max(multiprocessors // self.spec.num_kv_heads, 1)
        is_few = ["<=", "seqs", few]
        return ["+", "seqs", ["+", times(is_few, few), times(["-", 1, is_few], 4 * few)]]

    @property
    def partial_bytes(self) -> Size:
        """What blocks of a sequence leave for the last of them: an output and its weight for each head."""
        return times(self.blocks, self.spec.num_heads * (self.spec.head_dim + 1) * 4)


def _decode(layer: _Layer, qkv: str) -> tuple[Launch, str]:
    spec = layer.spec
    warps, stages = (DECODE_SMALL if layer.arch in SMALL_ARCHS else DECODE)[spec.head_dim]
    name = f"attention_decode_{qkv}_{layer.suffix}"
    params = [f"{layer.out}* out", f"const {C_TYPES[qkv]}* qkv", "const float* cos", "const float* sin"]
    params += ["const i32* slots", f"{layer.number}* pages", "const i32* block_table", "const i32* seq_lens"]
    params += ["float* partials", "u32* arrivals", "int seqs", "int table_stride", "float scale"]
    body = f"attention_decode<{layer.cpp}, {warps}, {stages}>(out, qkv, cos, sin, slots, pages, block_table, seq_lens, "
    body += "partials, arrivals, seqs, table_stride, scale, 0);"
    args = (*map(tensor, (10, 0, 1, 2, 3, 4, 5, 6)), scratch(), counters())
    numbers = (int32("seqs"), int32("blocks"), float32(spec.scale))
    shared = warps * stages * 2 * DECODE_KEYS * spec.head_dim * 2
    grid = (spec.num_kv_heads, layer.blocks, 1)
    # On sm_90 the kernels around it want a multiprocessor's memory as shared memory, and it is divided when empty only.
    launch = Launch(name, grid, warps * 32, (*args, *numbers), shared)
    blocks = SHARED // (shared + 1024)  # that shared memory lets run at once; registers should, too
    return launch, definition(name, params, body, warps * 32, blocks)


def _prefill_variants(layer: _Layer, q: list[object], first: int) -> tuple[tuple[Variant, ...], dict[str, str]]:
    """For any step, and the functions' definitions; `first`: of the call's arguments, the pages."""
    spec = layer.spec
    shape = (PREFILL_SMALL if layer.arch in SMALL_ARCHS else PREFILL)[spec.head_dim]
    many = PREFILL_MANY.get(spec.head_dim, shape)
    kinds: list[tuple[Size, tuple[Launch, str]]] = [("has_trees", _prefill(layer, shape, q, first, has_trees=True))]
    if many != shape and not spec.window:
        kinds.append((["<=", MANY_ROWS, times("n", spec.num_heads)], _prefill(layer, many, q, first)))
    kinds.append((1, _prefill(layer, shape, q, first)))
    variants = tuple(Variant(when, (launch,)) for when, (launch, _) in kinds)
    return variants, {launch.function: text for _, (launch, text) in kinds}


def _prefill(
    layer: _Layer, shape: tuple[int, int, int], q: list[object], first: int, has_trees: bool = False
) -> tuple[Launch, str]:
    warps, blocks, keys = shape
    spec = layer.spec
    name = f"attention_prefill_{layer.suffix}_{warps}_{blocks}_{keys}{'_trees' * has_trees}"
    params = [f"{layer.out}* out", f"const {layer.out}* q", f"const {layer.number}* pages", "const i32* block_table"]
    params += ["const i32* seq_lens", "const i32* query_start", "int seqs", "int table_stride", "float scale"]
    masks, trees = "", ""
    if has_trees:
        params += ["const i32* tree_masks", "const i32* positions"]
        masks, trees = ", Tree", ", tree_masks, positions"
    body = f"attention_prefill<{layer.cpp}, {warps}, {blocks}, {keys}{masks}>"
    body += f"(out, q, pages, block_table, seq_lens, query_start, seqs, table_stride, scale, 0{trees});"
    pages_to_query_start = map(tensor, range(first, first + 4))
    numbers = (int32("seqs"), int32("blocks"), float32(spec.scale))
    args = (tensor(first + 6), q, *pages_to_query_start, *numbers)
    args += (tensor(first + 4), tensor(first + 5)) * has_trees
    rows = warps * blocks * 16  # (token, head of the group) pairs of a block
    tiles = ["+", ["//", times("n", layer.group), rows], "seqs"]
    shared = (rows + 4 * keys) * spec.head_dim * 2 + 8 * max(keys // spec.page_size, 1)
    launch = Launch(name, (spec.num_kv_heads, tiles, 1), warps * 32, args, -(-shared // 16) * 16)
    return launch, definition(name, params, body, warps * 32)
