"""The one place that knows TVM's mutator: rewrite the bindings of the module's `forward` function by a rule."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

from tvm import IRModule, ir, relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

FORWARD = "forward"
Rule = Callable[["Rewriter", relax.Var, relax.Expr], relax.Expr | None]


@mutator
class Rewriter(PyExprMutator):  # type: ignore[misc]
    """Visits bindings in order. The rule sees (rewriter, the old variable, its value with new operands) and returns
    a replacement, or None to keep the value."""

    def __init__(self, mod: IRModule, rule: Rule) -> None:
        super().__init__(mod)
        self.rule = rule
        self._added: dict[tirx.PrimFunc, ir.GlobalVar] = {}

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        value = self.visit_expr(binding.value)
        new = self.rule(self, binding.var, value)
        value = value if new is None else new
        if isinstance(binding.var, relax.DataflowVar):
            var = value if isinstance(value, relax.Var) else self.emit(value, binding.var.name)
        else:  # a variable that leaves the dataflow block
            var = self.builder_.emit_output(value, binding.var.name)
        self.set_var_remap(binding.var, var)

    def emit(self, value: relax.Expr, name: str = "") -> relax.Var:
        return self.builder_.emit(value, name)

    def value(self, expr: relax.Expr) -> relax.Expr:
        """What a variable is bound to; the expression itself where it is no variable or a parameter."""
        bound = self.lookup_binding(expr) if isinstance(expr, relax.Var) else None
        return expr if bound is None else bound

    def call_kernel(self, kernel: tirx.PrimFunc, args: Sequence[relax.Expr], out: Any) -> relax.Call:
        """call_tir on a kernel; equal kernels are stored once, under the name in their global_symbol."""
        return relax.call_tir(self.add_kernel(kernel), list(args), out)

    def add_kernel(self, kernel: tirx.PrimFunc) -> ir.GlobalVar:
        if kernel not in self._added:  # the builder finds equal ones by hashing all of their code, which takes long
            name = str(kernel.attrs["global_symbol"])
            self._added[kernel] = self.builder_.add_func(kernel.without_attr("global_symbol"), name)
        return self._added[kernel]

    def rename(self, names: Mapping[relax.Var, relax.Var]) -> None:
        """Read the new variable wherever the old one stands."""
        for old, new in names.items():
            self.set_var_remap(old, new)

    def kernel_attr(self, expr: relax.Expr, name: str) -> Any:
        """Attribute `name` of the PrimFunc that a call_tir calls, or None."""
        if not is_op(expr, "relax.call_tir"):
            return None
        attrs = self.builder_.get()[expr.args[0]].attrs
        return attrs[name] if attrs and name in attrs else None


def rewrite(
    mod: IRModule,
    rule: Rule,
    new_inputs: Sequence[relax.Var] = (),
    new_weights: Sequence[relax.Var] = (),
) -> IRModule:
    """Apply the rule to every binding of `forward`. `new_inputs` join its inputs, `new_weights` end its parameters."""
    rewriter = Rewriter(mod, rule)
    func = mod[FORWARD]
    new = rewriter.visit_expr(func)
    num_input = int(func.attrs["num_input"])
    params = [*new.params[:num_input], *new_inputs, *new.params[num_input:], *new_weights]
    new = with_params(new, params, num_input + len(new_inputs))
    rewriter.builder_.update_func(mod.get_global_var(FORWARD), new)
    return relax.transform.DeadCodeElimination([FORWARD])(rewriter.builder_.get())


def with_params(func: relax.Function, params: Sequence[relax.Var], num_input: int) -> relax.Function:
    new = relax.Function(list(params), func.body, func.ret_ty, func.is_pure, func.attrs)
    return new.with_attr("num_input", num_input)


def is_op(expr: relax.Expr | None, name: str) -> TypeGuard[relax.Call]:
    return isinstance(expr, relax.Call) and isinstance(expr.op, ir.Op) and expr.op.name == name


def is_marked(expr: relax.Expr | None, name: str) -> TypeGuard[relax.Call]:
    """Whether the expression is a marked call of the model, such as mlcgen.attention."""
    if not is_op(expr, "relax.call_pure_packed"):
        return False
    return isinstance(expr.args[0], relax.ExternFunc) and str(expr.args[0].global_symbol) == name


def bindings(mod: IRModule) -> Mapping[relax.Var, relax.Expr]:
    """Variable -> value of `forward`, in order."""
    return {b.var: b.value for block in mod[FORWARD].body.blocks for b in block.bindings}


def static_shape(expr: relax.Expr) -> tuple[int, ...]:
    return tuple(int(d) for d in expr.ty.shape)
