"""The path of low-rank adapters: each token's y = x W^T becomes y + x A^T B^T with the A and B in its slot.

y = matmul(x, W^T) [+ bias] [+ residual]   becomes   y = low_rank(x, slots, A, B, y), in place

for every projection, q, k and v or gate and up being one by now. Where a product computes its own SwiGLU
(Target.gates_results), its path comes in between, so the path's kernel computes it:

silu(gate) * up of y = …                  becomes   low_rank(x, slots, A, B, y)

The function gains the inputs

  adapter_slots (n,) int32               the slot of each token's adapter, -1: none
  lora_a_<group>, lora_b_<group>         as in mlcgen/adapter_layout.py

and says in an attribute which projections each group has.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from tvm import IRModule, relax
from tvm.relax.analysis import free_vars

from mlcgen.adapter_layout import SLOTS, AdapterLimits, ProjectionGroup
from mlcgen.formats import VOCABULARY
from mlcgen.passes.fuse_gate_up import gate_up_of
from mlcgen.passes.rewrite import FORWARD, Rewriter, bindings, is_op, rewrite, static_shape
from mlcgen.targets.base import LowRank, Target

GROUPS = "mlcgen.adapters"  # attribute of the function: its groups, as JSON


@dataclass(frozen=True)
class _Projection:
    """A product and what is added to it, by the old variables."""

    product: relax.Var
    end: relax.Var  # with bias and residual
    group: ProjectionGroup


def add_adapters(mod: IRModule, limits: AdapterLimits, target: Target) -> IRModule:
    found = _projections(mod)
    tokens = mod[FORWARD].params[0].ty.shape[0]
    slots = relax.Var(SLOTS, relax.TensorType((tokens,), "int32"))
    buffers = [_buffers(i, p.group, limits) for i, p in enumerate(found)]
    by_product = {p.product: p for p in found}
    by_end = {p.end: (p, pair) for p, pair in zip(found, buffers, strict=True)}
    gated = _gated(mod) if target.gates_results else {}
    gates = set(gated.values())
    inputs: dict[relax.Var, relax.Expr] = {}  # product -> its x
    sums: dict[relax.Var, relax.Var] = {}  # end -> its y, without the path

    def rule(rewriter: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        if var in by_product:
            inputs[var] = value.args[0]
        if var in by_end and var in gates:
            sums[var] = rewriter.emit(value)
            return sums[var]
        end = gated.get(var, var)
        if end not in by_end:
            return None
        projection, pair = by_end[end]
        spec, args = _with_input(rewriter, projection.group, limits, inputs[projection.product], target)
        if var in gated:
            kernel = rewriter.add_kernel(target.kernels.low_rank(replace(spec, gates_result=True)))
            return relax.call_tir(kernel, [*args, slots, *pair, sums[end]], value.ty)
        args += [slots, *pair, rewriter.emit(value)]
        kernel = rewriter.add_kernel(target.kernels.low_rank(spec))
        return relax.call_tir_inplace(kernel, args, [len(args) - 1], [value.ty])

    mod = rewrite(mod, rule, new_inputs=[slots, *(var for pair in buffers for var in pair)])
    text = json.dumps([asdict(p.group) for p in found])
    mod.update_func(mod.get_global_var(FORWARD), mod[FORWARD].with_attr(GROUPS, text))
    return mod


def adapter_groups(mod: IRModule) -> tuple[ProjectionGroup, ...]:
    """What the pass has said of the function."""
    groups = json.loads(str(mod[FORWARD].attrs[GROUPS]))
    return tuple(ProjectionGroup(tuple(g["projections"]), g["in_features"], tuple(g["out_features"])) for g in groups)


def _projections(mod: IRModule) -> list[_Projection]:
    """Every product with weights but that with the vocabulary."""
    values = bindings(mod)
    readers = _readers(values)
    found: dict[relax.Var, _Projection] = {}  # by their ends
    for var, value in values.items():
        weights = _weights(values, value)
        if weights and not any(w.name in VOCABULARY for w in weights):
            end = _end(values, readers, var)
            end = var if end in found else end  # a sum of two products
            found[end] = _Projection(var, end, _group(weights))
    return list(found.values())


def _readers(values: Mapping[relax.Var, relax.Expr]) -> Mapping[relax.Var, list[relax.Var]]:
    readers: dict[relax.Var, list[relax.Var]] = {}
    for var, value in values.items():
        for read in free_vars(value):
            readers.setdefault(read, []).append(var)
    return readers


def _gated(mod: IRModule) -> dict[relax.Var, relax.Var]:
    """SwiGLU's result -> the gate and up that it is of, which nothing else reads."""
    values = bindings(mod)
    readers = _readers(values)
    found: dict[relax.Var, relax.Var] = {}
    for var, value in values.items():
        gate_up = gate_up_of(lambda expr: values.get(expr, expr), value)
        if gate_up is None:
            continue
        before = [gate_up]  # and what is computed of it before the result
        for each in before:
            before += [reader for reader in readers.get(each, []) if not reader.same_as(var)]
        if len(before) == len(("gate_up", "split", "gate", "up", "silu")):
            found[var] = gate_up
    return found


def _group(weights: Sequence[relax.Var]) -> ProjectionGroup:
    shapes = [static_shape(w) for w in weights]
    names = tuple(str(w.name).removesuffix(".weight") for w in weights)
    return ProjectionGroup(names, shapes[0][1], tuple(n for n, _ in shapes))


def _weights(values: Mapping[relax.Var, relax.Expr], value: relax.Expr) -> list[relax.Var]:
    """The matrices, stacked, that a product is with; none for other values."""
    transposed = values.get(value.args[1]) if is_op(value, "relax.matmul") else None
    if transposed is None or not is_op(transposed, "relax.permute_dims"):
        return []
    weight = transposed.args[0]
    if weight not in values:
        return [weight]
    stacked = values[weight]
    fields = list(stacked.args[0].fields) if is_op(stacked, "relax.concat") else []
    return fields if all(field not in values for field in fields) else []


def _end(
    values: Mapping[relax.Var, relax.Expr], readers: Mapping[relax.Var, list[relax.Var]], var: relax.Var
) -> relax.Var:
    """The last sum that follows a product which nothing else reads: the kernel of the product computes them all."""
    while len(users := readers.get(var, [])) == 1 and is_op(values[users[0]], "relax.add"):
        var = users[0]
    return var


def _with_input(
    rewriter: Rewriter, group: ProjectionGroup, limits: AdapterLimits, x: relax.Expr, target: Target
) -> tuple[LowRank, list[relax.Expr]]:
    """The kernel computes the norm or the gate of its input itself, as the product's does (fuse_linear)."""
    value, sizes = rewriter.value(x), (group.in_features, group.out_features, limits)
    if is_op(value, "relax.nn.rms_norm") and len(value.ty.shape) == 2 and [int(a) for a in value.attrs.axes] == [-1]:
        return LowRank(*sizes, norm_eps=float(value.attrs.epsilon)), list(value.args)
    gate_up = None if target.gates_results else gate_up_of(rewriter.value, value)
    return (LowRank(*sizes), [x]) if gate_up is None else (LowRank(*sizes, is_gated=True), [gate_up])


def _buffers(index: int, group: ProjectionGroup, limits: AdapterLimits) -> tuple[relax.Var, relax.Var]:
    shapes = {"lora_a": group.a_shape(limits), "lora_b": group.b_shape(limits)}
    a, b = (relax.Var(f"{name}_{index}", relax.TensorType(shape, limits.dtype)) for name, shape in shapes.items())
    return a, b
