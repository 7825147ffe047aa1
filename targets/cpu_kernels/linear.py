"""out (n, N) = f(x) (n, K) @ W (N, K)^T [+ bias] [+ residual], W in any stored format.

Rows of x are first prepared as an operand (operand.py). Two paths in one PrimFunc, chosen by n when it runs:
- few rows (gemv.py): each weight is decoded in registers and used for up to 4 rows; bound by decoding, or by memory.
- many rows (panel.py, amx.py): a panel of W is decoded once per block of rows into the words that the best
  multiply-add instruction reads, and a register-tiled product reads it from cache.
"""

from tvm import tirx
from tvm.tirx.script import builder as T  # noqa: N812

from ..base import Linear
from .activation import Rows, plain, rms_norm, silu_mul
from .gemv import few_rows_product, few_rows_unit
from .isa import Isa
from .output import Output
from .panel import panel_for
from .units import bf16_scope
from .vector import Buffer, kernel
from .weights import open_weights, weight_args


def linear(spec: Linear, isa: Isa) -> tirx.PrimFunc:
    """PrimFunc(x (n, K) f32, [norm weight (K,) f32], w, [scale], [minimum], [bias (N,) f32], [residual (n, N) f32],
    out (n, N) f32). With a gate x is (n, 2 * K)."""
    many_rows = panel_for(spec, isa)
    with kernel(spec.name) as k:
        n = k.symbol("n")
        width = spec.in_features
        x = k.arg("x", (n, 2 * width if spec.is_gated else width), "float32")
        norm_weight = k.arg("norm_weight", (width,), "float32") if spec.norm_eps is not None else None
        stored = weight_args(k, spec.fmt, spec.out_features, spec.in_features)
        bias = k.arg("bias", (spec.out_features,), "float32") if spec.has_bias else None
        residual = k.arg("residual", (n, spec.out_features), "float32") if spec.has_residual else None
        out = k.arg("out", (n, spec.out_features), "float32")
        weights = open_weights(spec.fmt, stored)
        output = Output(out, bias, residual, spec.out_features)
        rows = _rows(spec, isa, x, norm_weight)
        with bf16_scope(isa.has_bf16_convert), T.If(n < many_rows.fewest_rows):
            with T.Then():
                few_rows_product(spec, isa, n, rows, weights, output)
            with T.Else():
                many_rows.product(n, rows, weights, output)
    return k.func


def _rows(spec: Linear, isa: Isa, x: Buffer, norm_weight: Buffer | None) -> Rows:
    if spec.norm_eps is not None:
        return rms_norm(x, norm_weight, spec.norm_eps)
    return silu_mul(isa, x) if spec.is_gated else plain(x)


def describe_linear(spec: Linear, isa: Isa) -> str:
    """The micro-kernels that a product runs on, for the compile report."""
    many_rows = panel_for(spec, isa)
    return f"{few_rows_unit(spec.fmt, isa)}; {many_rows.fewest_rows} rows or more: {many_rows.name}"
