"""Reading stored weights (mlcgen/formats.py) as float32 vectors; one vector lane is one output row of a 16-row tile."""

from collections.abc import Iterator
from dataclasses import dataclass

from tvm.tirx.script import builder as T  # noqa: N812

from ...formats import TILE, WeightFormat
from .isa import Isa
from .vector import Buffer, Expr, Kernel, bind, load, load_f32, splat, store, view


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

    def group_scale(self, isa: Isa, tile: Expr, group: Expr) -> Expr:
        return bind(load_f32(isa, self.scale, tile, group, 0, lanes=TILE))

    def group_minimum(self, isa: Isa, tile: Expr, group: Expr) -> Expr:
        return bind(load_f32(isa, self.minimum, tile, group, 0, lanes=TILE))

    def group_codes(self, tile: Expr, group: Expr, table: Expr | None) -> Iterator[tuple[int, Expr]]:
        """(column within the group, code - zero_point as 16 float32) for each column of a group."""
        fmt = self.fmt
        columns = 32 // fmt.bits  # in one 32-bit word
        for chunk in range(fmt.group // columns):
            words = bind(load(self.w, tile, group * (fmt.group // columns) + chunk, 0, lanes=TILE))
            if fmt.zero_point and table is None:
                # Flipping each code's top bit makes it its own value minus the zero point, in two's complement.
                words = bind(words ^ splat(T.uint32(_top_bits(fmt.bits)), TILE))
            for column in range(columns):
                yield chunk * columns + column, bind(_code(fmt, words, _bit_of(fmt, column), table))


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


def code_table(fmt: WeightFormat, isa: Isa) -> Expr | None:
    """The 16 values of a 4-bit code in one vector, where the ISA looks up 16 lanes at once."""
    if fmt.bits != 4 or not isa.has_permute16:
        return None
    table = T.alloc_buffer((TILE,), "float32")
    for code in range(16):
        store(table, T.float32(code - fmt.zero_point), code)
    return bind(load(table, 0, lanes=TILE))


def _top_bits(bits: int) -> int:
    return sum(1 << (at + bits - 1) for at in range(0, 32, bits))


def _bit_of(fmt: WeightFormat, column: int) -> int:
    """Where a column's code begins in its 32-bit word: 4-bit columns j and 4 + j share byte j."""
    return 8 * column if fmt.bits == 8 else 8 * (column % 4) + 4 * (column // 4)


def _code(fmt: WeightFormat, words: Expr, bit: int, table: Expr | None) -> Expr:
    above = 32 - fmt.bits - bit
    if table is not None:  # the look-up ignores all but the lowest 4 bits of its index
        index = T.reinterpret("int32x16", words >> splat(T.uint32(bit), TILE))
        return T.call_llvm_pure_intrin("float32x16", "llvm.x86.avx512.permvar.sf.512", table, index)
    signed = T.reinterpret("int32x16", words << splat(T.uint32(above), TILE))
    if fmt.zero_point:
        return T.cast(signed >> splat(T.int32(32 - fmt.bits), TILE), "float32x16")
    field = (words >> splat(T.uint32(bit), TILE)) & splat(T.uint32((1 << fmt.bits) - 1), TILE)
    return T.cast(T.reinterpret("int32x16", field), "float32x16")
