"""Several matmuls of one input become one matmul over stacked weights, split afterwards."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tvm import IRModule, relax

from mlcgen.passes.rewrite import Rewriter, is_op, rewrite, static_shape

CanStack = Callable[[Sequence[str]], bool]  # parameter names -> may their matrices be stored as one


@dataclass(frozen=True)
class Projection:
    """y = x W^T (+ bias), W a parameter."""

    result: relax.Var
    x: relax.Var
    weight: relax.Var  # (N, K)
    bias: relax.Var | None  # (N,)


def projection(values: Mapping[relax.Var, relax.Expr], result: relax.Var) -> Projection | None:
    """The projection that computes `result`, or None where it is something else."""
    value, bias = values.get(result), None
    if value is not None and is_op(value, "relax.add") and isinstance(value.args[1], relax.Var):
        if value.args[1] in values:  # not a parameter: a residual connection
            return None
        bias, value = value.args[1], values.get(value.args[0])
    if value is None or not is_op(value, "relax.matmul"):
        return None
    transposed = values.get(value.args[1])
    if transposed is None or not is_op(transposed, "relax.permute_dims") or transposed.args[0] in values:
        return None
    return Projection(result, value.args[0], transposed.args[0], bias)


def combine_matmuls(mod: IRModule, groups: Sequence[Sequence[Projection]], can_stack: CanStack) -> IRModule:
    """Replace each group of projections of one input by a single matmul and a split, in the group's order."""
    member_of = {p.result: group for group in groups if _stackable(group, can_stack) for p in group}
    parts: dict[relax.Var, relax.Expr] = {}

    def rule(rewriter: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        if var not in member_of:
            return None
        group = member_of[var]
        if var not in parts:
            x = value.args[0] if group[0].bias is None else rewriter.value(value.args[0]).args[0]
            parts.update(zip((p.result for p in group), _stacked(rewriter, x, group), strict=True))
        return parts[var]

    return rewrite(mod, rule)


def _stackable(group: Sequence[Projection], can_stack: CanStack) -> bool:
    same_input = all(p.x.same_as(group[0].x) for p in group)
    same_bias = len({p.bias is None for p in group}) == 1
    distinct = len({p.result for p in group}) == len(group)
    return same_input and same_bias and distinct and can_stack([p.weight.name for p in group])


def _stacked(rewriter: Rewriter, x: relax.Expr, group: Sequence[Projection]) -> list[relax.Expr]:
    weight = rewriter.emit(relax.op.concat([p.weight for p in group], axis=0), "stacked")
    out = rewriter.emit(relax.op.matmul(x, rewriter.emit(relax.op.permute_dims(weight))), "stacked_out")
    if group[0].bias is not None:
        bias = rewriter.emit(relax.op.concat([p.bias for p in group], axis=0), "stacked_bias")
        out = rewriter.emit(relax.op.add(out, bias), "stacked_out")
    ends, total = [], 0
    for p in group[:-1]:
        total += static_shape(p.weight)[0]
        ends.append(total)
    split = rewriter.emit(relax.op.split(out, ends, axis=1), "split")
    return [relax.TupleGetItem(split, i) for i in range(len(group))]
