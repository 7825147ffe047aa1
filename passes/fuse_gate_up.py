"""The gate and up projections of a SwiGLU MLP become one matmul; fuse_linear reads its output whole (a split would
copy)."""

from collections.abc import Callable

from tvm import IRModule, relax

from mlcgen.passes.combine_matmuls import CanStack, combine_matmuls, projection
from mlcgen.passes.rewrite import bindings, is_op


def fuse_gate_up(mod: IRModule, can_stack: CanStack) -> IRModule:
    values = bindings(mod)
    found = []
    for value in values.values():
        if is_op(value, "relax.multiply") and is_op(values.get(value.args[0]), "relax.nn.silu"):
            gate, up = values[value.args[0]].args[0], value.args[1]
            found.append([projection(values, gate), projection(values, up)])
    groups = [[p for p in group if p is not None] for group in found]
    return combine_matmuls(mod, [group for group in groups if len(group) == 2], can_stack)


def gate_up_of(value_of: Callable[[relax.Expr], relax.Expr], product: relax.Expr) -> relax.Expr | None:
    """(n, 2 * K) if `product` is silu of its first half times its second half."""
    if not is_op(product, "relax.multiply") or not is_op(value_of(product.args[0]), "relax.nn.silu"):
        return None
    gate, up = value_of(value_of(product.args[0]).args[0]), value_of(product.args[1])
    if not (isinstance(gate, relax.TupleGetItem) and isinstance(up, relax.TupleGetItem)):
        return None
    split = value_of(gate.tuple_value)
    if not gate.tuple_value.same_as(up.tuple_value) or (gate.index, up.index) != (0, 1):
        return None
    return split.args[0] if is_op(split, "relax.split") and len(split.ty.fields) == 2 else None
