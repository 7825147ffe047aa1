"""What a product does to its rows of activations first: nothing, RMS norm, or the gate of a SwiGLU block."""

from collections.abc import Callable

from tvm.tirx.script import builder as T  # noqa: N812

from .isa import Isa
from .vector import Buffer, Expr, Register, bind, exp, i64, load, reduce_sum, splat, widen

LANES = 16
CHAINS = 4  # independent sums, which hide the latency of the additions

Row = Callable[[Expr, int], Expr]  # (column, lanes) -> that many float32 from this column on
Rows = Callable[[Expr], Row]  # token -> its row; what belongs to the whole row is computed here


def plain(x: Buffer) -> Rows:
    """Rows of x (n, K)."""
    return lambda t: lambda k, lanes: load(x, t, k, lanes=lanes)


def rms_norm(x: Buffer, weight: Buffer, eps: float) -> Rows:
    """x / rms(x) * weight, x (n, K) and weight (K,) (Zhang and Sennrich, 2019)."""

    def open_row(t: Expr) -> Row:
        width = int(weight.ty.shape[0])
        mean = _sum_of_squares(x, t, width) * T.float32(1.0 / width)
        factor = bind(T.float32(1.0) / T.sqrt(mean + T.float32(eps)))
        return lambda k, lanes: load(x, t, k, lanes=lanes) * splat(factor, lanes) * load(weight, k, lanes=lanes)

    return open_row


def silu_mul(isa: Isa, gate_up: Buffer) -> Rows:
    """silu(gate) * up, gate_up (n, 2 * K) holding the gate first (Shazeer, 2020)."""

    def open_row(t: Expr) -> Row:
        width = int(gate_up.ty.shape[1]) // 2

        def at(k: Expr, lanes: int) -> Expr:
            gate = bind(load(gate_up, t, k, lanes=lanes))
            up = load(gate_up, t, width + k, lanes=lanes)
            return gate / (splat(1.0, lanes) + exp(isa, splat(0.0, lanes) - gate)) * up

        return at

    return open_row


def _sum_of_squares(x: Buffer, t: Expr, width: int) -> Expr:
    sums = [Register(splat(0.0, LANES)) for _ in range(CHAINS)]

    def add_square(chain: int, k: Expr, lanes: int) -> None:
        value = widen(bind(load(x, t, k, lanes=lanes)), LANES)
        sums[chain].set(sums[chain].get() + value * value)

    stride = CHAINS * LANES
    with T.serial(i64(width // stride)) as block:
        for chain in range(CHAINS):
            add_square(chain, block * stride + chain * LANES, LANES)
    for chain, start in enumerate(range(width // stride * stride, width, LANES)):
        add_square(chain, i64(start), min(LANES, width - start))
    a, b, c, d = (register.get() for register in sums)
    return reduce_sum(bind((a + b) + (c + d)))
