"""What turns queries and keys and appends to the pages becomes one kernel with the attention that reads both.

rope_append(qkv, cos, sin, slots, pages) -> q, pages -> paged_attention(q, pages, ...)   becomes
rope_attention(qkv, cos, sin, slots, pages, ...) -> out, pages
for targets that have such a kernel. Where something else reads the queries or these pages, the two kernels stay.
"""

from collections import Counter
from collections.abc import Mapping
from typing import cast

from tvm import IRModule, relax, tirx
from tvm.relax.analysis import free_vars

from mlcgen.passes.rewrite import FORWARD, Rewriter, bindings, is_op, rewrite
from mlcgen.targets.base import Attention, Target, TurningKernels
from mlcgen.targets.device_kernel import KEY


def fuse_attention(mod: IRModule, target: Target) -> IRModule:
    if not target.turns_in_attention:
        return mod
    kernels = cast(TurningKernels, target.kernels)
    values = bindings(mod)
    readers = Counter(var for expr in (*values.values(), mod[FORWARD].body.body) for var in free_vars(expr))

    def rule(rewriter: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        spec = _attention(mod, kernels, values[var])
        before = None if spec is None else _before(values, readers, values[var])
        if spec is None or before is None or not _is_call_of(mod, before, _rope_append(kernels, spec)):
            return None
        rope_args = [rewriter.visit_expr(arg) for arg in before.args[1].fields]
        args = [*rope_args, *value.args[1].fields[2:]]
        gv = rewriter.add_kernel(kernels.rope_attention(spec))
        call = relax.call_tir_inplace(gv, args, [-1, 4], [value.ty, rope_args[4].ty])
        return relax.TupleGetItem(rewriter.emit(call, "rope_attention"), 0)

    return rewrite(mod, rule)


def _attention(mod: IRModule, kernels: TurningKernels, value: relax.Expr) -> Attention | None:
    """What a call of paged_attention computes; None for any other value."""
    kernel = kernels.device_kernel(mod[value.args[0]]) if is_op(value, "relax.call_tir") else None
    spec = kernel and kernel.spec
    return spec if isinstance(spec, Attention) else None


def _before(
    values: Mapping[relax.Var, relax.Expr], readers: Mapping[relax.Var, int], attention: relax.Call
) -> relax.Expr | None:
    """What gives the attention's queries and pages, as a pair that nothing else reads."""
    read = list(attention.args[1].fields[:2])
    items = [item for item in map(values.get, read) if isinstance(item, relax.TupleGetItem)]
    if [item.index for item in items] != [0, 1] or not items[0].tuple_value.same_as(items[1].tuple_value):
        return None
    pair = items[0].tuple_value
    return values[pair] if [readers[v] for v in (*read, pair)] == [1, 1, 2] else None


def _rope_append(kernels: TurningKernels, spec: Attention) -> tirx.PrimFunc:
    return kernels.rope_append(spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.page_size, spec.kv_dtype)


def _is_call_of(mod: IRModule, value: relax.Expr, kernel: tirx.PrimFunc) -> bool:
    if not is_op(value, "relax.call_tir_inplace"):
        return False
    attrs = mod[value.args[0]].attrs
    return bool(attrs and KEY in attrs and attrs[KEY] == kernel.attrs[KEY])
