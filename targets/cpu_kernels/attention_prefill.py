"""Attention of many query rows: keys (transposed) and values of a block are staged in cache, and two register-tiled
products compute scores and outputs for all rows, with the unit that suits the cache's precision."""

from functools import partial
from typing import ClassVar

from tvm import tirx
from tvm.tirx.script import builder as T  # noqa: N812

from . import amx
from .attention_parts import LOWEST, Segment
from .gemm import multiply_tile
from .units import dot_bf16, multiply_add
from .vector import (
    Buffer,
    Expr,
    Register,
    bf16_words,
    bind,
    ceildiv,
    exp,
    i64,
    load,
    reduce_max,
    reduce_sum,
    shuffle,
    splat,
    store,
    store_f32,
    transpose,
    view,
)


class Prefill:
    """Several tokens of a sequence; row r is token start + r // group, query head r % group of the kv head.

    In float32. A word of q and of the weights holds `columns` neighbours, one of keys and values as many rows.
    """

    key_block: ClassVar[int] = 64  # keys staged at a time
    columns: ClassVar[int] = 1

    def __init__(self, segment: Segment, start: Expr, end: Expr) -> None:
        self.segment, self.shape, self.cache = segment, segment.shape, segment.cache
        self.start = start
        self.rows = bind((end - start) * self.shape.group)
        self.first, self.end = segment.key_range(start, end - 1)

    @staticmethod
    def unit(total: Expr, column: Expr, element: Expr) -> Expr:
        return multiply_add(total, column, element)

    def attend(self) -> None:
        self._allocate()
        with T.serial(self.rows) as row:
            self._start_row(row)
        with T.If(self.first < self.end), T.Then():
            aligned = bind(self.first // self.shape.lanes * self.shape.lanes)
            with T.serial(ceildiv(self.end - aligned, self.key_block)) as block:
                self._attend_to(bind(aligned + block * self.key_block))
        with T.serial(self.rows) as row:
            token, head = self._token(row), bind(self.segment.query_head(row % self.shape.group))
            top, total = bind(load(self.tops, row)), bind(load(self.totals, row))
            self.segment.output.write(self.segment.split, token, head, top, total, partial(load, self.outputs, row))

    def _allocate(self) -> None:
        rows, head_dim, keys = self.shape.block_rows, self.shape.head_dim, self.key_block
        self.q = _scratch(rows, head_dim)
        self.keys = _scratch(head_dim, keys)
        self.values = _scratch(keys, head_dim)
        self.scores = self.weights = _scratch(rows, keys)
        self.outputs = _scratch(rows, head_dim)
        vectors = -(-rows // self.shape.lanes) * self.shape.lanes
        self.tops, self.totals, self.shrinks, self.sums = (_scratch(vectors) for _ in range(4))
        self.lasts, self.lowests = _scratch(vectors, "int32"), _scratch(vectors, "int32")

    def _token(self, row: Expr) -> Expr:
        return bind(self.start + row // self.shape.group)

    def _start_row(self, row: Expr) -> None:
        lanes, token = self.shape.lanes, self._token(row)
        head = bind(self.segment.query_head(row % self.shape.group))
        with T.serial(i64(self.shape.vectors)) as v:
            query = load(self.segment.q, token, head, v * lanes, lanes=lanes)
            self._store_row(self.q, query * splat(self.shape.scale, lanes), row, v * lanes)
            store(self.outputs, splat(0.0, lanes), row, v * lanes)
        store(self.tops, T.float32(LOWEST), row)
        store(self.totals, T.float32(0.0), row)
        last = tirx.min(i64(load(self.segment.positions, token)), self.end - 1)
        store(self.lasts, T.cast(last, "int32"), row)
        lowest = tirx.max(self.segment.first_visible(token), self.first)
        store(self.lowests, T.cast(lowest, "int32"), row)

    def _store_row(self, buffer: Buffer, value: Expr, row: Expr, column: Expr) -> None:
        """A part of a row of q or of the weights."""
        store(buffer, value, row, column)

    def _attend_to(self, first: Expr) -> None:
        """One block of keys. Rows of the last register tile that do not exist hold anything and are never read."""
        lanes, tile_rows = self.shape.lanes, self.shape.tile_rows
        with T.serial(i64(self.key_block // lanes)) as group:
            self._stage_keys(first, bind(group * lanes))
        self._stage_values(first)
        tiles = ceildiv(self.rows, tile_rows)
        with T.serial(tiles) as tile, T.serial(i64(self.key_block // (2 * lanes))) as pair:
            self._score(bind(tile * tile_rows), bind(pair * (2 * lanes)))
        self._exponentiate(first)
        with T.serial(tiles) as tile:
            with T.serial(i64(self.shape.vectors // 2)) as pair:
                self._add_values(bind(tile * tile_rows), [bind((pair * 2 + c) * lanes) for c in range(2)])
            if self.shape.vectors % 2:
                self._add_values(bind(tile * tile_rows), [i64(self.shape.head_dim - lanes)])

    def _stage_keys(self, first: Expr, at: Expr) -> None:
        """keys[d, at + i] = key first + at + i; what lies past the end is masked later."""
        lanes = self.shape.lanes
        cells = self.cache.keys(self.segment.seq, self.segment.head, first + at, self.end, lanes)
        with T.serial(i64(self.shape.vectors)) as v:
            for d, row in enumerate(transpose([self.cache.load(cell + v * lanes) for cell in cells])):
                store(self.keys, row, v * lanes + d, at)

    def _stage_values(self, first: Expr) -> None:
        """values[i] = value first + i; zeros past the end, since the page may hold anything there."""
        lanes, run = self.shape.lanes, self.cache.run
        with T.serial(i64(self.key_block // run)) as group:
            at = bind(group * run)
            present = bind(tirx.max(tirx.min(self.end - first - at, i64(run)), i64(0)))
            with T.If(present > 0), T.Then():
                cell = bind(self.cache.key(self.segment.seq, self.segment.head, first + at) + self.cache.to_values)
                with T.serial(present) as i, T.serial(i64(self.shape.vectors)) as v:
                    store(self.values, self.cache.load(cell + i * self.shape.head_dim + v * lanes), at + i, v * lanes)
            with T.serial(present, i64(run)) as i, T.serial(i64(self.shape.vectors)) as v:
                store(self.values, splat(0.0, lanes), at + i, v * lanes)

    def _score(self, row: Expr, column: Expr) -> None:
        """scores[row + r, column …] = q[row + r] . keys, for a register tile."""
        lanes = self.shape.lanes
        sums = multiply_tile(
            i64(self.shape.head_dim // self.columns),
            [[splat(0.0, lanes)] * 2 for _ in range(self.shape.tile_rows)],
            lambda r, k: load(self.q, row + r, k),
            lambda k, c: load(self.keys, k, column + c * lanes, lanes=lanes),
            self.unit,
        )
        for r, registers in enumerate(sums):
            for c, register in enumerate(registers):
                store(self.scores, register.get(), row + r, column + c * lanes)

    def _exponentiate(self, first: Expr) -> None:
        """scores -> weights exp(score - top), 0 for keys that the row's token does not see; tops, totals and shrinks.

        What is one number per row is computed for a vector of rows at a time.
        """
        lanes = self.shape.lanes
        groups = ceildiv(self.rows, lanes)
        with T.serial(self.rows) as row:
            top = Register(splat(LOWEST, lanes))
            for v in range(self.key_block // lanes):
                score = load(self.scores, row, v * lanes, lanes=lanes)
                top.set(tirx.max(top.get(), T.Select(self._visible(row, first, v), score, splat(LOWEST, lanes))))
            store(self.sums, reduce_max(top.get()), row)
        with T.serial(groups) as group:
            old = bind(load(self.tops, group * lanes, lanes=lanes))
            new = bind(tirx.max(old, load(self.sums, group * lanes, lanes=lanes)))
            store(self.tops, new, group * lanes)
            store(self.shrinks, exp(old - new), group * lanes)
        with T.serial(self.rows) as row:
            top, total = bind(splat(load(self.tops, row), lanes)), splat(0.0, lanes)
            for v in range(self.key_block // lanes):
                weight = exp(load(self.scores, row, v * lanes, lanes=lanes) - top)
                weight = bind(T.Select(self._visible(row, first, v), weight, splat(0.0, lanes)))
                self._store_row(self.weights, weight, row, i64(v * lanes))
                total = bind(total + weight)
            store(self.sums, reduce_sum(total), row)
            self._shrink(row)
        with T.serial(groups) as group:
            old, shrink = (load(buffer, group * lanes, lanes=lanes) for buffer in (self.totals, self.shrinks))
            store(self.totals, old * shrink + load(self.sums, group * lanes, lanes=lanes), group * lanes)

    def _visible(self, row: Expr, first: Expr, v: int) -> Expr:
        lanes = self.shape.lanes
        key = T.ramp(T.cast(first + v * lanes, "int32"), T.int32(1), lanes)
        seen = key <= splat(load(self.lasts, row), lanes)
        if not self.shape.window:  # splits begin at a multiple of the vector length
            return seen
        return tirx.And(seen, key >= splat(load(self.lowests, row), lanes))

    def _shrink(self, row: Expr) -> None:
        """Where `_add_values` does not multiply a row's outputs so far with its factor."""

    def _add_values(self, row: Expr, columns: list[Expr]) -> None:
        """outputs[row + r] = outputs[row + r] * shrink + weights[row + r] . values, for a register tile."""
        lanes, rows = self.shape.lanes, range(self.shape.tile_rows)

        def shrunk(r: int, column: Expr) -> Expr:
            return load(self.outputs, row + r, column, lanes=lanes) * splat(load(self.shrinks, row + r), lanes)

        sums = multiply_tile(
            i64(self.key_block // self.columns),
            [[shrunk(r, column) for column in columns] for r in rows],
            lambda r, k: load(self.weights, row + r, k),
            lambda k, c: load(self.values, k, columns[c], lanes=lanes),
            self.unit,
        )
        for r, registers in enumerate(sums):
            for column, register in zip(columns, registers, strict=True):
                store(self.outputs, register.get(), row + r, column)


class Bf16Prefill(Prefill):
    """q, keys, weights and values rounded to bfloat16; sums in float32."""

    columns = 2
    key_block = 128

    @staticmethod
    def unit(total: Expr, column: Expr, element: Expr) -> Expr:
        return dot_bf16(total, column, element)

    def _allocate(self) -> None:
        super()._allocate()
        rows, head_dim, keys = self.shape.block_rows, self.shape.head_dim, self.key_block
        self.q_rows, self.weight_rows = _scratch(rows, head_dim, "uint16"), _scratch(rows, keys, "uint16")
        self.q = view(self.q_rows, (rows, head_dim // 2), "uint32")
        self.weights = view(self.weight_rows, (rows, keys // 2), "uint32")
        self.keys = _scratch(head_dim // 2, keys, "uint32")
        self.values = _scratch(keys // 2, head_dim, "uint32")

    def _store_row(self, buffer: Buffer, value: Expr, row: Expr, column: Expr) -> None:
        rows = self.q_rows if buffer is self.q else self.weight_rows
        store_f32(self.shape.isa, rows, value, row, column)

    def _stage_keys(self, first: Expr, at: Expr) -> None:
        """keys[w, at + i] = word w of key first + at + i."""
        lanes = self.shape.lanes
        cells = self.cache.keys(self.segment.seq, self.segment.head, first + at, self.end, lanes)
        with T.serial(i64(self.shape.head_dim // (2 * lanes))) as v:
            for d, row in enumerate(transpose([self._words(cell + v * (2 * lanes)) for cell in cells])):
                store(self.keys, row, v * lanes + d, at)

    def _words(self, cell: Expr) -> Expr:
        """Two vectors of neighbours as one of words."""
        lanes = self.shape.lanes
        if str(self.cache.cells.ty.dtype) == "uint16":
            return bind(T.reinterpret(f"uint32x{lanes}", load(self.cache.cells, cell, lanes=2 * lanes)))
        halves = [self.cache.load(cell + i * lanes) for i in range(2)]
        even, odd = (bind(shuffle(halves, range(i, 2 * lanes, 2))) for i in range(2))
        return bind(bf16_words(even, odd))

    def _stage_values(self, first: Expr) -> None:
        """Word i of a column: values first + 2 * i and first + 2 * i + 1; zeros past the end."""
        lanes = self.shape.lanes
        with T.serial(i64(self.key_block // lanes)) as group:
            at = bind(group * lanes)
            cells = self.cache.keys(self.segment.seq, self.segment.head, first + at, self.end, lanes)
            exists = [bind(first + at + i < self.end) for i in range(lanes)]
            with T.serial(i64(self.shape.vectors)) as v:

                def value(i: int, v: Expr = v) -> Expr:
                    found = self.cache.load(cells[i] + (self.cache.to_values + v * lanes))
                    return T.Select(splat(exists[i], lanes), found, splat(0.0, lanes))

                for i in range(0, lanes, 2):
                    store(self.values, bf16_words(value(i), value(i + 1)), at // 2 + i // 2, v * lanes)


class AmxPrefill(Bf16Prefill):
    """Products of whole tiles: 32 rows of q by 32 keys, 32 rows of weights by 32 columns of values."""

    def attend(self) -> None:
        with amx.configured(i64(amx.BLOCK_ROWS)):
            super().attend()

    def _score(self, row: Expr, column: Expr) -> None:
        keys = 4 * self.key_block
        amx.multiply_block(
            2,
            i64(self.shape.head_dim // amx.COLUMNS),
            lambda i, k: amx.Tile(self.q, (row + i * amx.ROWS, k * amx.ROWS), 2 * self.shape.head_dim),
            lambda k, j: amx.Tile(self.keys, (k * amx.ROWS, column + j * amx.ROWS), keys),
            None,
            lambda i, j: amx.Tile(self.scores, (row + i * amx.ROWS, column + j * amx.ROWS), keys),
        )

    def _shrink(self, row: Expr) -> None:
        lanes, factor = self.shape.lanes, bind(load(self.shrinks, row))
        with T.serial(i64(self.shape.vectors)) as v:
            shrunk = load(self.outputs, row, v * lanes, lanes=lanes) * splat(factor, lanes)
            store(self.outputs, shrunk, row, v * lanes)

    def _add_values(self, row: Expr, columns: list[Expr]) -> None:
        def outputs(i: int, j: int) -> amx.Tile:
            return amx.Tile(self.outputs, (row + i * amx.ROWS, columns[j]), 4 * self.shape.head_dim)

        amx.multiply_block(
            2,
            i64(self.key_block // amx.COLUMNS),
            lambda i, k: amx.Tile(self.weights, (row + i * amx.ROWS, k * amx.ROWS), 2 * self.key_block),
            lambda k, j: amx.Tile(self.values, (k * amx.ROWS, columns[j]), 4 * self.shape.head_dim),
            outputs,
            outputs,
        )


def prefill_for(segment: Segment, start: Expr, end: Expr) -> Prefill:
    return _KINDS[segment.shape.unit](segment, start, end)


_KINDS = {"float32": Prefill, "bf16": Bf16Prefill, "amx": AmxPrefill}


def _scratch(*shape: int | str) -> Buffer:
    dtype = shape[-1] if isinstance(shape[-1], str) else "float32"
    return T.alloc_buffer([i64(extent) for extent in shape if isinstance(extent, int)], dtype)
