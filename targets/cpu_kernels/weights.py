"""Reading stored weights (mlcgen/formats.py) as float32 vectors; one vector lane is one output row of a 16-row tile."""

from collections.abc import Iterator
from dataclasses import dataclass

from tvm.tirx.script import builder as T  # noqa: N812

from ...formats import TILE, WeightFormat
from .isa import Isa
from .vector import Buffer, Expr, Kernel, bind, load, load_f32, prefetch, splat, store, view

PREFETCH_BYTES = 8192  # how far ahead: hardware prefetching stops at the end of each page


@dataclass(frozen=True)
class Weights:
    """The stored tensors of one (N, K) matrix, as a kernel sees them."""

    fmt: WeightFormat
    w: Buffer  # float formats: (tiles, K, 16) as stored; grouped: (tiles, K * bits / 32, 16) uint32
    scale: Buffer | None  # (tiles, K / group, 16) float16
    minimum: Buffer | None

    def column(self, isa: Isa, tile: Expr, k: Expr) -> Expr:
        """Column k of a tile in a float format: 16 float32."""
        return load_f32(isa, self.w, tile, k, 0, lanes=TILE)

    def prefetch(self, tile: Expr, row: Expr) -> None:
        """Ask for the cache line PREFETCH_BYTES after w[tile, row]; the tiles of a task follow each other in memory."""
        row_bytes = TILE * (4 if self.fmt.is_grouped else self.fmt.bits // 8)
        prefetch(self.w, tile, row + PREFETCH_BYTES // row_bytes, 0)

    def group_scale(self, isa: Isa, tile: Expr, group: Expr) -> Expr:
        return bind(load_f32(isa, self.scale, tile, group, 0, lanes=TILE))

    def group_minimum(self, isa: Isa, tile: Expr, group: Expr) -> Expr:
        return bind(load_f32(isa, self.minimum, tile, group, 0, lanes=TILE))

    def group_values(self, isa: Isa, tile: Expr, group: Expr) -> Iterator[tuple[int, Expr]]:
        """(column within the group, 16 weights as float32) for each column of a group."""
        scale = self.group_scale(isa, tile, group)
        minimum = self.group_minimum(isa, tile, group) if self.fmt.has_minimum else None
        for column, code in self.group_codes(tile, group):
            yield column, bind(code * scale if minimum is None else code * scale + minimum)

    def group_codes(self, tile: Expr, group: Expr) -> Iterator[tuple[int, Expr]]:
        """(column within the group, code - zero_point as 16 float32) for each column of a group."""
        fmt = self.fmt
        for first, words in self.group_words(tile, group):
            if fmt.zero_point:
                # Flipping each code's top bit makes it its own value minus the zero point, in two's complement.
                words = bind(words ^ splat(T.uint32(_top_bits(fmt.bits)), TILE))
            for column in range(columns_per_word(fmt)):
                yield first + column, bind(_code(fmt, words, _bit_of(fmt, column)))

    def group_fields(self, tile: Expr, group: Expr) -> Iterator[tuple[int, Expr]]:
        """(column within the group, code / field_scale(column) as 16 float32): codes masked where they stand.

        One instruction less than moving them down; the activation takes the scale instead.
        """
        fmt = self.fmt
        for first, words in self.group_words(tile, group):
            for column in range(columns_per_word(fmt)):
                bit = _bit_of(fmt, column)
                in_place = words & splat(T.uint32(((1 << fmt.bits) - 1) << bit), TILE)
                field = words >> splat(T.uint32(bit), TILE) if _is_top(fmt, bit) else in_place
                yield first + column, bind(T.cast(T.reinterpret("int32x16", field), "float32x16"))

    def group_bytes(self, tile: Expr, group: Expr) -> Iterator[Expr]:
        """16 words of four unsigned codes, one byte each, for every four columns of a group."""
        for _, words in self.group_words(tile, group):
            if self.fmt.bits == 8:
                yield words
            else:
                low = splat(T.uint32(0x0F0F0F0F), TILE)
                yield bind(words & low)
                yield bind((words >> splat(T.uint32(4), TILE)) & low)

    def bf16_pair(self, tile: Expr, k: Expr) -> Expr:
        """Columns k and k + 1 of a tile in the format bf16: 16 words."""
        low, high = (T.cast(load(self.w, tile, k + i, 0, lanes=TILE), "uint32x16") for i in range(2))
        return low | (high << splat(T.uint32(16), TILE))

    def group_words(self, tile: Expr, group: Expr) -> Iterator[tuple[int, Expr]]:
        """(first column within the group, 16 words of 32 bits) for each cache line of a group."""
        per_group = self.fmt.group // columns_per_word(self.fmt)
        for word in range(per_group):
            row = group * per_group + word
            self.prefetch(tile, row)
            yield word * columns_per_word(self.fmt), bind(load(self.w, tile, row, 0, lanes=TILE))


def field_scales(fmt: WeightFormat) -> Expr:
    """The scales of `group_fields` for 16 columns (they repeat): 2**-bit, or 1 where the sign bit forces a shift."""
    scales = T.alloc_buffer((TILE,), "float32")
    for column in range(TILE):
        bit = _bit_of(fmt, column % columns_per_word(fmt))
        store(scales, T.float32(1.0 if _is_top(fmt, bit) else 2.0**-bit), column)
    return bind(load(scales, 0, lanes=TILE))


def weight_args(kernel: Kernel, fmt: WeightFormat, n: int, k: int) -> dict[str, Buffer]:
    """Declare w, [scale], [minimum] as the kernel's next arguments."""
    return {name: kernel.arg(name, shape, dtype) for name, shape, dtype in fmt.parts(n, k)}


def open_weights(fmt: WeightFormat, args: dict[str, Buffer]) -> Weights:
    """What `weight_args` declared, in the form that the body reads; emit it after the last argument."""
    w = args["w"]
    if fmt.is_grouped:
        tiles, words, _, _ = (int(extent) for extent in w.ty.shape)
        w = view(w, (tiles, words, TILE), "uint32")
    return Weights(fmt, w, args.get("scale"), args.get("minimum"))


def _is_top(fmt: WeightFormat, bit: int) -> bool:
    return bit + fmt.bits == 32


def columns_per_word(fmt: WeightFormat) -> int:
    return 32 // fmt.bits


def _top_bits(bits: int) -> int:
    return sum(1 << (at + bits - 1) for at in range(0, 32, bits))


def _bit_of(fmt: WeightFormat, column: int) -> int:
    """Where a column's code begins in its 32-bit word: 4-bit columns j and 4 + j share byte j."""
    return 8 * column if fmt.bits == 8 else 8 * (column % 4) + 4 * (column // 4)


def _code(fmt: WeightFormat, words: Expr, bit: int) -> Expr:
    if fmt.zero_point:
        above = splat(T.uint32(32 - fmt.bits - bit), TILE)
        signed = T.reinterpret("int32x16", words << above) >> splat(T.int32(32 - fmt.bits), TILE)
        return T.cast(signed, "float32x16")
    field = (words >> splat(T.uint32(bit), TILE)) & splat(T.uint32((1 << fmt.bits) - 1), TILE)
    return T.cast(T.reinterpret("int32x16", field), "float32x16")
