"""The gate and up projections of a SwiGLU MLP become one matmul, and silu(gate) * up one kernel that reads its output
whole (a split would copy)."""

from tvm import IRModule, relax

from mlcgen.passes.combine_matmuls import CanStack, combine_matmuls, projection
from mlcgen.passes.rewrite import Rewriter, bindings, is_op, rewrite
from mlcgen.targets.base import Target


def fuse_gate_up(mod: IRModule, can_stack: CanStack, target: Target) -> IRModule:
    values = bindings(mod)
    found = []
    for value in values.values():
        if is_op(value, "relax.multiply") and is_op(values.get(value.args[0]), "relax.nn.silu"):
            gate, up = values[value.args[0]].args[0], value.args[1]
            found.append([projection(values, gate), projection(values, up)])
    groups = [[p for p in group if p is not None] for group in found]
    mod = combine_matmuls(mod, [group for group in groups if len(group) == 2], can_stack)
    return _fuse_silu_mul(mod, target)


def _fuse_silu_mul(mod: IRModule, target: Target) -> IRModule:
    def rule(rewriter: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        if not is_op(value, "relax.multiply") or not is_op(rewriter.value(value.args[0]), "relax.nn.silu"):
            return None
        gate, up = rewriter.value(rewriter.value(value.args[0]).args[0]), rewriter.value(value.args[1])
        if not (isinstance(gate, relax.TupleGetItem) and isinstance(up, relax.TupleGetItem)):
            return None
        split = rewriter.value(gate.tuple_value)
        if not gate.tuple_value.same_as(up.tuple_value) or (gate.index, up.index) != (0, 1):
            return None
        if not is_op(split, "relax.split") or len(split.ty.fields) != 2:
            return None
        kernel = target.kernels.silu_mul(int(value.ty.shape[1]))
        return rewriter.call_kernel(kernel, [split.args[0]], value.ty)

    return rewrite(mod, rule)
