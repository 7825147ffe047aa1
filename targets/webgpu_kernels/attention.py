"""Attention over KV pages: for any steps, and for those in which every sequence decodes, long ones in pieces."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlcgen.errors import UnsupportedError
from mlcgen.runtime.sizes import Size
from mlcgen.targets.base import Attention
from mlcgen.targets.device_kernel import (
    Code,
    DeviceKernel,
    Launch,
    Param,
    Variant,
    ceildiv,
    float32,
    int32,
    scratch,
    tensor,
    times,
)

from .code import Buffer, kernel
from .lookup import pages_param

HEAD_DIMS = (64, 96, 128, 256)
THREADS = 128
COMBINE_THREADS = 64  # one for each vector of 4 of the largest head
DECODE_ROWS = 4  # heads that a workgroup decodes for, at most: a vector's components
UNSPLIT = 128  # keys that one workgroup decodes with alone: sooner done than a second kernel has begun
SPAN = 32  # keys of a workgroup where several share a sequence, at least
WORKGROUPS = 512  # to decode with, about, where sequences are few; where they are many, the longest still gets some
LEAST_SPLITS = 4
HOW = "kernel: targets/webgpu_kernels/attention.py"


def paged_attention(spec: Attention) -> DeviceKernel:
    """PrimFunc(q (n, H, D); pages; block_table (seqs, blocks); seq_lens (seqs,); query_start (seqs + 1,); tree_masks,
    positions (n,), which are read of tokens in trees alone: others are the last of their sequences; out (n, H, D))."""
    if spec.head_dim not in HEAD_DIMS:
        have = ", ".join(map(str, HEAD_DIMS))
        raise UnsupportedError(f"heads of {spec.head_dim} values are not supported on a GPU; have: {have}")
    heads = ("n", spec.num_heads, spec.head_dim)
    params = (
        Param("q", heads, "float32"),
        pages_param(spec.num_kv_heads, spec.page_size, spec.head_dim, spec.kv_dtype),
        Param("block_table", ("seqs", "blocks"), "int32"),
        Param("seq_lens", ("seqs",), "int32"),
        Param("query_start", ("seqs+1",), "int32"),
        Param("tree_masks", ("n",), "int32"),
        Param("positions", ("n",), "int32"),
        Param("out", heads, "float32"),
    )
    return DeviceKernel("paged_attention", params, _Layer(spec).code, HOW, spec=spec)


@dataclass(frozen=True)
class _Layer:
    spec: Attention

    def code(self, dtypes: Sequence[str]) -> Code:
        any_step, trees = (self._any_step(has_trees) for has_trees in (False, True))
        decode, split, combine = self._decode(False), self._decode(True), self._combine()
        variants = (
            Variant(["and", "is_decode", ["<=", self.longest, UNSPLIT]], (decode[0],)),
            Variant("is_decode", (split[0], combine[0])),
            Variant("has_trees", (trees[0],)),
            Variant(1, (any_step[0],)),
        )
        functions = {launch.function: text for launch, text in (any_step, trees, decode, split, combine)}
        # No less than any step's sequences times splits, and the most for the most sequences.
        pieces = ["+", self._splits_of_all, times("seqs", LEAST_SPLITS)]
        return Code((), functions, variants, times(pieces, self.spec.num_heads * (self.spec.head_dim + 4) * 4))

    @property
    def group(self) -> int:
        return self.spec.num_heads // self.spec.num_kv_heads

    @property
    def longest(self) -> Size:
        """Keys that a token sees, at most."""
        return ["min", "longest", self.spec.window] if self.spec.window else "longest"

    @property
    def span(self) -> Size:
        """Keys of a piece."""
        most = ["max", ceildiv(self._splits_of_all, "seqs"), LEAST_SPLITS]
        return ["max", SPAN, ceildiv(self.longest, most)]

    @property
    def _splits_of_all(self) -> int:
        return -(-WORKGROUPS // self.spec.num_kv_heads)

    @property
    def splits(self) -> Size:
        return ceildiv(self.longest, self.span)

    def _name(self, kind: str) -> str:
        spec = self.spec
        sizes = (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.page_size, spec.window)
        return "_".join([f"attention_{kind}", spec.kv_dtype, *map(str, sizes)])

    def _any_step(self, has_trees: bool) -> tuple[Launch, str]:
        spec = self.spec
        buffers = [*self._inputs(), Buffer("query_start", "i32", tensor(4)), Buffer("out", "vec4<f32>", tensor(7))]
        if has_trees:
            buffers.append(Buffer("tree_masks", "i32", tensor(5)))
            if spec.window:  # the eighth: WebGPU promises no more
                buffers.append(Buffer("positions", "i32", tensor(6)))
        numbers = {"seqs": int32("seqs"), "blocks": int32("blocks"), "scale": float32(spec.scale)}
        vectors = spec.head_dim // 4
        rows, chunk = (64, 4) if spec.head_dim <= 128 else (32, 8)  # 16 KiB of workgroup memory
        staged = chunk * (rows + 1 + 33)
        values = next(keys for keys in (32, 16, 8, 4) if keys * vectors <= staged)
        shape = {"ROWS": rows, "CHUNK": chunk, "STAGED": staged, "VALUES": values, "TREES": has_trees}
        grid = (spec.num_kv_heads, ["+", ["//", times("n", self.group), rows], "seqs"], 1)
        name = self._name("trees" if has_trees else "any")
        return kernel(name, "attention.wgsl", self._values() | shape, buffers, grid, THREADS, numbers)

    def _decode(self, is_split: bool) -> tuple[Launch, str]:
        spec = self.spec
        rows = min(self.group, DECODE_ROWS)
        out = Buffer("partials", "vec4<f32>", scratch()) if is_split else Buffer("out", "vec4<f32>", tensor(7))
        numbers = {"blocks": int32("blocks"), "scale": float32(spec.scale)}
        if is_split:
            numbers |= {"span": int32(self.span), "splits": int32(self.splits)}
        grid = (spec.num_kv_heads * -(-self.group // rows), self.splits if is_split else 1, "seqs")
        values, name = self._values() | {"ROWS": rows, "SPLIT": is_split}, self._name("split" if is_split else "decode")
        return kernel(name, "attention_decode.wgsl", values, [*self._inputs(), out], grid, THREADS, numbers)

    def _combine(self) -> tuple[Launch, str]:
        spec = self.spec
        buffers = [Buffer("partials", "vec4<f32>", scratch()), Buffer("seq_lens", "i32", tensor(3))]
        buffers.append(Buffer("out", "vec4<f32>", tensor(7)))
        numbers = {"span": int32(self.span), "splits": int32(self.splits)}
        values = {"H": spec.num_heads, "D": spec.head_dim, "WINDOW": spec.window}
        grid = (spec.num_heads, "seqs", 1)
        return kernel(self._name("combine"), "attention_combine.wgsl", values, buffers, grid, COMBINE_THREADS, numbers)

    def _inputs(self) -> list[Buffer]:
        vector = "vec4<f32>" if self.spec.kv_dtype == "float32" else "vec2<u32>"  # 4 numbers
        q, pages = Buffer("q", "vec4<f32>", tensor(0)), Buffer("pages", vector, tensor(1))
        return [q, pages, Buffer("block_table", "i32", tensor(2)), Buffer("seq_lens", "i32", tensor(3))]

    def _values(self) -> dict[str, Any]:
        spec = self.spec
        sizes = {"KV": spec.num_kv_heads, "GROUP": self.group, "D": spec.head_dim, "PAGE": spec.page_size}
        return sizes | {"WINDOW": spec.window, "KV_DTYPE": spec.kv_dtype}
