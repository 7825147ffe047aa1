"""Weights become stored formats: every matrix W that meets the activations becomes dequantize(parts), and the parts are
computed from the checkpoint's tensors by expressions that `lift_weights` later moves out of the function."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tvm import IRModule, relax

from mlcgen.formats import WeightFormat
from mlcgen.passes.packing import dequantize, pack_groups, quantize_and_pack
from mlcgen.passes.rewrite import Rewriter, bindings, is_op, rewrite, static_shape

FORMAT = "mlcgen.dequantize"  # attribute of a dequantize PrimFunc: the format's name


@dataclass(frozen=True)
class WeightSource:
    """How one parameter of the model is read and stored."""

    name: str  # in the checkpoint
    fmt: WeightFormat
    in_groups: bool = False  # the checkpoint holds codes and scales of this very format


def quantize(mod: IRModule, sources: Mapping[str, WeightSource]) -> IRModule:
    """`sources`: variable name of each matrix -> how it is stored. Matrices stacked by a pass share one format."""
    values = bindings(mod)
    group_params: dict[str, list[relax.Var]] = {}
    done: dict[tuple[str, ...], relax.Var] = {}

    def matrices(expr: relax.Expr) -> list[relax.Var] | None:
        """The parameters that a weight expression stacks."""
        if isinstance(expr, relax.Var) and expr not in values:
            return [expr] if expr.name in sources else None
        value = values.get(expr)
        if not is_op(value, "relax.concat"):
            return None
        fields = list(value.args[0].fields)
        return fields if all(f.name in sources for f in fields) else None

    def stored(rewriter: Rewriter, expr: relax.Expr) -> relax.Var | None:
        weights = matrices(expr)
        if weights is None:
            return None
        key = tuple(w.name for w in weights)
        if key not in done:
            done[key] = _stored(rewriter, weights, [sources[name] for name in key], group_params)
        return done[key]

    def rule(rewriter: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        old = values[var]
        if is_op(value, "relax.permute_dims") and (w := stored(rewriter, old.args[0])) is not None:
            return relax.op.permute_dims(w)
        if is_op(value, "relax.take") and (w := stored(rewriter, old.args[0])) is not None:
            return relax.op.take(w, value.args[1], axis=0)
        return None

    found = [matrices(v.args[0]) for v in values.values() if is_op(v, "relax.permute_dims") or is_op(v, "relax.take")]
    for weight in (w for weights in found if weights for w in weights if sources[w.name].in_groups):
        group_params.setdefault(weight.name, _group_params(weight, sources[weight.name].fmt))
    new = [param for params in group_params.values() for param in params]
    return rewrite(mod, rule, new_weights=new)


def _group_params(weight: relax.Var, fmt: WeightFormat) -> list[relax.Var]:
    n, k = static_shape(weight)
    types = {"codes": ((n, k), "uint8"), "scale": ((n, k // fmt.group), "float16")}
    if fmt.has_minimum:
        types["minimum"] = ((n, k // fmt.group), "float16")
    return [relax.Var(f"{weight.name}.{part}", relax.TensorType(*ty)) for part, ty in types.items()]


def _stored(
    rewriter: Rewriter,
    weights: Sequence[relax.Var],
    sources: Sequence[WeightSource],
    group_params: Mapping[str, Sequence[relax.Var]],
) -> relax.Var:
    """Emit the parts of the stacked matrix and its dequantized form."""
    fmt, k = sources[0].fmt, static_shape(weights[0])[1]
    n = sum(static_shape(w)[0] for w in weights)
    build = rewriter.builder_
    if sources[0].in_groups:
        stacked = [_stack(rewriter, parts) for parts in zip(*(group_params[w.name] for w in weights), strict=True)]
        packed = build.emit_te(lambda *parts: pack_groups(fmt, *parts), *stacked, primfunc_name_hint="pack")
    else:
        matrix = _stack(rewriter, weights)
        packed = build.emit_te(lambda w: quantize_and_pack(fmt, w), matrix, primfunc_name_hint="quantize")
    parts = (
        [packed]
        if not isinstance(packed.ty, relax.TupleType)
        else [relax.TupleGetItem(packed, i) for i in range(len(packed.ty.fields))]
    )
    names = [part for part, _, _ in fmt.parts(n, k)]
    parts = [rewriter.emit(part, suffix) for part, suffix in zip(parts, names, strict=True)]
    return build.emit_te(
        lambda *p: dequantize(fmt, n, k, p), *parts, primfunc_name_hint="dequantize", primfunc_attrs={FORMAT: fmt.name}
    )


def _stack(rewriter: Rewriter, parts: Sequence[relax.Expr]) -> relax.Expr:
    return parts[0] if len(parts) == 1 else rewriter.emit(relax.op.concat(list(parts), axis=0))
