"""The gate of a SwiGLU feed-forward block (Shazeer, 2020)."""

from tvm import tirx

from .isa import Isa
from .vector import Expr, bind, exp, for_each_block, kernel, load, parallel_for, splat, store

LANES = 16


def silu_mul(features: int, isa: Isa) -> tirx.PrimFunc:
    """PrimFunc(gate_up (n, 2 * features) f32, out (n, features) f32): out = silu(gate) * up, the gate being first."""
    with kernel("silu_mul") as k:
        n = k.symbol("n")
        gate_up = k.arg("gate_up", (n, 2 * features), "float32")
        out = k.arg("out", (n, features), "float32")

        def row(t: Expr) -> None:
            def block(i: Expr, lanes: int) -> None:
                gate = bind(load(gate_up, t, i, lanes=lanes))
                up = load(gate_up, t, features + i, lanes=lanes)
                store(out, gate / (splat(1.0, lanes) + exp(splat(0.0, lanes) - gate)) * up, t, i)

            for_each_block(features, LANES, block)

        parallel_for(n, row)
    return k.func
