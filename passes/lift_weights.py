"""Everything that depends on weights alone leaves the function: it runs once, when compiling, tensor by tensor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import tvm_ffi
from tvm import IRModule, relax
from tvm.relax.analysis import free_vars

from mlcgen.passes.rewrite import FORWARD, Rewriter, bindings, rewrite, with_params

GROUP_PARTS = ("codes", "scale", "minimum")  # `<parameter>.<part>`: a matrix that the checkpoint holds in groups


@dataclass(frozen=True)
class WeightTransform:
    """One function of a few source tensors: `function(*sources) -> (outputs…)`; equal functions are shared."""

    function: str | None  # None: the source is stored as it is, in float32
    sources: tuple[str, ...]  # names of the model's parameters
    outputs: tuple[str, ...]  # names of the stored tensors


@dataclass(frozen=True)
class Lifted:
    forward: IRModule  # `forward(*inputs, *stored tensors)`
    weights: list[str]  # names of the stored tensors, in the order of the arguments
    transforms: list[WeightTransform]
    transform_module: IRModule


def lift_weights(mod: IRModule) -> Lifted:
    """Split `forward` at the boundary between weights and activations."""
    values, func = bindings(mod), mod[FORWARD]
    num_input = int(func.attrs["num_input"])
    sources = _weight_side(values, func.params[num_input:])
    used = [v for var, value in values.items() if var not in sources for v in free_vars(value)]
    names = {v: _stored_name(v, [s.name for s in sources[v]]) for v in used if v in sources}  # in order of first use
    groups: dict[tuple[relax.Var, ...], list[relax.Var]] = {}
    for var in names:
        groups.setdefault(sources[var], []).append(var)
    transforms, module = _transforms(mod, values, groups, names)
    return Lifted(_without_weight_side(mod, names, num_input), list(names.values()), transforms, module)


def _stored_name(var: relax.Var, sources: Sequence[str]) -> str:
    """a.q_proj.weight, a.k_proj.weight -> a.q_proj+k_proj.weight.scale; a parameter that is stored as it is keeps
    its name."""
    if var.name in sources:
        return str(var.name)
    parameters = [s.rpartition(".")[0] if s.rpartition(".")[2] in GROUP_PARTS else s for s in sources]
    owners = [name.rpartition(".")[0] for name in dict.fromkeys(parameters)]
    prefix = owners[0].rpartition(".")[0]
    stacked = "+".join(owner.rpartition(".")[2] for owner in owners)
    path = [prefix, stacked, parameters[0].rpartition(".")[2], var.name.rstrip("0123456789")]
    return ".".join(name for name in path if name)


def _weight_side(
    values: Mapping[relax.Var, relax.Expr], weights: Sequence[relax.Var]
) -> dict[relax.Var, tuple[relax.Var, ...]]:
    """Each variable that depends on weights alone -> the weights it depends on."""
    sources: dict[relax.Var, tuple[relax.Var, ...]] = {w: (w,) for w in weights}
    for var, value in values.items():
        free = [v for v in free_vars(value) if isinstance(v, relax.Var)]
        if free and all(v in sources for v in free):
            sources[var] = tuple(dict.fromkeys(s for v in free for s in sources[v]))
    return sources


def _without_weight_side(mod: IRModule, names: Mapping[relax.Var, str], num_input: int) -> IRModule:
    params = {var: relax.Var(name, var.ty) for var, name in names.items()}
    mod = rewrite(mod, lambda rewriter, var, value: params.get(var), new_weights=list(params.values()))
    # What computed the weights is dead now, and so are the parameters that it read.
    func, left = mod[FORWARD], bindings(mod)
    rewriter = Rewriter(mod, lambda rewriter, var, value: None)
    rewriter.rename({var: param for var, param in params.items() if var not in left})
    func = rewriter.visit_expr(func)
    used = [*func.params[:num_input], *params.values()]
    rewriter.builder_.update_func(mod.get_global_var(FORWARD), with_params(func, used, num_input))
    return rewriter.builder_.get()


def _transforms(
    mod: IRModule,
    values: Mapping[relax.Var, relax.Expr],
    groups: Mapping[tuple[relax.Var, ...], Sequence[relax.Var]],
    names: Mapping[relax.Var, str],
) -> tuple[list[WeightTransform], IRModule]:
    transforms: list[WeightTransform] = []
    functions: dict[str, relax.Function] = {}
    module = IRModule({gv: f for gv, f in mod.functions.items() if gv.name_hint != FORWARD})
    for sources, outputs in groups.items():
        name = None
        if list(outputs) != list(sources):
            function = _slice(mod, values, sources, outputs)
            name = next((known for known, f in functions.items() if tvm_ffi.structural_equal(f, function)), None)
            if name is None:
                name = f"transform_{len(functions)}"
                functions[name] = function
                module[name] = function.with_attr("global_symbol", name)
        transforms.append(WeightTransform(name, tuple(s.name for s in sources), tuple(names[v] for v in outputs)))
    return transforms, relax.transform.DeadCodeElimination(list(functions))(module)


def _slice(
    mod: IRModule, values: Mapping[relax.Var, relax.Expr], sources: Sequence[relax.Var], outputs: Sequence[relax.Var]
) -> relax.Function:
    """The bindings that `outputs` need, as a function of `sources`."""
    needed, stack = set[relax.Var](), list(outputs)
    while stack:
        var = stack.pop()
        if var in values and var not in needed:
            needed.add(var)
            stack.extend(free_vars(values[var]))
    params = {s: relax.Var(s.name, s.ty) for s in sources}
    builder = relax.BlockBuilder()
    reader = Rewriter(mod, lambda rewriter, var, value: None)
    reader.rename(params)
    with builder.function("transform", list(params.values())):
        for var in (v for v in values if v in needed):
            reader.rename({var: builder.emit(reader.visit_expr(values[var]), var.name)})
        builder.emit_func_output(relax.Tuple([reader.visit_expr(v) for v in outputs]))
    return builder.get()["transform"].without_attr("global_symbol")
