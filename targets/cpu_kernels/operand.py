"""The left operand of a product: rows of activations, prepared once, in the form that weights are multiplied with."""

from dataclasses import dataclass
from functools import reduce

from tvm import tirx
from tvm.tirx.script import builder as T  # noqa: N812

from ...formats import TILE, WeightFormat
from . import amx
from .activation import Rows
from .isa import Isa
from .units import Int8Dot, store_bf16
from .vector import (
    Buffer,
    Expr,
    bind,
    for_each_block,
    i64,
    parallel_for,
    reduce_max,
    reduce_sum,
    round_to_int32,
    splat,
    store,
    view,
)
from .weights import field_scales

DIGIT = 254  # the base: what rounding leaves, at most a half, is at most 127 of the next place
DIGITS = 3


@dataclass(frozen=True)
class FloatRows:
    """Few rows against a grouped format: x times the scales of the codes' fields, and the sum of x over each group."""

    values: Buffer  # (rows, K) float32
    sums: Buffer | None  # (rows, K / group) float32; None for float formats, whose values are x itself


@dataclass(frozen=True)
class DigitRows:
    """x = scale * (digit 0 + digit 1 / 254 + digit 2 / 254**2 …) + rounding error, one scale per group of columns.

    One digit rounds to 8 bits; DIGITS of them are as good as float32.
    """

    digits: list[Buffer]  # (rows, K / 4) int32 each: four int8 between -127 and 127
    scales: Buffer  # (rows, K / group) float32
    offsets: Buffer | None  # (rows, K / group) float32: for zero points that the unit does not subtract itself
    sums: Buffer | None  # (rows, K / group) float32: the sum of x over each group, for formats with a minimum


def float_rows(rows: Rows, n: Expr, width: int) -> FloatRows:
    """(n, K) float32 as it is."""
    values = _scratch(n, width, "float32")

    def write(t: Expr) -> None:
        row = rows(t)
        for_each_block(width, TILE, lambda k, lanes: store(values, row(k, lanes), t, k))

    parallel_for(n, write)
    return FloatRows(values, None)


def field_rows(rows: Rows, n: Expr, width: int, fmt: WeightFormat) -> FloatRows:
    """For `Weights.group_fields`."""
    values, sums = _scratch(n, width, "float32"), _scratch(n, width // fmt.group, "float32")

    def write(t: Expr) -> None:
        row, scales = rows(t), field_scales(fmt)
        with T.serial(i64(width // fmt.group)) as group:
            total = splat(0.0, TILE)
            for at in range(0, fmt.group, TILE):
                x = bind(row(group * fmt.group + at, TILE))
                store(values, x * scales, t, group * fmt.group + at)
                total = total + x
            store(sums, reduce_sum(bind(total)), t, group)

    parallel_for(n, write)
    return FloatRows(values, sums)


def bf16_rows(rows: Rows, n: Expr, width: int, isa: Isa) -> Buffer:
    """(n, K / 2) words of two bfloat16."""
    values = _scratch(n, width, "uint16")

    def write(t: Expr) -> None:
        row = rows(t)
        for_each_block(width, TILE, lambda k, lanes: store_bf16(isa, values, row(k, lanes), t, k))

    parallel_for(n, write)
    return view(values, (n, width // 2), "uint32")


def amx_rows(rows: Rows, n: Expr, width: int, isa: Isa) -> Buffer:
    """(n / 16, K / 32, 16, 32) bfloat16, an AMX tile being 1 KB in one piece; n is rounded up."""
    blocks = (n + (amx.ROWS - 1)) // amx.ROWS
    shape = [blocks, i64(width // amx.COLUMNS), i64(amx.ROWS), i64(amx.COLUMNS)]
    values = T.alloc_buffer(shape, "uint16")

    def write(t: Expr) -> None:
        row = rows(t)
        with T.serial(i64(width // amx.COLUMNS)) as block:
            for at in range(0, amx.COLUMNS, TILE):
                x = row(block * amx.COLUMNS + at, TILE)
                store_bf16(isa, values, x, t // amx.ROWS, block, t % amx.ROWS, i64(at))

    parallel_for(n, write)
    return values


def digit_rows(rows: Rows, n: Expr, width: int, fmt: WeightFormat, dot: Int8Dot, num_digits: int) -> DigitRows:
    """Each group's scale is a 127th of its largest value."""
    groups = width // fmt.group
    digits = [_scratch(n, width, "int8") for _ in range(num_digits)]
    scales = _scratch(n, groups, "float32")
    offsets = _scratch(n, groups, "float32") if dot.offset != fmt.zero_point else None
    sums = _scratch(n, groups, "float32") if fmt.has_minimum else None

    def write(t: Expr) -> None:
        row = rows(t)
        with T.serial(i64(groups)) as group:
            first = bind(group * fmt.group)
            parts = [bind(row(first + at, TILE)) for at in range(0, fmt.group, TILE)]
            scale, total = _split_group(digits, parts, t, first)
            store(scales, scale, t, group)
            if offsets is not None:
                store(offsets, total * T.float32(dot.offset - fmt.zero_point), t, group)
            if sums is not None:
                store(sums, total, t, group)

    parallel_for(n, write)
    return DigitRows([view(values, (n, width // 4), "int32") for values in digits], scales, offsets, sums)


def _split_group(digits: list[Buffer], parts: list[Expr], t: Expr, first: Expr) -> tuple[Expr, Expr]:
    """Store a group's digits; returns (scale, sum of what the digits mean)."""
    # As integers: the bits of positive floats are in the order of their values, and NaN, which a maximum of floats may
    # lose, is the largest. It then is the scale, and so reaches the output.
    magnitudes = [T.reinterpret(f"int32x{TILE}", x) & splat(T.int32(0x7FFFFFFF), TILE) for x in parts]
    top = bind(T.reinterpret("float32", reduce_max(bind(reduce(tirx.max, magnitudes)))))
    inverse = bind(T.Select(top > T.float32(0.0), T.float32(127.0) / top, T.float32(0.0)))
    total = splat(0.0, TILE)
    for i, x in enumerate(parts):
        rest = bind(x * splat(inverse, TILE))
        for place, values in enumerate(digits):
            digit = bind(round_to_int32(rest))
            store(values, T.cast(digit, f"int8x{TILE}"), t, first + i * TILE)
            rounded = bind(T.cast(digit, f"float32x{TILE}"))
            total = bind(total + rounded * splat(float(DIGIT) ** -place, TILE))
            rest = bind((rest - rounded) * splat(float(DIGIT), TILE))
    scale = bind(top * T.float32(1.0 / 127.0))
    return scale, bind(scale * reduce_sum(total))


def _scratch(n: Expr, width: int, dtype: str) -> Buffer:
    return T.alloc_buffer((n, i64(width)), dtype)
