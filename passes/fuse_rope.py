"""Rotary embedding and the cache append become one kernel that reads the fused qkv projection.

reshape(split(qkv)) -> rope(q), rope(k) -> append(k, v, pages)   becomes   rope_append(qkv, cos, sin, pages) -> q, pages
Where q, k and v come from products that cannot be stacked (their formats differ), a target whose cache is written by
rope_append alone has them put side by side. A rope that stands elsewhere is written out in plain operators.
"""

from collections.abc import Mapping, Sequence
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
    qkv: tuple[relax.Var, ...]  # one (n, all features), or q, k and v
    cos: relax.Var
    sin: relax.Var


def fuse_rope(mod: IRModule, layout: KvLayout, target: Target) -> IRModule:
    values = bindings(mod)
    found = _find(values, joins=not target.has_plain_append)
    by_q = {f.q: f for f in found}
    by_append = {f.appended: f for f in found}
    fused: dict[relax.Var, relax.Var] = {}  # rope(q) -> (q, pages)
    appends = {f.appended: values[f.appended] for f in found}

    def rule(rewriter: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        if var in by_q:
            match = by_q[var]
            _, _, slot_mapping, pages = (rewriter.visit_expr(a) for a in appends[match.appended].args[1].fields)
            *parts, cos, sin = (rewriter.visit_expr(a) for a in (*match.qkv, match.cos, match.sin))
            qkv = parts[0] if len(parts) == 1 else rewriter.emit(relax.op.concat(parts, axis=1))
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


def _find(values: Mapping[relax.Var, relax.Expr], joins: bool) -> list[_RopeAppend]:
    appends = [(var, value) for var, value in values.items() if is_op(value, "relax.call_tir_inplace")]
    queries = _queries(values)
    found = [_match(values, queries.get(var, []), var, value, joins) for var, value in appends]
    return [match for match in found if match is not None]


def _queries(values: Mapping[relax.Var, relax.Expr]) -> dict[relax.Var, list[relax.Var]]:
    """Pages -> what attends to them: the first two arguments of a kernel."""
    found: dict[relax.Var, list[relax.Var]] = {}
    for call in (value.args[1].fields for value in values.values() if is_op(value, "relax.call_tir")):
        if len(call) > 1:
            found.setdefault(call[1], []).append(call[0])
    return found


def _match(
    values: Mapping[relax.Var, relax.Expr],
    queries: Sequence[relax.Var],
    appended: relax.Var,
    append: relax.Call,
    joins: bool,
) -> _RopeAppend | None:
    k, v = append.args[1].fields[:2]
    q = next((q for q in queries if _turn_alike(values, q, k)), None)
    if q is None:
        return None
    heads = (values[q].args[1], values[k].args[1], v)
    parts = [part for part in (_split_part(values, var) for var in heads) if part is not None]
    if [index for _, index in parts] == [0, 1, 2] and len({split for split, _ in parts}) == 1:
        return _RopeAppend(q, appended, (values[parts[0][0]].args[0],), *values[q].args[2:4])
    rows = [row for row in (_rows(values, var) for var in heads) if row is not None]
    return _RopeAppend(q, appended, tuple(rows), *values[q].args[2:4]) if joins and len(rows) == 3 else None


def _turn_alike(values: Mapping[relax.Var, relax.Expr], q: relax.Var, k: relax.Var) -> bool:
    """q and k are both ropes, with the same angles."""
    if not is_marked(values.get(q), ROPE) or not is_marked(values.get(k), ROPE) or q.same_as(k):
        return False
    return all(a.same_as(b) for a, b in zip(values[q].args[2:4], values[k].args[2:4], strict=True))


def _rows(values: Mapping[relax.Var, relax.Expr], var: relax.Var) -> relax.Var | None:
    """What is behind a reshape of (n, features)."""
    reshape = values.get(var)
    if not is_op(reshape, "relax.reshape") or len(reshape.args[0].ty.shape) != 2:
        return None
    return reshape.args[0]


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
