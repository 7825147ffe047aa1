"""Intermediate tensors of equal place and shape become one: layers repeat each other, so that a step needs few.

Memory planning gives every intermediate a place in a shared storage, and one tensor object each. Making a tensor costs
the virtual machine about as much as starting a kernel, and a decode step of a small model has hundreds.
"""

import tvm_ffi
from tvm import IRModule, relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from mlcgen.passes.rewrite import is_op

SHARED = ("relax.memory.alloc_tensor", "relax.reshape")  # a place in a storage; another shape of a tensor


def share_tensors(mod: IRModule) -> IRModule:
    """For a module whose memory is planned: kernels write to tensors that are arguments, so equal tensors may alias."""
    functions = dict(mod.functions.items())
    for gv, func in functions.items():
        if isinstance(func, relax.Function):
            functions[gv] = relax.analysis.remove_all_unused(_Sharing(mod).visit_expr(func))
    return IRModule(functions, attrs=mod.attrs)


@mutator
class _Sharing(PyExprMutator):  # type: ignore[misc]
    def __init__(self, mod: IRModule) -> None:
        super().__init__(mod)
        self.found: list[tuple[relax.Call, relax.Var]] = []

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        value = self.visit_expr(binding.value)
        if isinstance(value, relax.Var):  # another name
            self.set_var_remap(binding.var, value)
        elif isinstance(value, relax.TupleGetItem) and isinstance(bound := self._bound(value.tuple_value), relax.Tuple):
            self.set_var_remap(binding.var, bound.fields[value.index])
        elif any(is_op(value, name) for name in SHARED):
            self.set_var_remap(binding.var, self._shared(value, binding.var))
        else:
            self.set_var_remap(binding.var, self.builder_.emit(value, binding.var.name))

    def _bound(self, expr: relax.Expr) -> relax.Expr | None:
        return self.lookup_binding(expr) if isinstance(expr, relax.Var) else expr

    def _shared(self, value: relax.Call, old: relax.Var) -> relax.Var:
        for known, var in self.found:
            if tvm_ffi.structural_equal(known, value):
                return var
        var = self.builder_.emit(value, old.name)
        self.found.append((value, var))
        return var
