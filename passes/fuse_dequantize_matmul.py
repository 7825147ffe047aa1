"""Products with stored weights become one kernel that decodes them in registers or cache: no dequantized matrix is
ever written to memory."""

from collections.abc import Mapping

from tvm import IRModule, relax

from mlcgen.formats import WeightFormat
from mlcgen.passes.quantize import FORMAT
from mlcgen.passes.rewrite import Rewriter, is_op, rewrite, static_shape
from mlcgen.targets.base import Target

LINEAR = "mlcgen.linear"  # attribute of a linear kernel: the format's name


def fuse_dequantize_matmul(mod: IRModule, formats: Mapping[str, WeightFormat], target: Target) -> IRModule:
    """`formats`: by name, those that the module's dequantize calls use."""

    def parts(rewriter: Rewriter, weight: relax.Expr) -> tuple[WeightFormat, list[relax.Expr], tuple[int, ...]] | None:
        call = rewriter.value(weight)
        name = rewriter.kernel_attr(call, FORMAT)
        return None if name is None else (formats[str(name)], list(call.args[1].fields), static_shape(weight))

    def linear(
        rewriter: Rewriter, x: relax.Expr, weight: relax.Expr, bias: list[relax.Expr], out: object
    ) -> relax.Expr:
        fmt, stored, (n, k) = parts(rewriter, weight)  # type: ignore[misc]
        kernel = target.kernels.linear(fmt, n, k, bool(bias)).with_attr(LINEAR, fmt.name)
        return rewriter.call_kernel(kernel, [x, *stored, *bias], out)

    def rule(rewriter: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        if is_op(value, "relax.take") and (found := parts(rewriter, value.args[0])) is not None:
            fmt, stored, (vocab, hidden) = found
            return rewriter.call_kernel(
                target.kernels.embedding(fmt, vocab, hidden), [value.args[1], *stored], value.ty
            )
        product = value
        bias: list[relax.Expr] = []
        if is_op(value, "relax.add") and len(value.args[1].ty.shape) == 1:
            product, bias = matmuls.get(value.args[0], value), [value.args[1]]
        if not is_op(product, "relax.matmul"):
            return None
        transposed = rewriter.value(product.args[1])
        if not is_op(transposed, "relax.permute_dims") or parts(rewriter, transposed.args[0]) is None:
            return None
        fused = rewriter.emit(linear(rewriter, product.args[0], transposed.args[0], bias, product.ty))
        matmuls[fused] = product
        return fused

    matmuls: dict[relax.Var, relax.Expr] = {}  # fused result -> the matmul it replaced, should a bias follow
    return rewrite(mod, rule)
