"""Products on the tile unit AMX: C (16 x 16 float32) += A (16 x 32 bfloat16) B (32 x 16 bfloat16), in 8 registers.

A register block is two by two tiles of C, so that each tile of A and B is loaded for two products. B is stored in words
of two rows (the panel's layout), A row by row. Intrinsics run between `configured`'s instructions only.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script import builder as T  # noqa: N812

from .vector import Buffer, Expr, bind, i64, load, store

ROWS, COLUMNS = 16, 32  # of bfloat16 in one tile of A
BLOCK_ROWS = 2 * ROWS
_C, _A, _B = 0, 4, 6  # first registers of C (2 x 2), A and B


@dataclass(frozen=True)
class Tile:
    """16 rows of 64 bytes in memory, `stride` bytes apart."""

    buffer: Buffer
    index: tuple[Expr, ...]  # of the first element
    stride: Expr

    @property
    def args(self) -> tuple[Expr, Expr]:
        return T.address_of(load(self.buffer, *self.index)), i64(self.stride)


@contextmanager
def configured(rows: Expr) -> Iterator[None]:
    """A register block of `rows` (17 … 32, or 1 … 16 for its upper half alone) rows; B's tiles are always whole."""
    config = T.alloc_buffer((i64(64),), "uint8")
    with T.serial(i64(64)) as i:
        store(config, T.uint8(0), i)
    store(config, T.uint8(1), 0)  # palette
    upper = bind(tirx.min(rows, i64(ROWS)))
    lower = bind(tirx.max(rows - ROWS, i64(1)))  # a register without rows would be an error
    heights = [upper, upper, lower, lower, upper, lower, i64(ROWS), i64(ROWS)]
    for register, height in enumerate(heights):
        store(config, T.uint8(64), 16 + 2 * register)  # bytes of a row
        store(config, T.cast(height, "uint8"), 48 + register)
    _tile_instruction("llvm.x86.ldtilecfg", T.address_of(load(config, 0)))
    yield
    _tile_instruction("llvm.x86.tilerelease")


def multiply_block(
    rows: int,
    steps: Expr,
    a: Callable[[int, Expr], Tile],
    b: Callable[[Expr, int], Tile],
    initial: Callable[[int, int], Tile] | None,
    result: Callable[[int, int], Tile],
) -> None:
    """result(i, j) = initial(i, j) + sum over k < steps of a(i, k) b(k, j), for `rows` (1 or 2) by 2 tiles."""
    block = [(i, j) for i in range(rows) for j in range(2)]
    for i, j in block:
        if initial is None:
            _tile_instruction("llvm.x86.tilezero", _register(_C + 2 * i + j))
        else:
            _tile_instruction("llvm.x86.tileloadd64", _register(_C + 2 * i + j), *initial(i, j).args)
    with T.serial(steps) as k:
        for i in range(rows):
            _tile_instruction("llvm.x86.tileloadd64", _register(_A + i), *a(i, k).args)
        for j in range(2):
            _tile_instruction("llvm.x86.tileloadd64", _register(_B + j), *b(k, j).args)
        for i, j in block:
            registers = (_C + 2 * i + j, _A + i, _B + j)
            _tile_instruction("llvm.x86.tdpbf16ps", *(_register(r) for r in registers))
    for i, j in block:
        _tile_instruction("llvm.x86.tilestored64", _register(_C + 2 * i + j), *result(i, j).args)


def _register(number: int) -> Expr:
    return T.uint8(number)


def _tile_instruction(name: str, *args: Expr) -> None:
    T.evaluate(T.call_llvm_intrin("void", name, *args))
