"""Rotary embedding and the cache append become one kernel that reads the fused qkv projection.

reshape(split(qkv)) -> rope(q), rope(k) -> append(k, v, pages)   becomes   rope_append(qkv, cos, sin, pages) -> q, pages
A rope that stands elsewhere is written out in plain operators.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from tvm import IRModule, relax

from mlcgen.models.layers import ROPE
from mlcgen.passes.paged_attention import KvLayout
from mlcgen.passes.rewrite import Rewriter, bindings, is_marked, is_op, rewrite
from mlcgen.targets.base import Target


@dataclass(frozen=True)
class _RopeAppend:
    """What one fused kernel replaces, by the old variables."""

    q: relax.Var  # rope(q)
    appended: relax.Var
    qkv: relax.Var
    cos: relax.Var
    sin: relax.Var


def fuse_rope(mod: IRModule, layout: KvLayout, target: Target) -> IRModule:
    values = bindings(mod)
    found = _find(values)
    by_q = {f.q: f for f in found}
    by_append = {f.appended: f for f in found}
    fused: dict[relax.Var, relax.Var] = {}  # rope(q) -> (q, pages)
    appends = {f.appended: values[f.appended] for f in found}

    def rule(rewriter: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        if var in by_q:
            match = by_q[var]
            _, _, slot_mapping, pages = (rewriter.visit_expr(a) for a in appends[match.appended].args[1].fields)
            qkv, cos, sin = (rewriter.visit_expr(a) for a in (match.qkv, match.cos, match.sin))
            kernel = target.kernels.rope_append(
                int(value.ty.shape[1]), layout.num_kv_heads, layout.head_dim, layout.page_size, layout.dtype
            )
            gv = rewriter.add_kernel(kernel)
            args = [qkv, cos, sin, slot_mapping, pages]
            call = relax.call_tir_inplace(gv, args, [-1, 4], [value.ty, pages.ty])
            fused[var] = rewriter.emit(call, "rope_append")
            return relax.TupleGetItem(fused[var], 0)
        if var in by_append:
            return relax.TupleGetItem(fused[by_append[var].q], 1)
        return None

    return write_out_rope(rewrite(mod, rule))


def _find(values: Mapping[relax.Var, relax.Expr]) -> list[_RopeAppend]:
    appends = [(var, value) for var, value in values.items() if is_op(value, "relax.call_tir_inplace")]
    return [match for var, value in appends if (match := _match(values, var, value)) is not None]


def _match(values: Mapping[relax.Var, relax.Expr], appended: relax.Var, append: relax.Call) -> _RopeAppend | None:
    k, v = append.args[1].fields[:2]
    q = next((q for q in values if _is_query_of(values, q, k)), None)
    if q is None:
        return None
    found = [_split_part(values, var) for var in (values[q].args[1], values[k].args[1], v)]
    parts = [part for part in found if part is not None]
    if [index for _, index in parts] != [0, 1, 2] or len({split for split, _ in parts}) != 1:
        return None
    split = values[parts[0][0]]
    return _RopeAppend(q, appended, split.args[0], *values[q].args[2:4])


def _is_query_of(values: Mapping[relax.Var, relax.Expr], q: relax.Var, k: relax.Var) -> bool:
    """q and k are both ropes of parts of one split, with the same angles."""
    if not is_marked(values[q], ROPE) or not is_marked(values.get(k), ROPE) or q.same_as(k):
        return False
    parts = _split_part(values, values[q].args[1]), _split_part(values, values[k].args[1])
    same_split = parts[0] is not None and parts[1] is not None and parts[0][0].same_as(parts[1][0])
    return same_split and all(a.same_as(b) for a, b in zip(values[q].args[2:4], values[k].args[2:4], strict=True))


def _split_part(values: Mapping[relax.Var, relax.Expr], var: relax.Var) -> tuple[relax.Var, int] | None:
    """(the split's variable, index) behind reshape(split[index])."""
    reshape = values.get(var)
    if not is_op(reshape, "relax.reshape"):
        return None
    item = values.get(reshape.args[0])
    if not isinstance(item, relax.TupleGetItem) or not is_op(values.get(item.tuple_value), "relax.split"):
        return None
    return item.tuple_value, item.index


def write_out_rope(mod: IRModule) -> IRModule:
    """x * cos + concat(-x2, x1) * sin for each rope that is left."""

    def rule(rewriter: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        if not is_marked(value, ROPE):
            return None
        x, cos, sin = value.args[1:4]
        halves = rewriter.emit(relax.op.split(x, 2, axis=2))
        first, second = (rewriter.emit(relax.TupleGetItem(halves, i)) for i in range(2))
        turned = rewriter.emit(relax.op.concat([rewriter.emit(relax.op.negative(second)), first], axis=2))

        def wide(table: relax.Expr) -> relax.Expr:
            doubled = rewriter.emit(relax.op.concat([table, table], axis=1))  # (n, d)
            return rewriter.emit(relax.op.expand_dims(doubled, 1))

        kept, moved = (rewriter.emit(relax.op.multiply(a, wide(t))) for a, t in ((x, cos), (turned, sin)))
        return relax.op.add(kept, moved)

    return rewrite(mod, rule)
