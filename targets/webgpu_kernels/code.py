"""Modules of WGSL: templates (.wgsl), the buffers and numbers that they are given, and stored matrices.

Templates are Jinja's: lines that start with % are statements. They unroll what must stay in registers, because
compilers of WGSL bound loops by counters of their own, after which a driver may not unroll them any more.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from mlcgen.formats import TILE, WeightFormat
from mlcgen.runtime.sizes import Size
from mlcgen.targets.device_kernel import Launch, int32, part, tensor

NUMBER_TYPES = {"int32": "i32", "float32": "f32"}


@dataclass(frozen=True)
class Buffer:
    """What a module calls one of its buffers, an array of `type`.

    Weights are bound for reading, everything else for reading and writing: intermediate tensors share buffers, and
    WebGPU forbids a buffer that one dispatch binds in both ways.
    """

    name: str
    type: str
    arg: list[Any]
    is_weight: bool = False

    def declaration(self, binding: int) -> str:
        access = "read" if self.is_weight else "read_write"
        return f"@group(0) @binding({binding}) var<storage, {access}> {self.name}: array<{self.type}>;\n"


def kernel(
    name: str,
    template: str,
    values: Mapping[str, Any],
    buffers: Sequence[Buffer],
    grid: tuple[Size, Size, Size],
    block: int,
    numbers: Mapping[str, list[Any]] | None = None,
) -> tuple[Launch, str]:
    """(launch, module). The template sees `values`, THREADS, HEAD: declarations of its buffers and numbers, and ENTRY:
    the head of the kernel, a function called `name` of a workgroup's place in the grid and an invocation's number.
    """
    numbers = numbers or {}
    head = "".join(buffer.declaration(i) for i, buffer in enumerate(buffers))
    if numbers:
        fields = ", ".join(f"{field}: {NUMBER_TYPES[kind]}" for field, (kind, _) in numbers.items())
        head += f"struct Numbers {{ {fields} }}\n"
        head += f"@group(0) @binding({len(buffers)}) var<uniform> numbers: Numbers;\n"
    entry = f"@compute @workgroup_size({block})\n"
    entry += f"fn {name}(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32)"
    text = _templates().get_template(template).render(HEAD=head, ENTRY=entry, THREADS=block, **values)
    return Launch(name, grid, block, (*(b.arg for b in buffers), *numbers.values())), text


@functools.cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        line_statement_prefix="%",
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )


MOST_BYTES = 128 << 20  # of a buffer that a kernel is given: WebGPU promises no more
ALIGNED_TILES = 8  # so many tiles of any format fill a multiple of 256 bytes, at which buffers must begin


@dataclass(frozen=True)
class Rows:
    """Of a stored matrix, those that one launch takes: first .. end - 1, whole tiles but for the last."""

    first: int
    end: int

    @property
    def count(self) -> int:
        return self.end - self.first

    @property
    def numbers(self) -> dict[str, list[Any]]:
        return {"first_row": int32(self.first), "end_row": int32(self.end)}


def split_rows(fmt: WeightFormat, rows: int, columns: int) -> list[Rows]:
    """So that no buffer is larger than MOST_BYTES, where one would be."""
    tile_bytes = max(prod(shape) * np.dtype(dtype).itemsize for _, shape, dtype in fmt.parts(TILE, columns))
    if -(-rows // TILE) * tile_bytes <= MOST_BYTES:
        return [Rows(0, rows)]
    each = max(MOST_BYTES // tile_bytes // ALIGNED_TILES, 1) * ALIGNED_TILES * TILE
    return [Rows(first, min(first + each, rows)) for first in range(0, rows, each)]


def matrix_buffers(fmt: WeightFormat, columns: int, params: Sequence[str], rows: Rows | None) -> list[Buffer]:
    """Those of a stored matrix, by quads of rows: weights.wgsl reads them. rows: None for all of them.

    params: names of the call's arguments."""
    word = {32: "vec4<f32>", 16: "vec2<u32>"}.get(fmt.bits, "vec4<u32>")
    found = []
    for name, (_, *tile), dtype in fmt.parts(TILE, columns):
        index, tile_bytes = params.index(name), prod(tile) * np.dtype(dtype).itemsize
        arg = tensor(index)
        if rows is not None:
            arg = part(index, rows.first // TILE * tile_bytes, -(-rows.count // TILE) * tile_bytes)
        found.append(Buffer(name, word if name == "w" else "vec2<u32>", arg, is_weight=True))
    return found


def unit_columns(fmt: WeightFormat) -> int:
    """Of a row, those that a kernel reads at once: of a word of codes, and 4 floats."""
    return 8 if fmt.bits == 4 else 4


def matrix_values(fmt: WeightFormat, columns: int) -> dict[str, Any]:
    """What weights.wgsl wants to know."""
    return {"fmt": fmt, "K": columns, "UNIT": unit_columns(fmt)}


def identifier(value: float) -> str:
    return repr(value).replace(".", "p").replace("-", "m").replace("+", "")
