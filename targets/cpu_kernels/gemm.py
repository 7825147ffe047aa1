"""The register-tiled matrix product that linear and attention share: C (rows, columns) += A (rows, k) B (k, columns)"""

from collections.abc import Callable, Sequence

from tvm.tirx.script import builder as T  # noqa: N812

from .isa import Isa
from .units import multiply_add
from .vector import Expr, Register, bind, i64


def tile_rows(isa: Isa, vectors: int) -> int:
    """Rows of C to hold in registers beside `vectors` (native) vectors of B and one broadcast element of A."""
    return max(1, min(14, (isa.registers - 1 - vectors) // vectors))


def multiply_tile(
    extent: Expr,
    initial: Sequence[Sequence[Expr]],
    a: Callable[[int, Expr], Expr],
    b: Callable[[Expr, int], Expr],
    unit: Callable[[Expr, Expr, Expr], Expr] = multiply_add,
) -> list[list[Register]]:
    """initial[r][c] + sum over k < extent of a(r, k) * b(k, c), in one register per (row, vector of columns).

    unit(sum, vector of b, element of a) adds one product, or those of packed words."""
    sums = [[Register(value) for value in row] for row in initial]
    with T.serial(i64(extent)) as k:
        columns = [bind(b(k, c)) for c in range(len(sums[0]))]
        for r, row in enumerate(sums):
            element = bind(a(r, k))
            for register, column in zip(row, columns, strict=True):
                register.set(unit(register.get(), column, element))
    return sums
