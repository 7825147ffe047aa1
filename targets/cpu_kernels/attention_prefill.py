"""Attention of many query rows: keys (transposed) and values of a block are staged in cache, and two register-tiled
products compute scores and outputs for all rows, with the unit that suits the cache's precision."""

from collections.abc import Callable
from functools import partial
from typing import ClassVar

from tvm import tirx
from tvm.tirx.script import builder as T  # noqa: N812

from . import amx
from .attention_parts import LOWEST, Segment
from .gemm import multiply_tile
from .units import bf16_words, dot_bf16, multiply_add, store_bf16
from .vector import (
    Buffer,
    Expr,
    Register,
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
    transpose,
    view,
)


class Prefill:
    """Several tokens of a sequence; row r is token start + r // group, query head r % group of the kv head.

    In float32. A word of q and of the weights holds `columns` neighbours, one of keys and values as many rows.
    Rows are taken one register tile after the other, so that a tile's scores stay in L1. Rows of the last tile that do
    not exist hold anything and are never read.
    """

    key_block: ClassVar[int] = 64  # keys staged at a time
    columns: ClassVar[int] = 1

    def __init__(self, segment: Segment, start: Expr, end: Expr) -> None:
        self.segment, self.shape, self.cache = segment, segment.shape, segment.cache
        self.start = start
        self.rows = bind((end - start) * self.shape.group)
        self.has_tree = bind(segment.is_in_tree(end - 1))
        self.first, self.end = segment.key_range(segment.first_seen(start, end - 1), end - 1)

    @staticmethod
    def unit(total: Expr, column: Expr, element: Expr) -> Expr:
        return multiply_add(total, column, element)

    def attend(self) -> None:
        self._allocate()
        self._for_each_row(self._start_row)
        with T.If(self.first < self.end), T.Then():
            aligned = bind(self.first // self.shape.lanes * self.shape.lanes)
            with T.serial(ceildiv(self.end - aligned, self.key_block)) as block:
                self._attend_to(bind(aligned + block * self.key_block))
        self._for_each_row(self._write_row)

    def _allocate(self) -> None:
        tile_rows, head_dim, keys = self.shape.tile_rows, self.shape.head_dim, self.key_block
        self.q = _scratch(self.shape.block_rows, head_dim)
        self.keys = _scratch(head_dim, keys)
        self.values = _scratch(keys, head_dim)
        self.scores = self.weights = _scratch(tile_rows, keys)  # of one tile
        self.outputs = _scratch(self.shape.block_rows, head_dim)
        # One number a row, in whole vectors for each tile.
        tiles, vectors = self.shape.block_rows // tile_rows, -(-tile_rows // self.shape.lanes) * self.shape.lanes
        self.tops, self.totals, self.shrinks, self.sums = (_scratch(tiles, vectors) for _ in range(4))
        self.lasts, self.lowests = _scratch(tiles, vectors, "int32"), _scratch(tiles, vectors, "int32")

    def _for_each_row(self, body: Callable[[Expr, Expr], None]) -> None:
        """body(tile, row within the tile)."""
        with T.serial(self._num_tiles()) as tile, T.serial(self._rows_of(tile)) as r:
            body(tile, r)

    def _num_tiles(self) -> Expr:
        return bind(ceildiv(self.rows, self.shape.tile_rows))

    def _rows_of(self, tile: Expr) -> Expr:
        return bind(tirx.min(self.rows - tile * self.shape.tile_rows, i64(self.shape.tile_rows)))

    def _row(self, tile: Expr, r: Expr) -> tuple[Expr, Expr, Expr]:
        """(row, its token, its query head)."""
        row = bind(tile * self.shape.tile_rows + r)
        return row, bind(self.start + row // self.shape.group), bind(self.segment.query_head(row % self.shape.group))

    def _start_row(self, tile: Expr, r: Expr) -> None:
        lanes = self.shape.lanes
        row, token, head = self._row(tile, r)
        with T.serial(i64(self.shape.vectors)) as v:
            query = load(self.segment.q, token, head, v * lanes, lanes=lanes)
            self._store_row(self.q, query * splat(self.shape.scale, lanes), row, v * lanes)
            store(self.outputs, splat(0.0, lanes), row, v * lanes)
        store(self.tops, T.float32(LOWEST), tile, r)
        store(self.totals, T.float32(0.0), tile, r)
        last = tirx.min(self.segment.last_visible(token), self.end - 1)
        store(self.lasts, T.cast(last, "int32"), tile, r)
        lowest = tirx.max(self.segment.first_visible(token), self.first)
        store(self.lowests, T.cast(lowest, "int32"), tile, r)

    def _write_row(self, tile: Expr, r: Expr) -> None:
        row, token, head = self._row(tile, r)
        top, total = bind(load(self.tops, tile, r)), bind(load(self.totals, tile, r))
        self.segment.output.write(self.segment.split, token, head, top, total, partial(load, self.outputs, row))

    def _store_row(self, buffer: Buffer, value: Expr, row: Expr, column: Expr) -> None:
        """A part of a row of q or of the weights."""
        store(buffer, value, row, column)

    def _attend_to(self, first: Expr) -> None:
        """One block of keys."""
        lanes, head_dim = self.shape.lanes, self.shape.head_dim
        with T.serial(i64(self.key_block // lanes)) as group:
            self._stage_keys(first, bind(group * lanes))
        self._stage_values(first)
        with T.serial(self._num_tiles()) as tile:
            row, pairs = bind(tile * self.shape.tile_rows), self._seen_pairs(tile, first)
            with T.serial(pairs) as pair:
                self._score(row, bind(pair * (2 * lanes)))
            self._exponentiate(tile, first, pairs)
            with T.serial(i64(self.shape.vectors // 2)) as pair:
                self._add_values(tile, row, [bind((pair * 2 + c) * lanes) for c in range(2)], pairs)
            if self.shape.vectors % 2:
                self._add_values(tile, row, [i64(head_dim - lanes)], pairs)

    def _seen_pairs(self, tile: Expr, first: Expr) -> Expr:
        """Pairs of vectors of keys up to the last key of the block that a tile sees: positions ascend without trees."""
        last = i64(load(self.lasts, tile, self._rows_of(tile) - 1))
        last = T.Select(self.has_tree, self.end - 1, last)
        num_keys = tirx.max(tirx.min(last + 1 - first, i64(self.key_block)), i64(0))
        return bind(ceildiv(num_keys, 2 * self.shape.lanes))

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
        """scores[r, column …] = q[row + r] . keys, for a tile."""
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
                store(self.scores, register.get(), r, column + c * lanes)

    def _exponentiate(self, tile: Expr, first: Expr, pairs: Expr) -> None:
        """scores -> weights exp(score - top), 0 for keys that the row does not see; tops, totals and shrinks."""
        with T.If(tirx.And(self.has_tree, first + self.key_block > self.segment.base)):
            with T.Then():
                self._exponentiate_seen(tile, first, pairs, self._visible_on_branch)
            with T.Else():
                self._exponentiate_seen(tile, first, pairs, self._visible)

    def _exponentiate_seen(
        self, tile: Expr, first: Expr, pairs: Expr, visible: Callable[[Expr, Expr, Expr], Expr]
    ) -> None:
        """What is one number per row is computed for a vector of rows at a time."""
        lanes = self.shape.lanes
        groups = [group * lanes for group in range(int(self.tops.ty.shape[1]) // lanes)]
        with T.serial(self._rows_of(tile)) as r:
            top = Register(splat(LOWEST, lanes))
            with T.serial(pairs) as pair:
                for at in (pair * (2 * lanes), pair * (2 * lanes) + lanes):
                    score = load(self.scores, r, at, lanes=lanes)
                    seen = visible(tile, r, first + at)
                    top.set(tirx.max(top.get(), T.Select(seen, score, splat(LOWEST, lanes))))
            store(self.sums, reduce_max(top.get()), tile, r)
        for group in groups:
            old = bind(load(self.tops, tile, group, lanes=lanes))
            new = bind(tirx.max(old, load(self.sums, tile, group, lanes=lanes)))
            store(self.tops, new, tile, group)
            store(self.shrinks, exp(self.shape.isa, old - new), tile, group)
        with T.serial(self._rows_of(tile)) as r:
            row_top, total = bind(splat(load(self.tops, tile, r), lanes)), Register(splat(0.0, lanes))
            with T.serial(pairs) as pair:
                for at in (pair * (2 * lanes), pair * (2 * lanes) + lanes):
                    weight = exp(self.shape.isa, load(self.scores, r, at, lanes=lanes) - row_top)
                    weight = bind(T.Select(visible(tile, r, first + at), weight, splat(0.0, lanes)))
                    self._store_row(self.weights, weight, r, at)
                    total.set(total.get() + weight)
            store(self.sums, reduce_sum(total.get()), tile, r)
            self._shrink(tile, r)
        for group in groups:
            old, shrink = (load(buffer, tile, group, lanes=lanes) for buffer in (self.totals, self.shrinks))
            store(self.totals, old * shrink + load(self.sums, tile, group, lanes=lanes), tile, group)

    def _visible(self, tile: Expr, r: Expr, key: Expr) -> Expr:
        """Of a vector of keys, those that a row's token sees."""
        lanes = self.shape.lanes
        keys = T.ramp(T.cast(key, "int32"), T.int32(1), lanes)
        seen = keys <= splat(load(self.lasts, tile, r), lanes)
        if not self.shape.window:  # splits begin at a multiple of the vector length
            return seen
        return tirx.And(seen, keys >= splat(load(self.lowests, tile, r), lanes))

    def _visible_on_branch(self, tile: Expr, r: Expr, key: Expr) -> Expr:
        _, token, _ = self._row(tile, r)
        branch = self.segment.branch(token)
        return tirx.And(self._visible(tile, r, key), self.segment.on_branch(branch, key))

    def _shrink(self, tile: Expr, r: Expr) -> None:
        """Where `_add_values` does not multiply a row's outputs so far with its factor."""

    def _add_values(self, tile: Expr, row: Expr, columns: list[Expr], pairs: Expr) -> None:
        """outputs[row + r] = outputs[row + r] * shrink + weights[r] . values, for a tile."""
        lanes, rows = self.shape.lanes, range(self.shape.tile_rows)

        def shrunk(r: int, column: Expr) -> Expr:
            return load(self.outputs, row + r, column, lanes=lanes) * splat(load(self.shrinks, tile, r), lanes)

        sums = multiply_tile(
            pairs * (2 * lanes // self.columns),
            [[shrunk(r, column) for column in columns] for r in rows],
            lambda r, k: load(self.weights, r, k),
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
        rows, tile_rows = self.shape.block_rows, self.shape.tile_rows
        head_dim, keys = self.shape.head_dim, self.key_block
        self.q_rows, self.weight_rows = _scratch(rows, head_dim, "uint16"), _scratch(tile_rows, keys, "uint16")
        self.q = view(self.q_rows, (rows, head_dim // 2), "uint32")
        self.weights = view(self.weight_rows, (tile_rows, keys // 2), "uint32")
        self.keys = _scratch(head_dim // 2, keys, "uint32")
        self.values = _scratch(keys // 2, head_dim, "uint32")

    def _store_row(self, buffer: Buffer, value: Expr, row: Expr, column: Expr) -> None:
        rows = self.q_rows if buffer is self.q else self.weight_rows
        store_bf16(self.shape.isa, rows, value, row, column)

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
            lambda i, j: amx.Tile(self.scores, (i64(i * amx.ROWS), column + j * amx.ROWS), keys),
        )

    def _shrink(self, tile: Expr, r: Expr) -> None:
        lanes, factor = self.shape.lanes, bind(load(self.shrinks, tile, r))
        row = bind(tile * self.shape.tile_rows + r)
        with T.serial(i64(self.shape.vectors)) as v:
            shrunk = load(self.outputs, row, v * lanes, lanes=lanes) * splat(factor, lanes)
            store(self.outputs, shrunk, row, v * lanes)

    def _add_values(self, tile: Expr, row: Expr, columns: list[Expr], pairs: Expr) -> None:
        def outputs(i: int, j: int) -> amx.Tile:
            return amx.Tile(self.outputs, (row + i * amx.ROWS, columns[j]), 4 * self.shape.head_dim)

        amx.multiply_block(
            2,
            pairs,  # a vector has 16 lanes, a pair as many as one tile's columns
            lambda i, k: amx.Tile(self.weights, (i64(i * amx.ROWS), k * amx.ROWS), 2 * self.key_block),
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
