"""Products of many rows: a panel of W is decoded to words of the multiply-add unit, which all rows of a task then read.

Tasks run panel by panel within a block of rows, so that a thread finds its rows of x in L2.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

from tvm import tirx
from tvm.tirx.script import builder as T  # noqa: N812

from ...formats import TILE
from ..base import Linear
from . import amx
from .activation import Rows
from .gemm import multiply_tile, tile_rows
from .gemv import add_group, few_rows_unit, num_digits
from .isa import Isa
from .operand import amx_rows, bf16_rows, digit_rows, float_rows
from .output import Output
from .units import Int8Dot, bf16_words, dot_bf16, multiply_add
from .vector import Buffer, Expr, Register, bind, ceildiv, i64, load, splat, store
from .weights import Weights

PANEL_BYTES = 256 * 1024  # of decoded weights: a part of L2, beside the rows of x
ROWS_BYTES = 1536 * 1024  # of rows of x in bfloat16: CPUs with AMX have 2 MB of L2


@dataclass(frozen=True)
class Panel(ABC):
    """The product with one multiply-add unit; a word of the panel holds `columns` columns of one row of W."""

    spec: Linear
    isa: Isa

    name: ClassVar[str]
    columns: ClassVar[int]
    fewest_rows: ClassVar[int]  # below this, a few rows at a time are faster than a panel (measured)

    def product(self, n: Expr, rows: Rows, weights: Weights, output: Output) -> None:
        x = self._prepare(n, rows)
        panels = -(-output.tiles // self._tiles)
        blocks = bind(ceildiv(n, self._rows_per_task))
        block_rows = bind((ceildiv(n, self._height) + blocks - 1) // blocks * self._height)  # of about the same size
        with T.parallel(blocks * panels) as task:
            first_row = bind(tirx.min(task // panels * block_rows, n))
            end_row = bind(tirx.min(first_row + block_rows, n))
            first_tile = task % panels * self._tiles
            # An odd last tile is computed twice, with the same result.
            tiles = [bind(tirx.min(first_tile + t, i64(output.tiles - 1))) for t in range(self._tiles)]
            panel = self._allocate()
            with T.serial(i64(-(-self.spec.in_features // self._depth))) as block:
                first_k = bind(block * self._depth)
                depth = bind(tirx.min(i64(self._depth), self.spec.in_features - first_k))
                for t, tile in enumerate(tiles):
                    self._decode(weights, panel, t, tile, first_k, depth)
                task_rows = _Task(x, panel, output, tiles, first_k, depth, end_row)
                self._for_each_block(first_row, end_row, lambda first, height: self._block(task_rows, first, height))

    def _for_each_block(self, first_row: Expr, end_row: Expr, body: Any) -> None:
        """body(first row, height): register tiles of full height, then a lower one for what is left."""
        height = self._height
        full = bind((end_row - first_row) // height)
        with T.serial(full) as block:
            body(first_row + block * height, height)
        left = bind(end_row - first_row - full * height)
        shorter = 0
        for rows in sorted({-(-height * i // 4) for i in range(1, 5)}):
            with T.If(tirx.And(left > shorter, left <= rows)), T.Then():
                body(first_row + full * height, rows)
            shorter = rows

    @cached_property
    def _tiles(self) -> int:
        return 2 if self.isa.registers_per_tile == 1 else 1

    @cached_property
    def _depth(self) -> int:
        """Columns of W (the k of the product) that are decoded at a time: a whole number of groups."""
        unit = self.spec.fmt.group or 32
        depth = PANEL_BYTES * self.columns // (4 * TILE * self._tiles)
        return min(self.spec.in_features, depth // unit * unit)

    @cached_property
    def _rows_per_task(self) -> int:
        return 256

    @cached_property
    def _height(self) -> int:
        """Rows of a register tile."""
        return tile_rows(self.isa, self._tiles * self.isa.registers_per_tile)

    @abstractmethod
    def _prepare(self, n: Expr, rows: Rows) -> Any: ...

    @abstractmethod
    def _allocate(self) -> Any: ...

    @abstractmethod
    def _decode(self, weights: Weights, panel: Any, t: int, tile: Expr, first_k: Expr, depth: Expr) -> None:
        """Columns first_k … first_k + depth of a tile."""

    @abstractmethod
    def _block(self, task: "_Task", first_row: Expr, height: int) -> None:
        """So many rows from first_row on, of which those past the task's end do not count, times the panel."""


class RegisterPanel(Panel):
    """Sums of a block of rows are in vector registers."""

    def _block(self, task: "_Task", first_row: Expr, height: int) -> None:
        """Rows past the end repeat the last one: the same value is stored again."""
        rows = [bind(tirx.min(first_row + r, task.end_row - 1)) for r in range(height)]
        sums = self._multiply(task, rows)
        targets = [
            (register, row, tile)
            for row, registers in zip(rows, sums, strict=True)
            for register, tile in zip(registers, task.tiles, strict=True)
        ]
        # Everything is read before anything is stored, because repeated rows and tiles are stored twice.
        with T.If(task.first_k == 0):
            with T.Then():
                for register, row, tile in targets:
                    register.set(task.output.finish(register.get(), row, tile))
            if self._depth < self.spec.in_features:
                with T.Else():
                    for register, row, tile in targets:
                        register.set(register.get() + task.output.partial(row, tile))
        for register, row, tile in targets:
            task.output.store(register.get(), row, tile)

    @abstractmethod
    def _multiply(self, task: "_Task", rows: Sequence[Expr]) -> list[list[Register]]: ...


@dataclass(frozen=True)
class _Task:
    """A part of the columns of some rows, times a panel."""

    x: Any
    panel: Any
    output: Output
    tiles: list[Expr]
    first_k: Expr
    depth: Expr
    end_row: Expr


class Float32Panel(RegisterPanel):
    name, columns, fewest_rows = "float32 multiply-add", 1, 24

    def _prepare(self, n: Expr, rows: Rows) -> Buffer:
        return float_rows(rows, n, self.spec.in_features).values

    def _allocate(self) -> Buffer:
        return T.alloc_buffer((i64(self._depth), i64(self._tiles * TILE)), "float32")

    def _decode(self, weights: Weights, panel: Buffer, t: int, tile: Expr, first_k: Expr, depth: Expr) -> None:
        if not self.spec.fmt.is_grouped:
            with T.serial(depth) as k:
                store(panel, weights.column(self.isa, tile, first_k + k), k, t * TILE)
            return
        with T.serial(depth // self.spec.fmt.group) as g:
            group = bind(first_k // self.spec.fmt.group + g)
            for column, value in weights.group_values(self.isa, tile, group):
                store(panel, value, g * self.spec.fmt.group + column, t * TILE)

    def _multiply(self, task: _Task, rows: Sequence[Expr]) -> list[list[Register]]:
        return multiply_tile(
            task.depth,
            [[splat(0.0, TILE) for _ in task.tiles] for _ in rows],
            lambda r, k: load(task.x, rows[r], task.first_k + k),
            lambda k, t: load(task.panel, k, t * TILE, lanes=TILE),
            multiply_add,
        )


class Bf16Panel(RegisterPanel):
    """Weights and activations rounded to bfloat16, sums in float32 (AVX512-BF16)."""

    name, columns, fewest_rows = "bfloat16 dot product", 2, 16

    def _prepare(self, n: Expr, rows: Rows) -> Buffer:
        return bf16_rows(rows, n, self.spec.in_features, self.isa)

    def _allocate(self) -> Buffer:
        return T.alloc_buffer((i64(self._depth // 2), i64(self._tiles * TILE)), "uint32")

    def _decode(self, weights: Weights, panel: Buffer, t: int, tile: Expr, first_k: Expr, depth: Expr) -> None:
        decode_bf16(self.isa, weights, panel, t, tile, first_k, depth)

    def _multiply(self, task: _Task, rows: Sequence[Expr]) -> list[list[Register]]:
        first = bind(task.first_k // 2)
        return multiply_tile(
            task.depth // 2,
            [[splat(0.0, TILE) for _ in task.tiles] for _ in rows],
            lambda r, k: load(task.x, rows[r], first + k),
            lambda k, t: load(task.panel, k, t * TILE, lanes=TILE),
            dot_bf16,
        )


def decode_bf16(isa: Isa, weights: Weights, panel: Buffer, t: int, tile: Expr, first_k: Expr, depth: Expr) -> None:
    """Columns first_k … first_k + depth of a tile as words of two bfloat16; panel (depth / 2, tiles * 16)."""
    fmt = weights.fmt
    if not fmt.is_grouped:
        with T.serial(depth // 2) as pair:
            store(panel, weights.bf16_pair(tile, first_k + pair * 2), pair, t * TILE)
        return
    with T.serial(depth // fmt.group) as g:
        values = weights.group_values(isa, tile, bind(first_k // fmt.group + g))
        for (column, low), (_, high) in zip(values, values, strict=True):  # neighbours, two at a time
            store(panel, bf16_words(low, high), g * (fmt.group // 2) + column // 2, t * TILE)


class Int8Panel(RegisterPanel):
    """Codes times the int8 digits of activations; scales once per group."""

    columns = 4

    @property
    def fewest_rows(self) -> int:  # type: ignore[override]
        return 12 if self.spec.fmt.int8_activations else 64

    @property
    def name(self) -> str:  # type: ignore[override]
        return few_rows_unit(self.spec.fmt, self.isa)

    @cached_property
    def _dot(self) -> Int8Dot:
        return Int8Dot(self.isa, self.spec.fmt)

    @cached_property
    def _height(self) -> int:
        if num_digits(self.spec.fmt, self.isa) > 1:
            return 3
        return 6 if self.isa.registers == 32 else 4

    def _prepare(self, n: Expr, rows: Rows) -> Any:
        return digit_rows(rows, n, self.spec.in_features, self.spec.fmt, self._dot, num_digits(self.spec.fmt, self.isa))

    def _allocate(self) -> dict[str, Buffer]:
        """codes: words of four bytes; scale, minimum: float32."""
        groups, width = i64(self._depth // self.spec.fmt.group), i64(self._tiles * TILE)
        parts = {
            "codes": T.alloc_buffer((i64(self._depth // 4), width), "uint32"),
            "scale": T.alloc_buffer((groups, width), "float32"),
        }
        if self.spec.fmt.has_minimum:
            parts["minimum"] = T.alloc_buffer((groups, width), "float32")
        return parts

    def _decode(
        self, weights: Weights, panel: dict[str, Buffer], t: int, tile: Expr, first_k: Expr, depth: Expr
    ) -> None:
        words = self.spec.fmt.group // 4
        with T.serial(depth // self.spec.fmt.group) as g:
            group = bind(first_k // self.spec.fmt.group + g)
            for i, codes in enumerate(weights.group_bytes(tile, group)):
                store(panel["codes"], codes, g * words + i, t * TILE)
            store(panel["scale"], weights.group_scale(self.isa, tile, group), g, t * TILE)
            if "minimum" in panel:
                store(panel["minimum"], weights.group_minimum(self.isa, tile, group), g, t * TILE)

    def _multiply(self, task: _Task, rows: Sequence[Expr]) -> list[list[Register]]:
        words, dot = self.spec.fmt.group // 4, self._dot
        first_group = bind(task.first_k // self.spec.fmt.group)
        columns = [t * TILE for t in range(self._tiles)]
        totals = [[Register(splat(0.0, TILE)) for _ in columns] for _ in rows]
        with T.serial(task.depth // self.spec.fmt.group) as g:
            group = bind(first_group + g)
            sums = [[[dot.start() for _ in task.x.digits] for _ in columns] for _ in rows]
            for i in range(words):
                codes = [bind(load(task.panel["codes"], g * words + i, column, lanes=TILE)) for column in columns]
                for row, of_row in zip(rows, sums, strict=True):
                    for place, digit in enumerate(task.x.digits):
                        x = bind(load(digit, row, group * words + i))
                        for of_column, column_codes in zip(of_row, codes, strict=True):
                            of_column[place] = dot.add(of_column[place], column_codes, x)
            for t, column in enumerate(columns):
                scale, minimum = (
                    bind(load(task.panel[part], g, column, lanes=TILE)) if part in task.panel else None
                    for part in ("scale", "minimum")
                )
                for r, row in enumerate(rows):
                    total = totals[r][t]
                    total.set(add_group(dot, task.x, total.get(), sums[r][t], row, group, scale, minimum))
        return totals


class AmxPanel(Panel):
    """Weights and activations rounded to bfloat16, whole tiles of both multiplied at a time."""

    name, columns = "AMX bfloat16 tiles", 2

    @property
    def fewest_rows(self) -> int:  # type: ignore[override]
        return 24 if self.spec.fmt.int8_activations else 8

    @staticmethod
    def fits(spec: Linear) -> bool:
        """Tiles have no ragged edges but the last rows; a product begins with the bias or with the residual."""
        has_both = spec.has_bias and spec.has_residual
        return spec.in_features % amx.COLUMNS == 0 and spec.out_features % TILE == 0 and not has_both

    @cached_property
    def _rows_per_task(self) -> int:
        """The product is so fast that decoding weights again for other rows would show: as many as fit into L2."""
        return max(amx.BLOCK_ROWS, ROWS_BYTES // (2 * self._depth) // amx.BLOCK_ROWS * amx.BLOCK_ROWS)

    @cached_property
    def _height(self) -> int:
        return amx.BLOCK_ROWS

    @cached_property
    def _depth(self) -> int:
        return super()._depth // amx.COLUMNS * amx.COLUMNS

    def _prepare(self, n: Expr, rows: Rows) -> Buffer:
        return amx_rows(rows, n, self.spec.in_features, self.isa)

    def _allocate(self) -> Buffer:
        return T.alloc_buffer((i64(self._depth // 2), i64(self._tiles * TILE)), "uint32")

    def _decode(self, weights: Weights, panel: Buffer, t: int, tile: Expr, first_k: Expr, depth: Expr) -> None:
        decode_bf16(self.isa, weights, panel, t, tile, first_k, depth)

    def _for_each_block(self, first_row: Expr, end_row: Expr, body: Any) -> None:
        full = bind((end_row - first_row) // self._height)
        with T.If(full > 0), T.Then(), amx.configured(i64(self._height)), T.serial(full) as block:
            body(first_row + block * self._height, self._height)
        left = bind(end_row - first_row - full * self._height)
        for fewest, height in ((1, amx.ROWS), (amx.ROWS + 1, self._height)):
            with T.If(tirx.And(left >= fewest, left <= height)), T.Then(), amx.configured(left):
                body(first_row + full * self._height, height)

    def _block(self, task: "_Task", first_row: Expr, height: int) -> None:
        def rows_of(i: int, k: Expr) -> amx.Tile:
            index = (first_row // amx.ROWS + i, task.first_k // amx.COLUMNS + k, i64(0), i64(0))
            return amx.Tile(task.x, index, 2 * amx.COLUMNS)

        def columns_of(k: Expr, j: int) -> amx.Tile:
            return amx.Tile(task.panel, (k * amx.ROWS, i64(j * TILE)), 4 * self._tiles * TILE)

        def cells_of(buffer: Buffer, i: int, j: int) -> amx.Tile:
            return amx.Tile(buffer, (first_row + i * amx.ROWS, task.tiles[j] * TILE), 4 * self.spec.out_features)

        def multiply(initial: Any) -> None:
            steps = task.depth // amx.COLUMNS
            amx.multiply_block(
                height // amx.ROWS, steps, rows_of, columns_of, initial, partial(cells_of, task.output.out)
            )

        output = task.output
        first = None
        if output.bias is not None:  # the same row for all: a stride of nothing
            first = lambda i, j: amx.Tile(output.bias, (task.tiles[j] * TILE,), 0)  # noqa: E731
        if output.residual is not None:
            first = partial(cells_of, output.residual)
        if self._depth == self.spec.in_features:
            multiply(first)
            return
        with T.If(task.first_k == 0):
            with T.Then():
                multiply(first)
            with T.Else():
                multiply(partial(cells_of, output.out))


def panel_for(spec: Linear, isa: Isa) -> Panel:
    """The product with the fastest unit that keeps the format's promise: f32 and f16 weights meet float32."""
    fmt = spec.fmt
    rounds = fmt.is_grouped or fmt.name == "bf16"
    if rounds and isa.has_amx_bf16 and AmxPanel.fits(spec):
        return AmxPanel(spec, isa)
    if fmt.int8_activations and isa.int8_dot:
        return Int8Panel(spec, isa)
    if rounds and isa.has_bf16_dot and spec.in_features % 2 == 0:
        return Bf16Panel(spec, isa)
    if fmt.is_grouped and isa.has_int8_dot and isa.lanes == TILE:
        return Int8Panel(spec, isa)
    return Float32Panel(spec, isa)
