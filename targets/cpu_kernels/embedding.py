"""Rows of a stored weight matrix, decoded to float32: the embedding table, which tied models share with the lm head."""

from tvm import tirx
from tvm.tirx.script import builder as T  # noqa: N812

from ...formats import TILE, WeightFormat
from .isa import Isa
from .vector import Buffer, Expr, bind, for_each_block, i64, kernel, load, parallel_for, splat, store, to_f32, view
from .weights import Weights, open_weights, weight_args


def embedding(fmt: WeightFormat, vocab: int, hidden: int, isa: Isa) -> tirx.PrimFunc:
    """PrimFunc(ids (n,) int32, w, [scale], [minimum], out (n, hidden) f32): out[t] = row ids[t] of the table."""
    with kernel(f"embedding_{fmt.name}") as k:
        n = k.symbol("n")
        ids = k.arg("ids", (n,), "int32")
        stored = weight_args(k, fmt, vocab, hidden)
        out = k.arg("out", (n, hidden), "float32")
        table = open_weights(fmt, stored)

        def copy_row(t: Expr) -> None:
            row = bind(i64(load(ids, t)))
            copy = _copy_grouped_row if fmt.is_grouped else _copy_float_row
            copy(isa, table, row // TILE, row % TILE, out, t)

        parallel_for(n, copy_row)
    return k.func


def _copy_float_row(isa: Isa, table: Weights, tile: Expr, lane: Expr, out: Buffer, t: Expr) -> None:
    tiles, hidden, _ = (int(extent) for extent in table.w.ty.shape)
    flat = view(table.w, (tiles * hidden * TILE,), str(table.w.ty.dtype))

    def gather(k: Expr, lanes: int) -> None:
        first = (tile * hidden + k) * TILE + lane
        row = tirx.BufferLoad(flat, [T.ramp(first, i64(TILE), lanes) if lanes > 1 else first])
        store(out, to_f32(isa, row), t, k)

    for_each_block(hidden, 16, gather)


def _copy_grouped_row(isa: Isa, table: Weights, tile: Expr, lane: Expr, out: Buffer, t: Expr) -> None:
    """A 32-bit word holds the codes of 4 or 8 columns; those of 4 neighbours are 8 bits apart."""
    fmt = table.fmt
    words = fmt.group * fmt.bits // 32
    with T.serial(i64(int(out.ty.shape[1]) // fmt.group)) as group:
        scale = _lane_of(isa, table.scale, tile, group, lane)
        for word in range(words):
            bits = splat(bind(load(table.w, tile, group * words + word, lane)), 4)
            for half in range(8 // fmt.bits):
                shifts = T.ramp(T.uint32(4 * half), T.uint32(8), 4)
                field = (bits >> shifts) & splat(T.uint32((1 << fmt.bits) - 1), 4)
                code = T.cast(T.reinterpret("int32x4", field), "float32x4") - splat(float(fmt.zero_point), 4)
                value = code * scale
                if fmt.has_minimum:
                    value = value + _lane_of(isa, table.minimum, tile, group, lane)
                store(out, value, t, group * fmt.group + (word * (8 // fmt.bits) + half) * 4)


def _lane_of(isa: Isa, part: Buffer, tile: Expr, group: Expr, lane: Expr) -> Expr:
    return bind(splat(to_f32(isa, load(part, tile, group, lane)), 4))
