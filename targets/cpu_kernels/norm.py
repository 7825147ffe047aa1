"""Root-mean-square normalization (Zhang and Sennrich, 2019), alone and after the residual addition before it."""

from collections.abc import Callable

from tvm import tirx
from tvm.tirx.script import builder as T  # noqa: N812

from .isa import Isa
from .vector import (
    Buffer,
    Expr,
    Register,
    bind,
    for_each_block,
    i64,
    kernel,
    load,
    parallel_for,
    reduce_sum,
    splat,
    store,
    widen,
)

LANES = 16
CHAINS = 4  # independent sums, which hide the latency of the additions


def rms_norm(hidden: int, eps: float, isa: Isa) -> tirx.PrimFunc:
    """PrimFunc(x (n, hidden) f32, weight (hidden,) f32, out (n, hidden) f32): out = x / rms(x) * weight."""
    with kernel("rms_norm") as k:
        n = k.symbol("n")
        x = k.arg("x", (n, hidden), "float32")
        weight = k.arg("weight", (hidden,), "float32")
        out = k.arg("out", (n, hidden), "float32")

        def row(t: Expr) -> None:
            squares = _sum_of_squares(hidden, lambda i, lanes: load(x, t, i, lanes=lanes))
            _normalize_row(x, weight, out, t, squares, eps)

        parallel_for(n, row)
    return k.func


def add_rms_norm(hidden: int, eps: float, isa: Isa) -> tirx.PrimFunc:
    """PrimFunc(x, residual (n, hidden) f32, weight (hidden,) f32, out_sum, out_norm (n, hidden) f32).

    out_sum = x + residual; out_norm = out_sum / rms(out_sum) * weight.
    """
    with kernel("add_rms_norm") as k:
        n = k.symbol("n")
        x = k.arg("x", (n, hidden), "float32")
        residual = k.arg("residual", (n, hidden), "float32")
        weight = k.arg("weight", (hidden,), "float32")
        out_sum = k.arg("out_sum", (n, hidden), "float32")
        out_norm = k.arg("out_norm", (n, hidden), "float32")

        def row(t: Expr) -> None:
            def added(i: Expr, lanes: int) -> Expr:
                value = bind(load(x, t, i, lanes=lanes) + load(residual, t, i, lanes=lanes))
                store(out_sum, value, t, i)
                return value

            squares = _sum_of_squares(hidden, added)
            _normalize_row(out_sum, weight, out_norm, t, squares, eps)

        parallel_for(n, row)
    return k.func


def _sum_of_squares(hidden: int, at: Callable[[Expr, int], Expr]) -> Expr:
    sums = [Register(splat(0.0, LANES)) for _ in range(CHAINS)]

    def add_square(chain: int, i: Expr, lanes: int) -> None:
        value = widen(bind(at(i, lanes)), LANES)
        sums[chain].set(sums[chain].get() + value * value)

    stride = CHAINS * LANES
    with T.serial(i64(hidden // stride)) as block:
        for chain in range(CHAINS):
            add_square(chain, block * stride + chain * LANES, LANES)
    for chain, start in enumerate(range(hidden // stride * stride, hidden, LANES)):
        add_square(chain, i64(start), min(LANES, hidden - start))
    a, b, c, d = (register.get() for register in sums)
    return reduce_sum(bind((a + b) + (c + d)))


def _normalize_row(x: Buffer, weight: Buffer, out: Buffer, t: Expr, squares: Expr, eps: float) -> None:
    hidden = int(weight.ty.shape[0])
    factor = bind(T.float32(1.0) / T.sqrt(squares * T.float32(1.0 / hidden) + T.float32(eps)))

    def scale(i: Expr, lanes: int) -> None:
        store(out, load(x, t, i, lanes=lanes) * splat(factor, lanes) * load(weight, i, lanes=lanes), t, i)

    for_each_block(hidden, LANES, scale)
