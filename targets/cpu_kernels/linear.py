"""out (n, N) = x (n, K) @ W (N, K)^T [+ bias], W in any stored format, activations float32.

Two paths in one PrimFunc, chosen by n when it runs:
- few rows: each weight is decoded in registers and used for up to 4 rows; bound by decoding, or by memory.
- many rows: a panel of W is decoded to float32 once per block of rows, and a register-tiled product reads it from L2.
"""

from dataclasses import dataclass
from functools import partial, reduce
from operator import add

from tvm import tirx
from tvm.tirx.script import builder as T  # noqa: N812

from ...formats import TILE, WeightFormat
from .gemm import multiply_tile, tile_rows
from .isa import Isa
from .vector import (
    Buffer,
    Expr,
    Register,
    bind,
    ceildiv,
    i64,
    kernel,
    load,
    narrow,
    reduce_sum,
    splat,
    store,
    widen,
)
from .weights import Weights, field_scales, open_weights, weight_args

FEW_ROWS = 24  # below this, decoding each weight once for 4 rows costs less than writing a panel
PANEL_BYTES = 256 * 1024  # of decoded weights: a part of L2, beside the rows of x
ROWS_PER_TASK = 256


def linear(fmt: WeightFormat, out_features: int, in_features: int, isa: Isa, bias: bool = False) -> tirx.PrimFunc:
    """PrimFunc(x (n, K) f32, w, [scale], [minimum], [bias (N,) f32], out (n, N) f32)."""
    with kernel(f"linear_{fmt.name}") as k:
        n = k.symbol("n")
        x = k.arg("x", (n, in_features), "float32")
        stored = weight_args(k, fmt, out_features, in_features)
        bias_arg = k.arg("bias", (out_features,), "float32") if bias else None
        out = k.arg("out", (n, out_features), "float32")
        product = _Product(isa, n, out_features, in_features, x, open_weights(fmt, stored), bias_arg, out)
        with T.If(n < FEW_ROWS):
            with T.Then():
                product.few_rows()
            with T.Else():
                product.many_rows()
    return k.func


@dataclass(frozen=True)
class _Product:
    isa: Isa
    n: Expr
    out_features: int
    in_features: int
    x: Buffer
    weights: Weights
    bias: Buffer | None
    out: Buffer

    @property
    def fmt(self) -> WeightFormat:
        return self.weights.fmt

    @property
    def tiles(self) -> int:
        return -(-self.out_features // TILE)

    # Few rows --------------------------------------------------------------------------------------------------------

    def few_rows(self) -> None:
        x = self._prepare_activations()
        with T.parallel(i64(self.tiles)) as tile:
            with T.serial(self.n // 4) as four:  # a tile of W stays in L1 from one block of rows to the next
                self._rows_times_tile(x, [four * 4 + r for r in range(4)], tile)
            for count in (2, 1):
                with T.If(self.n % (2 * count) >= count), T.Then():
                    first = bind(self.n - self.n % (2 * count))
                    self._rows_times_tile(x, [first + r for r in range(count)], tile)

    def _prepare_activations(self) -> "_Activations":
        if not self.fmt.is_grouped:
            return _Activations(self.x, None)
        group_size = self.fmt.group
        scaled = T.alloc_buffer((i64(FEW_ROWS), i64(self.in_features)), "float32")
        sums = T.alloc_buffer((i64(FEW_ROWS), i64(self.in_features // group_size)), "float32")
        scales = field_scales(self.fmt)
        with T.serial(self.n) as row, T.serial(i64(self.in_features // group_size)) as group:
            total = splat(0.0, TILE)
            for at in range(0, group_size, TILE):
                x = bind(load(self.x, row, group * group_size + at, lanes=TILE))
                store(scaled, x * scales, row, group * group_size + at)
                total = total + x
            store(sums, reduce_sum(bind(total)), row, group)
        return _Activations(scaled, sums)

    def _rows_times_tile(self, x: "_Activations", rows: list[Expr], tile: Expr) -> None:
        times = self._grouped_rows_times_tile if self.fmt.is_grouped else self._float_rows_times_tile
        for row, total in zip(rows, times(x, rows, tile), strict=True):
            self._store(self._plus_bias(total, tile), row, tile)

    def _grouped_rows_times_tile(self, x: "_Activations", rows: list[Expr], tile: Expr) -> list[Expr]:
        """Per group: the sum of code * x less the zero point's part, then one multiplication by the scale."""
        group_size = self.fmt.group
        totals = [Register(splat(0.0, TILE)) for _ in rows]
        with T.serial(i64(self.in_features // group_size)) as group:
            sums = [_Chains(_chains(rows)) for _ in rows]
            for column, field in self.weights.group_fields(tile, group):
                for row, chains in zip(rows, sums, strict=True):
                    chains.add(field * splat(load(x.values, row, group * group_size + column), TILE))
            scale = self.weights.group_scale(self.isa, tile, group)
            minimum = self.weights.group_minimum(self.isa, tile, group) if self.fmt.has_minimum else None
            for row, total, chains in zip(rows, totals, sums, strict=True):
                x_sum = load(x.sums, row, group)
                centered = chains.total() - splat(x_sum * T.float32(self.fmt.zero_point), TILE)
                total.set(total.get() + scale * centered)
                if minimum is not None:
                    total.set(total.get() + minimum * splat(x_sum, TILE))
        return [total.get() for total in totals]

    def _float_rows_times_tile(self, x: "_Activations", rows: list[Expr], tile: Expr) -> list[Expr]:
        unroll = 8
        totals = [[Register(splat(0.0, TILE)) for _ in range(_chains(rows))] for _ in rows]

        def add_column(k: Expr, chain: int) -> None:
            weight = bind(self.weights.column(self.isa, tile, k))
            for row, registers in zip(rows, totals, strict=True):
                register = registers[chain % len(registers)]
                register.set(register.get() + weight * splat(load(x.values, row, k), TILE))

        with T.serial(i64(self.in_features // unroll)) as block:
            for column in range(unroll):
                self.weights.prefetch(tile, block * unroll + column)
                add_column(block * unroll + column, column)
        for k in range(self.in_features // unroll * unroll, self.in_features):
            add_column(i64(k), 0)
        return [reduce(add, [register.get() for register in registers]) for registers in totals]

    # Many rows -------------------------------------------------------------------------------------------------------

    @property
    def panel_tiles(self) -> int:
        return 2 if self.isa.registers_per_tile == 1 else 1

    @property
    def panel_depth(self) -> int:
        """Columns of W (the k of the product) that are decoded at a time: a whole number of groups."""
        unit = self.fmt.group or 1
        depth = PANEL_BYTES // (4 * TILE * self.panel_tiles)
        return min(self.in_features, depth // unit * unit)

    def many_rows(self) -> None:
        """Tasks run panel by panel within a block of rows, so that a thread finds its rows of x in L2."""
        panels = -(-self.tiles // self.panel_tiles)
        height = self._tile_rows
        blocks = bind(ceildiv(self.n, ROWS_PER_TASK))
        block_rows = bind((ceildiv(self.n, height) + blocks - 1) // blocks * height)  # blocks of about the same size
        with T.parallel(blocks * panels) as task:
            first_row = bind(tirx.min(task // panels * block_rows, self.n))
            end_row = bind(tirx.min(first_row + block_rows, self.n))
            first_tile = task % panels * self.panel_tiles
            # An odd last tile is computed twice, with the same result.
            tiles = [bind(tirx.min(first_tile + t, i64(self.tiles - 1))) for t in range(self.panel_tiles)]
            panel = T.alloc_buffer((i64(self.panel_depth), i64(self.panel_tiles * TILE)), "float32")
            with T.serial(i64(-(-self.in_features // self.panel_depth))) as block:
                first_k = bind(block * self.panel_depth)
                depth = bind(tirx.min(i64(self.panel_depth), self.in_features - first_k))
                for t, tile in enumerate(tiles):
                    self._decode(panel, t, tile, first_k, depth)
                self._rows_times_panel(panel, tiles, first_row, end_row, first_k, depth)

    def _decode(self, panel: Buffer, t: int, tile: Expr, first_k: Expr, depth: Expr) -> None:
        """Columns first_k … first_k + depth of a tile, as float32."""
        if not self.fmt.is_grouped:
            with T.serial(depth) as k:
                store(panel, self.weights.column(self.isa, tile, first_k + k), k, t * TILE)
            return
        with T.serial(depth // self.fmt.group) as g:
            group = bind(first_k // self.fmt.group + g)
            scale = self.weights.group_scale(self.isa, tile, group)
            minimum = self.weights.group_minimum(self.isa, tile, group) if self.fmt.has_minimum else None
            for column, code in self.weights.group_codes(tile, group):
                value = code * scale if minimum is None else code * scale + minimum
                store(panel, value, g * self.fmt.group + column, t * TILE)

    @property
    def _tile_rows(self) -> int:
        return tile_rows(self.isa, self.panel_tiles * self.isa.registers_per_tile)

    def _rows_times_panel(
        self, panel: Buffer, tiles: list[Expr], first_row: Expr, end_row: Expr, first_k: Expr, depth: Expr
    ) -> None:
        times = partial(self._rows_times_panel_tile, panel, tiles, first_k, depth)
        height = self._tile_rows
        full = bind((end_row - first_row) // height)
        with T.serial(full) as block:
            times(height, first_row + block * height, end_row)
        left = bind(end_row - first_row - full * height)
        shorter = 0
        for rows in sorted({-(-height * i // 4) for i in range(1, 5)}):
            with T.If(tirx.And(left > shorter, left <= rows)), T.Then():
                times(rows, first_row + full * height, end_row)
            shorter = rows

    def _rows_times_panel_tile(
        self, panel: Buffer, tiles: list[Expr], first_k: Expr, depth: Expr, rows: int, first_row: Expr, end_row: Expr
    ) -> None:
        """Rows past the end repeat the last one: the same value is stored again."""
        row_of = [bind(tirx.min(first_row + r, end_row - 1)) for r in range(rows)]
        sums = multiply_tile(
            depth,
            [[splat(0.0, TILE) for _ in tiles] for _ in range(rows)],
            lambda r, k: load(self.x, row_of[r], first_k + k),
            lambda k, t: load(panel, k, t * TILE, lanes=TILE),
        )
        targets = [
            (register, row, tile)
            for row, registers in zip(row_of, sums, strict=True)
            for register, tile in zip(registers, tiles, strict=True)
        ]
        # Everything is read before anything is stored, because repeated rows and tiles are stored twice.
        with T.If(first_k == 0):
            with T.Then():
                for register, _, tile in targets:
                    register.set(self._plus_bias(register.get(), tile))
            if self.panel_depth < self.in_features:
                with T.Else():
                    for register, row, tile in targets:
                        register.set(register.get() + self._columns(self.out, row, tile=tile))
        for register, row, tile in targets:
            self._store(register.get(), row, tile)

    # A tile of the output: the last one may be narrower than 16 columns ----------------------------------------------

    @property
    def _last_lanes(self) -> int:
        return self.out_features - (self.tiles - 1) * TILE

    def _plus_bias(self, value: Expr, tile: Expr) -> Expr:
        return value if self.bias is None else value + self._columns(self.bias, tile=tile)

    def _columns(self, buffer: Buffer, *row: Expr, tile: Expr) -> Expr:
        full = load(buffer, *row, tile * TILE, lanes=TILE)
        if self._last_lanes == TILE:
            return full
        last = widen(load(buffer, *row, tile * TILE, lanes=self._last_lanes), TILE)
        return T.if_then_else(tile == self.tiles - 1, last, full)

    def _store(self, value: Expr, row: Expr, tile: Expr) -> None:
        if self._last_lanes == TILE:
            store(self.out, value, row, tile * TILE)
            return
        with T.If(tile == self.tiles - 1):
            with T.Then():
                store(self.out, narrow(value, self._last_lanes), row, tile * TILE)
            with T.Else():
                store(self.out, value, row, tile * TILE)


@dataclass(frozen=True)
class _Activations:
    """What few rows are multiplied with."""

    values: Buffer  # x, for grouped formats times the scales of the codes' fields
    sums: Buffer | None  # (rows, K / group): x summed over each group, for zero points and minima


class _Chains:
    """A sum in several independent chains, which hide the latency of the additions."""

    def __init__(self, count: int) -> None:
        self.partial: list[Expr] = []
        self.count = count
        self.next = 0

    def add(self, term: Expr) -> None:
        if len(self.partial) < self.count:
            self.partial.append(bind(term))
        else:
            self.partial[self.next] = bind(self.partial[self.next] + term)
            self.next = (self.next + 1) % self.count

    def total(self) -> Expr:
        return reduce(add, self.partial)


def _chains(rows: list[Expr]) -> int:
    """Chains per row, so that a block of rows has at least 4 in all."""
    return max(1, 4 // len(rows))
