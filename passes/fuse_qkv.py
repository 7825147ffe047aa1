"""The query, key and value projections become one matmul: one pass over the activations, one kernel launch."""

from tvm import IRModule, relax

from mlcgen.models.layers import ATTENTION, ROPE
from mlcgen.passes.combine_matmuls import CanStack, combine_matmuls, projection
from mlcgen.passes.rewrite import bindings, is_marked, is_op


def fuse_qkv(mod: IRModule, can_stack: CanStack) -> IRModule:
    values = bindings(mod)

    def source(var: relax.Var) -> relax.Var:
        """The projection's result behind rope and reshape."""
        while var in values and (is_marked(values[var], ROPE) or is_op(values[var], "relax.reshape")):
            var = values[var].args[1 if is_marked(values[var], ROPE) else 0]
        return var

    attentions = [value for value in values.values() if is_marked(value, ATTENTION)]
    found = [[projection(values, source(arg)) for arg in call.args[1:4]] for call in attentions]
    groups = [[p for p in group if p is not None] for group in found]
    return combine_matmuls(mod, [group for group in groups if len(group) == 3], can_stack)
