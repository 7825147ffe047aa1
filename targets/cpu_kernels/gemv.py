"""Products of few rows: weights are decoded in registers, a tile of 16 output rows at a time, for up to 4 rows of x."""

from collections.abc import Callable
from functools import reduce
from operator import add

from tvm.tirx.script import builder as T  # noqa: N812

from ...formats import TILE, WeightFormat
from ..base import Linear
from .activation import Rows
from .isa import Isa
from .operand import DIGIT, DIGITS, DigitRows, FloatRows, digit_rows, field_rows, float_rows
from .output import Output
from .units import Int8Dot
from .vector import Expr, Register, bind, i64, load, splat
from .weights import Weights

Times = Callable[[list[Expr], Expr], list[Expr]]  # (rows, tile) -> their products, 16 float32 each


def few_rows_product(spec: Linear, isa: Isa, n: Expr, rows: Rows, weights: Weights, output: Output) -> None:
    fmt, width = spec.fmt, spec.in_features
    if not fmt.is_grouped:
        x = float_rows(rows, n, width)
        _product(n, 4, output, lambda block, tile: _float_rows_times_tile(isa, x, weights, block, tile))
    elif count := num_digits(fmt, isa):
        dot = Int8Dot(isa, fmt)
        split = digit_rows(rows, n, width, fmt, dot, count)
        height = 4 if count == 1 or isa.lanes == TILE else 1  # elsewhere more sums than registers
        _product(n, height, output, lambda block, tile: _digits_times_tile(isa, dot, split, weights, block, tile))
    else:
        fields = field_rows(rows, n, width, fmt)
        _product(n, 4, output, lambda block, tile: _fields_times_tile(isa, fields, weights, block, tile))


def few_rows_unit(fmt: WeightFormat, isa: Isa) -> str:
    if fmt.is_grouped and (count := num_digits(fmt, isa)):
        return f"int8 {Int8Dot(isa, fmt).name}" + (f" on {count} digits of x" if count > 1 else "")
    return "float32 multiply-add"


def num_digits(fmt: WeightFormat, isa: Isa) -> int:
    """Int8 digits of an activation, 0 for float32: a unit that multiplies four codes at once takes three digits sooner
    than four codes become float32."""
    return 1 if fmt.int8_activations else DIGITS if isa.has_int8_dot else 0


def _product(n: Expr, height: int, output: Output, times: Times) -> None:
    """Blocks of `height` rows, a power of two; what is left in one block of each lower power."""

    def store_rows(block: list[Expr], tile: Expr) -> None:
        for row, total in zip(block, times(block, tile), strict=True):
            output.store(output.finish(total, row, tile), row, tile)

    with T.parallel(i64(output.tiles)) as tile:
        with T.serial(n // height) as block:  # a tile of W stays in L1 from one block of rows to the next
            store_rows([block * height + r for r in range(height)], tile)
        count = height // 2
        while count:
            with T.If(n % (2 * count) >= count), T.Then():
                first = bind(n - n % (2 * count))
                store_rows([first + r for r in range(count)], tile)
            count //= 2


def _digits_times_tile(
    isa: Isa, dot: Int8Dot, x: DigitRows, weights: Weights, rows: list[Expr], tile: Expr
) -> list[Expr]:
    fmt, words = weights.fmt, weights.fmt.group // 4
    totals = [Register(splat(0.0, TILE)) for _ in rows]
    with T.serial(i64(int(x.scales.ty.shape[1]))) as group:
        sums = [[dot.start() for _ in x.digits] for _ in rows]
        for i, codes in enumerate(weights.group_bytes(tile, group)):
            sums = [
                [
                    dot.add(total, codes, load(digit, row, group * words + i))
                    for total, digit in zip(of_row, x.digits, strict=True)
                ]
                for row, of_row in zip(rows, sums, strict=True)
            ]
        scale = weights.group_scale(isa, tile, group)
        minimum = weights.group_minimum(isa, tile, group) if fmt.has_minimum else None
        for row, total, products in zip(rows, totals, sums, strict=True):
            total.set(add_group(dot, x, total.get(), products, row, group, scale, minimum))
    return [total.get() for total in totals]


def add_group(
    dot: Int8Dot,
    x: DigitRows,
    total: Expr,
    products: list[Expr],
    row: Expr,
    group: Expr,
    scale: Expr,
    minimum: Expr | None,
) -> Expr:
    """total + scale * (scale of x * the digits' products + offset) [+ minimum * sum of x]."""
    value, *smaller = [T.cast(dot.total(product), f"float32x{TILE}") for product in products]
    for place, product in enumerate(smaller, 1):
        value = value + product * splat(float(DIGIT) ** -place, TILE)
    value = value * splat(load(x.scales, row, group), TILE)
    if x.offsets is not None:
        value = value + splat(load(x.offsets, row, group), TILE)
    total = total + scale * value
    return total if minimum is None else total + minimum * splat(load(x.sums, row, group), TILE)


def _fields_times_tile(isa: Isa, x: FloatRows, weights: Weights, rows: list[Expr], tile: Expr) -> list[Expr]:
    """Per group: the sum of code * x less the zero point's part, then one multiplication by the scale."""
    fmt, width = weights.fmt, int(x.values.ty.shape[1])
    totals = [Register(splat(0.0, TILE)) for _ in rows]
    with T.serial(i64(width // fmt.group)) as group:
        sums = [_Chains(_chains(rows)) for _ in rows]
        for column, field in weights.group_fields(tile, group):
            for row, chains in zip(rows, sums, strict=True):
                chains.add(field * splat(load(x.values, row, group * fmt.group + column), TILE))
        scale = weights.group_scale(isa, tile, group)
        minimum = weights.group_minimum(isa, tile, group) if fmt.has_minimum else None
        for row, total, chains in zip(rows, totals, sums, strict=True):
            x_sum = load(x.sums, row, group)
            centered = chains.total() - splat(x_sum * T.float32(fmt.zero_point), TILE)
            total.set(total.get() + scale * centered)
            if minimum is not None:
                total.set(total.get() + minimum * splat(x_sum, TILE))
    return [total.get() for total in totals]


def _float_rows_times_tile(isa: Isa, x: FloatRows, weights: Weights, rows: list[Expr], tile: Expr) -> list[Expr]:
    unroll, width = 8, int(x.values.ty.shape[1])
    totals = [[Register(splat(0.0, TILE)) for _ in range(_chains(rows))] for _ in rows]

    def add_column(k: Expr, chain: int) -> None:
        weight = bind(weights.column(isa, tile, k))
        for row, registers in zip(rows, totals, strict=True):
            register = registers[chain % len(registers)]
            register.set(register.get() + weight * splat(load(x.values, row, k), TILE))

    with T.serial(i64(width // unroll)) as block:
        for column in range(unroll):
            weights.prefetch(tile, block * unroll + column)
            add_column(block * unroll + column, column)
    for k in range(width // unroll * unroll, width):
        add_column(i64(k), 0)
    return [reduce(add, [register.get() for register in registers]) for registers in totals]


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
