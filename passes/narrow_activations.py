"""Intermediates that only kernels pass on to each other become 16-bit floats, where writer and readers allow it.

What products multiply is rounded to 16 bits anyway, so rounding it when it is written halves the traffic. The residual
stream, which adds up the layers, stays in float32.
"""

from typing import cast

from tvm import IRModule, relax
from tvm.relax.analysis import free_vars

from mlcgen.passes.rewrite import FORWARD, Rewriter, bindings, is_op, rewrite
from mlcgen.targets.base import PlanKernels, Target
from mlcgen.targets.device_kernel import NARROW

_Tensor = tuple[relax.Var, int]  # a binding's variable, and which of its results


def narrow_activations(mod: IRModule, target: Target, preferred: str) -> IRModule:
    """preferred: the 16-bit type where several will do."""
    if not target.has_narrow_activations:
        return mod
    kernels = cast(PlanKernels, target.kernels)
    types = _narrow_types(mod, preferred)

    def rule(rewriter: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        if not _is_kernel_call(mod, value):
            return None
        written = [relax.TensorType(ty.shape, types.get((var, i), str(ty.dtype))) for i, ty in enumerate(_outs(value))]
        args = list(value.args[1].fields)
        fresh = [ty for ty, is_fresh in zip(written, _are_fresh(value), strict=True) if is_fresh]
        dtypes = [str(ty.dtype) for ty in [*(arg.ty for arg in args), *fresh]]
        gv = rewriter.add_kernel(kernels.retyped(mod[value.args[0].name_hint], dtypes))
        if is_op(value, "relax.call_tir"):
            return relax.call_tir(gv, args, written[0] if len(written) == 1 else written)
        return relax.call_tir_inplace(gv, args, [int(i) for i in value.attrs.inplace_indices], written)

    return rewrite(mod, rule)


def _narrow_types(mod: IRModule, preferred: str) -> dict[_Tensor, str]:
    """The new type of each kernel's result that gets one: one that its writer and all readers allow."""
    values = bindings(mod)
    roots: dict[relax.Var, _Tensor] = {}  # variable -> the result that it is, perhaps under another shape
    allowed: dict[_Tensor, list[list[str]]] = {}  # by the writer, then by each reader
    for var, value in values.items():
        if _is_kernel_call(mod, value):
            args = value.args[1].fields
            positions = _positions(mod, value)
            for arg, types in zip(args, positions, strict=False):
                if arg in roots:
                    allowed[roots[arg]].append(types)
            for i, types in enumerate(_results(value, positions)):
                allowed[var, i] = [types]
            roots[var] = (var, 0)
        elif isinstance(value, relax.TupleGetItem) and (value.tuple_value, value.index) in allowed:
            roots[var] = (value.tuple_value, value.index)
        elif is_op(value, "relax.reshape") and value.args[0] in roots:
            roots[var] = roots[value.args[0]]
        else:
            for used in (v for v in free_vars(value) if v in roots):
                allowed[roots[used]].append([])
    for used in (v for v in free_vars(mod[FORWARD].body.body) if v in roots):
        allowed[roots[used]].append([])
    found = {tensor: _agreed(lists, preferred) for tensor, lists in allowed.items()}
    return {tensor: dtype for tensor, dtype in found.items() if dtype}


def _agreed(allowed: list[list[str]], preferred: str) -> str:
    common = [dtype for dtype in allowed[0] if all(dtype in types for types in allowed)]
    return preferred if preferred in common else next(iter(common), "")


def _is_kernel_call(mod: IRModule, value: relax.Expr) -> bool:
    if not (is_op(value, "relax.call_tir") or is_op(value, "relax.call_tir_inplace")):
        return False
    attrs = mod[value.args[0].name_hint].attrs
    return attrs is not None and NARROW in attrs


def _positions(mod: IRModule, value: relax.Call) -> list[list[str]]:
    return [[t for t in str(types).split(",") if t] for types in mod[value.args[0].name_hint].attrs[NARROW]]


def _outs(value: relax.Call) -> list[relax.TensorType]:
    return list(value.ty.fields) if isinstance(value.ty, relax.TupleType) else [value.ty]


def _are_fresh(value: relax.Call) -> list[bool]:
    """Which results are tensors of their own, not arguments that were written to."""
    if is_op(value, "relax.call_tir"):
        return [True] * len(_outs(value))
    return [int(i) < 0 for i in value.attrs.inplace_indices]


def _results(value: relax.Call, positions: list[list[str]]) -> list[list[str]]:
    """The types that each result may have: of the positions after the arguments; of none for those written in place."""
    fresh = iter(positions[len(value.args[1].fields) :])
    return [next(fresh) if is_fresh else [] for is_fresh in _are_fresh(value)]
