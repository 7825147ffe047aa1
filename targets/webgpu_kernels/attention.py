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
MOST_ROWS = 32  # of a workgroup
SPAN = 128  # keys that one workgroup decodes with, at least
WORKGROUPS = 512  # to decode with, about, where sequences are few; where they are many, the longest still gets some
LEAST_SPLITS = 4
STAGED_VECTORS = 512  # of values, what 16 KiB have room for beside weights
HOW = "kernel: targets/webgpu_kernels/attention.py"


def paged_attention(spec: Attention) -> DeviceKernel:
    """PrimFunc(q (n, H, D); pages; block_table (seqs, blocks); seq_lens (seqs,); query_start (seqs + 1,); positions
    (n,), which is not read: tokens are the last of their sequences; out (n, H, D))."""
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
        Param("positions", ("n",), "int32"),
        Param("out", heads, "float32"),
    )
    return DeviceKernel("paged_attention", params, _Layer(spec).code, HOW, spec=spec)


@dataclass(frozen=True)
class _Layer:
    spec: Attention

    def code(self, dtypes: Sequence[str]) -> Code:
        any_step, decode, split, combine = self._any_step(), self._decode(False), self._decode(True), self._combine()
        variants = (
            Variant(["and", "is_decode", ["<=", self.longest, SPAN]], (decode[0],)),
            Variant("is_decode", (split[0], combine[0])),
            Variant(1, (any_step[0],)),
        )
        functions = {launch.function: text for launch, text in (any_step, decode, split, combine)}
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

    def _any_step(self) -> tuple[Launch, str]:
        spec = self.spec
        buffers = [*self._inputs(), Buffer("query_start", "i32", tensor(4)), Buffer("out", "vec4<f32>", tensor(6))]
        numbers = {"seqs": int32("seqs"), "blocks": int32("blocks"), "scale": float32(spec.scale)}
        grid = (spec.num_kv_heads, ["+", ["//", times("n", self.group), MOST_ROWS], "seqs"], 1)
        return self._attention("any", buffers, grid, numbers, MOST_ROWS, DECODE=False, SPLIT=False)

    def _decode(self, is_split: bool) -> tuple[Launch, str]:
        spec = self.spec
        rows = next(r for r in (4, 8, 16, MOST_ROWS) if r == MOST_ROWS or r >= self.group)
        out = Buffer("partials", "vec4<f32>", scratch()) if is_split else Buffer("out", "vec4<f32>", tensor(6))
        numbers = {"blocks": int32("blocks"), "scale": float32(spec.scale)}
        if is_split:
            numbers |= {"span": int32(self.span), "splits": int32(self.splits)}
        grid = (spec.num_kv_heads * -(-self.group // rows), self.splits if is_split else 1, "seqs")
        kind = "split" if is_split else "decode"
        return self._attention(kind, [*self._inputs(), out], grid, numbers, rows, DECODE=True, SPLIT=is_split)

    def _combine(self) -> tuple[Launch, str]:
        spec = self.spec
        buffers = [Buffer("partials", "vec4<f32>", scratch()), Buffer("seq_lens", "i32", tensor(3))]
        buffers.append(Buffer("out", "vec4<f32>", tensor(6)))
        numbers = {"span": int32(self.span), "splits": int32(self.splits)}
        values = {"H": spec.num_heads, "D": spec.head_dim, "WINDOW": spec.window}
        grid = (spec.num_heads, "seqs", 1)
        return kernel(self._name("combine"), "attention_combine.wgsl", values, buffers, grid, COMBINE_THREADS, numbers)

    def _inputs(self) -> list[Buffer]:
        vector = "vec4<f32>" if self.spec.kv_dtype == "float32" else "vec2<u32>"  # 4 numbers
        q, pages = Buffer("q", "vec4<f32>", tensor(0)), Buffer("pages", vector, tensor(1))
        return [q, pages, Buffer("block_table", "i32", tensor(2)), Buffer("seq_lens", "i32", tensor(3))]

    def _attention(
        self,
        kind: str,
        buffers: list[Buffer],
        grid: tuple[Size, Size, Size],
        numbers: dict[str, list[Any]],
        rows: int,
        **flags: bool,
    ) -> tuple[Launch, str]:
        spec = self.spec
        vectors = spec.head_dim // 4
        lanes = next(lanes for lanes in (32, 16, 8) if vectors % lanes == 0 and rows * lanes <= 4 * THREADS)
        values = next(keys for keys in (32, 16, 8) if keys * vectors <= STAGED_VECTORS)
        sizes = {"KV": spec.num_kv_heads, "GROUP": self.group, "D": spec.head_dim, "PAGE": spec.page_size}
        shape = {"ROWS": rows, "LANES": lanes, "VALUES": values, "WINDOW": spec.window, "KV_DTYPE": spec.kv_dtype}
        shape |= {"KEYS_EACH": max(rows // 16, 1), "ROWS_EACH": max(rows * lanes // THREADS, 1)}
        shape["STAGED"] = max(8 * (rows + 1 + 33), values * vectors)
        return kernel(self._name(kind), "attention.wgsl", sizes | shape | flags, buffers, grid, THREADS, numbers)
