"""Modules of WGSL: templates (.wgsl), the buffers and numbers that they are given, and stored matrices.

Templates are Jinja's: lines that start with % are statements. They unroll what must stay in registers, because
compilers of WGSL bound loops by counters of their own, after which a driver may not unroll them any more.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from mlcgen.formats import WeightFormat
from mlcgen.runtime.sizes import Size
from mlcgen.targets.device_kernel import Launch, tensor

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


def matrix_buffers(fmt: WeightFormat, params: Sequence[str]) -> list[Buffer]:
    """Those of a stored matrix, by quads of rows: weights.wgsl reads them. params: names of the call's arguments."""
    word = {32: "vec4<f32>", 16: "vec2<u32>"}.get(fmt.bits, "vec4<u32>")
    names = [name for name, _, _ in fmt.parts(16, 64)]
    return [Buffer(p, word if p == "w" else "vec2<u32>", tensor(params.index(p)), is_weight=True) for p in names]


def unit_columns(fmt: WeightFormat) -> int:
    """Of a row, those that a kernel reads at once: of a word of codes, and 4 floats."""
    return 8 if fmt.bits == 4 else 4


def matrix_values(fmt: WeightFormat, columns: int) -> dict[str, Any]:
    """What weights.wgsl wants to know."""
    return {"fmt": fmt, "K": columns, "UNIT": unit_columns(fmt)}


def identifier(value: float) -> str:
    return repr(value).replace(".", "p").replace("-", "m").replace("+", "")
