"""A Relax function whose memory is planned, as a launch plan: data that a small interpreter runs, without TVM.

plan.json:
  symbols    symbol -> [input, dimension] that gives its value
  inputs     name -> {shape, dtype}: what a step brings
  weights    name -> {shape, dtype, is_tiled}: in the order of the artifact's entry; is_tiled: rows to be put in order
  pages      shape and dtype of each layer's KV pages, and how many there are
  adapters   name -> {shape, dtype}: the buffers of low-rank adapters, in the plan with their path alone
  storages   bytes of each block of memory, for the largest step
  constants  base64 of each constant, with its dtype
  tensors    where each intermediate lies: {kind: storage | input | weights | pages | adapters | constant, ...}
  kernels    name -> variants: [{when, launches: [{function, grid, block, shared, args, overlaps}]}]
  steps      [kernel, [tensor, ...], {symbol of the kernel: size}] in order
  output     the tensor of the logits
  max_tokens_per_step, max_logit_rows
  scratch, counters   bytes
  module     base64 of the machine code, or for WebGPU of JSON: function -> WGSL
Sizes are expressions as in runtime/sizes.py.
"""

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, cast

import numpy as np
from tvm import IRModule, ir, relax, tirx

from mlcgen.errors import CompileError
from mlcgen.passes.rewrite import FORWARD, bindings, is_op
from mlcgen.runtime.plan import ITEM_BYTES, VERSION
from mlcgen.runtime.sizes import Size, evaluate
from mlcgen.targets.base import PlanKernels, Target
from mlcgen.targets.device_kernel import Code, Variant
from mlcgen.targets.tvm_codegen import size_of


def launch_plan(
    mod: IRModule, target: Target, weight_names: Sequence[str], bounds: Mapping[str, int]
) -> tuple[dict[str, Any], dict[str, dict[str, int]]]:
    """(the plan, registers and spills of each function) of a module after memory planning."""
    kernels = cast(PlanKernels, target.kernels)
    builder = _Builder(mod, weight_names, bounds, target.reads_plain_rows)
    builder.walk()
    codes = _codes(mod, kernels, builder.kernel_types)
    module, resources = kernels.build(codes)
    sizes = {**bounds, "blocks": 1, "longest": 1 << 20, "is_decode": 1, "has_trees": 0, "num_pages": 1}
    plan = builder.plan() | {
        "version": VERSION,
        "arch": target.arch,
        "max_tokens_per_step": bounds["n"],
        "max_logit_rows": bounds["rows"],
        "kernels": {name: [_variant(v, target) for v in code.variants] for name, code in codes.items()},
        "scratch": max((evaluate(code.scratch, sizes) for code in codes.values()), default=0),
        "counters": max((evaluate(code.counters, sizes) for code in codes.values()), default=0),
        "module": base64.b64encode(module).decode(),
    }
    return plan, resources


def variants(plan: Mapping[str, Any], kernel: str) -> list[list[Any]]:
    """[for which steps, the functions that run] of a kernel, for the compile report."""
    return [[v["when"], [launch["function"] for launch in v["launches"]]] for v in plan["kernels"][kernel]]


def _codes(mod: IRModule, kernels: PlanKernels, types: Mapping[str, list[str]]) -> dict[str, Code]:
    """The code of every kernel that is called."""
    functions = {name: mod[name] for name in types}
    found = {name: kernels.device_kernel(func) for name, func in functions.items()}
    codes = {name: kernel.generate(types[name]) for name, kernel in found.items() if kernel is not None}
    return codes | kernels.generate({n: f for n, f in functions.items() if found[n] is None})


def _variant(variant: Variant, target: Target) -> dict[str, Any]:
    launches = [dataclasses.asdict(launch) for launch in variant.launches]
    for launch in launches:
        launch["overlaps"] = launch["overlaps"] and target.overlaps_kernels
    return {"when": variant.when, "launches": launches}


class _Builder:
    """Walks the function's bindings: allocations, calls of kernels, and other names of tensors."""

    def __init__(
        self, mod: IRModule, weight_names: Sequence[str], bounds: Mapping[str, int], reads_plain_rows: bool
    ) -> None:
        self.mod, self.func, self.bounds, self.reads_plain_rows = mod, mod[FORWARD], bounds, reads_plain_rows
        self.weight_names = weight_names
        self.storages: list[int] = []
        self.tensors: list[dict[str, Any]] = []
        self.constants: list[dict[str, str]] = []
        self.steps: list[list[Any]] = []
        self.kernel_types: dict[str, list[str]] = {}
        self.inputs: dict[str, dict[str, Any]] = {}
        self.weights: dict[str, dict[str, Any]] = {}
        self.pages: dict[str, Any] = {}
        self.adapters: dict[str, dict[str, Any]] = {}
        self.symbols: dict[str, list[Any]] = {}
        self._index: dict[Any, int] = {}  # variable -> tensor
        self._storage_of: dict[relax.Var, int] = {}

    def walk(self) -> None:
        self._parameters()
        for var, value in bindings(self.mod).items():
            self._binding(var, value)
        self.output = self._tensor(self.func.body.body)

    def plan(self) -> dict[str, Any]:
        names = ("symbols", "inputs", "weights", "pages", "storages", "constants", "tensors", "steps", "output")
        return {name: getattr(self, name) for name in names} | ({"adapters": self.adapters} if self.adapters else {})

    def _parameters(self) -> None:
        params = list(self.func.params)
        weights = params[len(params) - len(self.weight_names) :]
        for var in params[: len(params) - len(self.weight_names)]:
            if var.name.startswith("pages_"):
                self._add(var, {"kind": "pages", "layer": int(var.name.removeprefix("pages_"))})
                shape = [int(d) for d in list(var.ty.shape)[1:]]
                self.pages = {"layers": self.pages.get("layers", 0) + 1, "shape": shape, "dtype": str(var.ty.dtype)}
                continue
            if var.name.startswith(("lora_a_", "lora_b_")):
                self._add(var, {"kind": "adapters", "name": var.name})
                self.adapters[var.name] = {"shape": [int(d) for d in var.ty.shape], "dtype": str(var.ty.dtype)}
                continue
            shape = [size_of(d) for d in var.ty.shape]
            self.inputs[var.name] = {"shape": shape, "dtype": str(var.ty.dtype)}
            for axis, size in enumerate(shape):
                if isinstance(size, str):
                    self.symbols.setdefault(size, [var.name, axis])
            self._add(var, {"kind": "input", "name": var.name})
        for name, var in zip(self.weight_names, weights, strict=True):
            shape = [int(d) for d in var.ty.shape]
            has_tiles = len(shape) == 3 and not name.endswith((".scale", ".minimum"))
            is_tiled = self.reads_plain_rows and has_tiles
            self.weights[name] = {"shape": shape, "dtype": str(var.ty.dtype), "is_tiled": is_tiled}
            self._add(var, {"kind": "weights", "name": name})

    def _binding(self, var: relax.Var, value: relax.Expr) -> None:
        if is_op(value, "relax.memory.alloc_storage"):
            self._storage_of[var] = self._new_storage(int(value.args[0].values[0]))
        elif is_op(value, "relax.memory.alloc_tensor"):
            storage = self._storage_of[value.args[0]]
            self._add(var, {"kind": "storage", "storage": storage, "offset": int(value.args[1].value)} | _type_of(var))
        elif is_op(value, "relax.builtin.alloc_tensor"):
            shape = [evaluate(size_of(d), self.bounds) for d in value.args[0].values]
            storage = self._new_storage(prod(shape) * ITEM_BYTES[str(value.args[1].value)])
            self._add(var, {"kind": "storage", "storage": storage, "offset": 0} | _type_of(var))
        elif isinstance(value, relax.Call) and isinstance(value.op, ir.GlobalVar):
            self._call(value)
        elif is_op(value, "relax.reshape"):
            self._index[var] = self._tensor(value.args[0])
        elif isinstance(value, relax.Var):
            self._index[var] = self._tensor(value)
        else:
            raise CompileError(f"a launch plan has no place for {str(value)[:200]}")

    def _call(self, call: relax.Call) -> None:
        name = call.op.name_hint
        args = [self._tensor(arg) for arg in call.args]
        self.steps.append([name, args, self._symbols(self.mod[call.op], call.args)])
        self.kernel_types.setdefault(name, [str(arg.ty.dtype) for arg in call.args])

    def _symbols(self, kernel: tirx.PrimFunc, args: Sequence[relax.Expr]) -> dict[str, Size]:
        """The kernel's own symbols by the shapes of its arguments, where the two have different names."""
        found: dict[str, Size] = {}
        for param, arg in zip(kernel.params, args, strict=True):
            for own, given in zip(param.ty.shape, arg.ty.shape, strict=True):
                if isinstance(own, tirx.Var):
                    found.setdefault(str(own.name), size_of(given))
        return {name: size for name, size in found.items() if size != name}

    def _tensor(self, expr: relax.Expr) -> int:
        if isinstance(expr, ir.GenericConst):
            array = np.ascontiguousarray(expr.value.numpy())
            text = base64.b64encode(array.tobytes()).decode()
            self.constants.append({"dtype": str(array.dtype), "data": text})
            return self._add(expr, {"kind": "constant", "constant": len(self.constants) - 1})
        return self._index[expr]

    def _add(self, key: Any, tensor: dict[str, Any]) -> int:
        self.tensors.append(tensor)
        if isinstance(key, relax.Var):
            self._index[key] = len(self.tensors) - 1
        return len(self.tensors) - 1

    def _new_storage(self, num_bytes: int) -> int:
        self.storages.append(num_bytes)
        return len(self.storages) - 1


def _type_of(var: relax.Var) -> dict[str, Any]:
    return {"shape": [size_of(d) for d in var.ty.shape], "dtype": str(var.ty.dtype)}
