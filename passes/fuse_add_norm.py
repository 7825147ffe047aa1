"""A residual addition and the RMS norm that follows become one kernel with two results; a lone norm becomes ours."""

from typing import TypeGuard

from tvm import IRModule, relax

from mlcgen.passes.rewrite import Rewriter, bindings, is_op, rewrite
from mlcgen.targets.base import Target


def fuse_add_norm(mod: IRModule, target: Target) -> IRModule:
    values = bindings(mod)
    normed: dict[relax.Var, relax.Call] = {}  # sum of two same-shaped tensors -> the norm that reads it
    for value in values.values():
        if _is_rms_norm(value) and _is_residual_add(values.get(value.args[0])):
            normed[value.args[0]] = value
    fused: dict[relax.Var, relax.Var] = {}  # sum -> (sum, norm) pair

    def rule(rewriter: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        if var in normed:
            norm = normed[var]
            kernel = target.kernels.add_rms_norm(int(value.ty.shape[1]), float(norm.attrs.epsilon))
            args = [*value.args, rewriter.visit_expr(norm.args[1])]
            fused[var] = rewriter.emit(rewriter.call_kernel(kernel, args, [value.ty, value.ty]), "add_norm")
            return relax.TupleGetItem(fused[var], 0)
        if not _is_rms_norm(value):
            return None
        old_input = values[var].args[0]
        if old_input in fused and normed[old_input].same_as(values[var]):
            return relax.TupleGetItem(fused[old_input], 1)
        kernel = target.kernels.rms_norm(int(value.ty.shape[1]), float(value.attrs.epsilon))
        return rewriter.call_kernel(kernel, value.args, value.ty)

    return rewrite(mod, rule)


def _is_rms_norm(value: relax.Expr | None) -> TypeGuard[relax.Call]:
    """Over the last axis of a (tokens, hidden) tensor."""
    return is_op(value, "relax.nn.rms_norm") and len(value.ty.shape) == 2 and [int(a) for a in value.attrs.axes] == [-1]


def _is_residual_add(value: relax.Expr | None) -> bool:
    return is_op(value, "relax.add") and all(len(arg.ty.shape) == 2 for arg in value.args)
