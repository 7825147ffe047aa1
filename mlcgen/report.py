"""The compile report: each kernel, how it was made, how often it runs per step, and what it reads and computes."""

from math import prod
from typing import Any

import numpy as np
from tvm import IRModule, relax

from mlcgen.passes.rewrite import FORWARD, bindings, is_op
from mlcgen.passes.schedule import describe

FLOPS = "mlcgen.flops_per_token"


def kernels(mod: IRModule, num_weights: int) -> dict[str, Any]:
    """{"kernels": [...], "fallbacks": [...]} of a scheduled module whose last num_weights parameters are weights."""
    weights = set(mod[FORWARD].params[-num_weights:])
    how = describe(mod)
    found: dict[str, dict[str, Any]] = {}
    for value in bindings(mod).values():
        if not (is_op(value, "relax.call_tir") or is_op(value, "relax.call_tir_inplace")):
            continue
        name, func = value.args[0].name_hint, mod[value.args[0]]
        flops = int(func.attrs[FLOPS]) if FLOPS in func.attrs else 0
        row = {"name": name, "how": how[name], "calls": 0, "flops_per_token": flops, "weight_bytes": 0}
        row = found.setdefault(name, row)
        row["calls"] += 1
        row["weight_bytes"] += sum(_num_bytes(arg) for arg in value.args[1].fields if arg in weights)
    fallbacks = [f"{name}: {text}" for name, text in how.items() if text.startswith("fallback")]
    return {"kernels": list(found.values()), "fallbacks": fallbacks}


def _num_bytes(var: relax.Var) -> int:
    return prod(int(d) for d in var.ty.shape) * np.dtype(str(var.ty.dtype)).itemsize
