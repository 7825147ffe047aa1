"""What a product writes: 16 columns of a row at a time, with the bias and the residual added."""

from dataclasses import dataclass

from tvm.tirx.script import builder as T  # noqa: N812

from ...formats import TILE
from .vector import Buffer, Expr, load, narrow, store, widen


@dataclass(frozen=True)
class Output:
    out: Buffer  # (n, N)
    bias: Buffer | None  # (N,)
    residual: Buffer | None  # (n, N)
    width: int  # N; the last tile may be narrower than 16

    @property
    def tiles(self) -> int:
        return -(-self.width // TILE)

    def finish(self, value: Expr, row: Expr, tile: Expr) -> Expr:
        """value + bias + residual."""
        if self.bias is not None:
            value = value + self._columns(self.bias, tile=tile)
        return value if self.residual is None else value + self._columns(self.residual, row, tile=tile)

    def partial(self, row: Expr, tile: Expr) -> Expr:
        """What an earlier `store` wrote."""
        return self._columns(self.out, row, tile=tile)

    def store(self, value: Expr, row: Expr, tile: Expr) -> None:
        if self._last_lanes == TILE:
            store(self.out, value, row, tile * TILE)
            return
        with T.If(tile == self.tiles - 1):
            with T.Then():
                store(self.out, narrow(value, self._last_lanes), row, tile * TILE)
            with T.Else():
                store(self.out, value, row, tile * TILE)

    @property
    def _last_lanes(self) -> int:
        return self.width - (self.tiles - 1) * TILE

    def _columns(self, buffer: Buffer, *row: Expr, tile: Expr) -> Expr:
        full = load(buffer, *row, tile * TILE, lanes=TILE)
        if self._last_lanes == TILE:
            return full
        last = widen(load(buffer, *row, tile * TILE, lanes=self._last_lanes), TILE)
        return T.if_then_else(tile == self.tiles - 1, last, full)
