"""Reading a launch plan (mlcgen/launch_plan.py says what is in one): all of it is checked before any of it runs."""

import base64
import binascii
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from math import prod
from pathlib import Path
from typing import Any

from mlcgen.adapter_layout import SLOTS, AdapterLayout
from mlcgen.errors import ArtifactError
from mlcgen.runtime.sizes import MAX_DEPTH, OPERATORS, Size, evaluate
from mlcgen.schema import NUMBER, Check, Items, Kinds, Named, Optional, mismatch

VERSION = 2
ITEM_BYTES = {"float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "uint16": 2, "uint8": 1, "int64": 8}
TILED = ("float32", "float16", "uint16")  # types whose tiles the device can put in order
MAP_DTYPES = ("uint32", "float16", "bfloat16")
# What an executor gives values to, and the inputs whose arrays it fills.
SYMBOLS = frozenset({"n", "rows", "seqs", "blocks", "num_pages", "is_decode", "has_trees", "longest", "has_f16"})
INPUTS: Mapping[str, list[Size]] = {
    "input_ids": ["n"],
    "positions": ["n"],
    "slot_mapping": ["n"],
    "block_table": ["seqs", "blocks"],
    "seq_lens": ["seqs"],
    "query_start": [["+", "seqs", 1]],
    "logit_rows": ["rows"],
    "tree_masks": ["n"],
    SLOTS: ["n"],
}
# Plans of earlier versions of mlcgen have no masks, and only the one with the path of adapters has their slots.
OPTIONAL_INPUTS = ("tree_masks", SLOTS)
_SMALLEST_STEP = {"seqs": 1, "blocks": 1, "num_pages": 1, "is_decode": 1, "has_trees": 0, "longest": 1, "has_f16": 0}

_BYTES, _INDEX, _COUNT = range(1 << 48), range(1 << 31), range(1, 1 << 31)
_DTYPES = tuple(ITEM_BYTES)


def read_plan(file: Path) -> dict[str, Any]:
    """The plan, which can run without a KeyError. Raises ArtifactError for what is wrong with it."""
    try:
        plan = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse)
        version = plan["version"] if isinstance(plan, dict) and "version" in plan else None
        if type(version) is not int or version != VERSION:
            raise ArtifactError(f"it is of version {version!r:.40}, this mlcgen reads {VERSION}")
        if problem := mismatch(plan, _SCHEMA) or next(_contradictions(plan), None):
            raise ArtifactError(problem)
    except (ArtifactError, OSError, ValueError, RecursionError) as error:
        advice = "" if "compile the model again" in str(error) else "; compile the model again"
        raise ArtifactError(f"cannot read the launch plan {file}: {str(error)[:400]}{advice}") from error
    return plan


def check_fit(plan: Mapping[str, Any], manifest: Mapping[str, Any], weights: Mapping[str, Any] | None) -> None:
    """Raises ArtifactError where a plan is not this artifact's: of other pages, logits, weights or fewer sequences, so
    that a step would write past its memory. weights: arrays by name; None where the device makes them."""
    kv, pages, output = manifest["kv"], plan["pages"], plan["tensors"][plan["output"]]
    dtype = "uint16" if kv["dtype"] == "bfloat16" else kv["dtype"]
    shape = [2, kv["num_kv_heads"], kv["page_size"], kv["head_dim"]]
    parts = {
        "pages": (pages["layers"], pages["shape"], pages["dtype"]) == (kv["num_layers"], shape, dtype),
        "logits": (output["shape"], output["dtype"]) == (["rows", manifest["model"]["vocab_size"]], "float32"),
        "weights": list(plan["weights"]) == manifest["entry"]["weights"],
        "largest steps": manifest["max_batch"] <= min(plan["max_tokens_per_step"], plan["max_logit_rows"]),
    }
    for part, fits in parts.items():
        if not fits:
            raise ArtifactError(f"the launch plan's {part} do not fit the manifest; compile the model again")
    for name, array in (weights or {}).items():
        spec = plan["weights"].get(name, {"shape": list(array.shape), "dtype": str(array.dtype)})
        if (list(array.shape), str(array.dtype)) != (spec["shape"], spec["dtype"]):
            found = f"{array.dtype} {list(array.shape)}, the launch plan has {spec['dtype']} {spec['shape']}"
            raise ArtifactError(f"the tensor {name[:80]!r} is {found}; compile the model again")


def check_adapted(adapted: Mapping[str, Any], plan: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """Raises ArtifactError where the plan with the path of adapters is not this artifact's, or does not run on the same
    memory as the other one, which `check_fit` has checked."""
    layout = AdapterLayout.from_json(manifest["adapters"])
    buffers = {n: {"shape": list(shape), "dtype": layout.limits.dtype} for n, shape in layout.buffers.items()}
    shared = ("weights", "pages", "max_tokens_per_step", "max_logit_rows")
    parts = {
        "adapters": adapted.get("adapters") == buffers and "adapters" not in plan,
        "inputs": adapted["inputs"].keys() == plan["inputs"].keys() | {SLOTS} and SLOTS not in plan["inputs"],
        **{name.replace("_", " "): adapted[name] == plan[name] for name in shared},
    }
    for part, fits in parts.items():
        if not fits:
            raise ArtifactError(f"the {part} of the launch plan for adapters do not fit; compile the model again")
    check_fit(adapted, manifest, None)


def adapter_bytes(plan: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of each buffer of adapters."""
    buffers = plan.get("adapters", {})
    return {name: prod(spec["shape"]) * ITEM_BYTES[spec["dtype"]] for name, spec in buffers.items()}


def storage_bytes(plans: Sequence[Mapping[str, Any]]) -> list[int]:
    """Of each block of memory for intermediate results, so that any of the plans can run on them."""
    return [max(sizes) for sizes in zip_longest(*(plan["storages"] for plan in plans), fillvalue=0)]


def function_names(plan: Mapping[str, Any]) -> list[str]:
    """Each function that the plan launches."""
    return sorted({str(launch["function"]) for kernel in plan["kernels"] for launch in _launches(plan, kernel)})


def bound_bytes(plan: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """(name, bytes) of what kernels are given at once, but for the logits, whose rows can be fewer."""
    output = plan["tensors"][plan["output"]]["storage"]
    yield "kernels' scratch memory", plan["scratch"]
    yield from (("an intermediate result", size) for i, size in enumerate(plan["storages"]) if i != output)
    yield from (("a buffer of adapters (--adapters)", size) for size in adapter_bytes(plan).values())
    for kernel, tensors, _ in plan["steps"]:
        for launch in _launches(plan, kernel):
            yield from _bound_weights(plan, launch["args"], tensors)


def _bound_weights(plan: Mapping[str, Any], args: Sequence[Any], tensors: Sequence[int]) -> Iterator[tuple[str, int]]:
    for kind, value in args:
        if kind not in ("tensor", "part"):
            continue
        tensor = plan["tensors"][tensors[value if kind == "tensor" else value[0]]]
        if tensor["kind"] == "weights":
            spec = plan["weights"][tensor["name"]]
            whole = prod(spec["shape"]) * ITEM_BYTES[spec["dtype"]]
            yield tensor["name"], whole if kind == "tensor" else value[2]


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number")


def _is_small(value: Any) -> bool:
    return type(value) is int and abs(value) < 1 << 64


def _is_size(value: Any, depth: int = MAX_DEPTH) -> bool:
    if isinstance(value, list):
        is_call = depth > 0 and len(value) == 3 and isinstance(value[0], str) and value[0] in OPERATORS
        return is_call and all(_is_size(part, depth - 1) for part in value[1:])
    return isinstance(value, str) or (_is_small(value) and abs(value) < 1 << 62)


def _is_float(value: Any) -> bool:
    return NUMBER.accepts(value) and abs(value) < 3e38


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isascii() and value.isidentifier()


def _is_base64(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(base64.b64decode(value, validate=True))
    except (binascii.Error, ValueError):
        return False


_SIZE = Check(_is_size, "size")
_BASE64 = Check(_is_base64, "base64 of anything")
_ADDRESSES = {
    "tensor": Items(str, _INDEX),
    "part": Items(str, Items(_INDEX, _BYTES, _BYTES)),
    "scratch": Items(str, _SIZE),
}
_MAP = {
    "of": Kinds(0, _ADDRESSES),
    "dtype": MAP_DTYPES,
    "dims": [_SIZE],
    "strides": [_BYTES],
    "box": [range(1, 257)],
    "swizzle": range(4),
}
_ARGUMENTS = {
    **_ADDRESSES,
    **dict.fromkeys(("int32", "int64"), Items(str, _SIZE)),
    **dict.fromkeys(("counters", "null"), Items(str, range(1))),
    "float32": Items(str, Check(_is_float, "number")),
    "map": Items(str, _MAP),
}
_LAUNCH = {
    "function": Check(_is_name, "name of a function"),
    "grid": Items(_SIZE, _SIZE, _SIZE),
    "block": range(1, 1025),
    "shared": _SIZE,
    "args": [Kinds(0, _ARGUMENTS)],
    "overlaps": bool,
}
_TENSORS = {
    "storage": {"storage": _INDEX, "offset": _BYTES, "shape": [_SIZE], "dtype": _DTYPES},
    "input": {"name": tuple(INPUTS)},
    "weights": {"name": str},
    "adapters": {"name": str},
    "pages": {"layer": _INDEX},
    "constant": {"constant": _INDEX},
}
_INPUT = {"shape": [_SIZE], "dtype": ("int32",)}
_SCHEMA: dict[str, Any] = {
    "arch": str,
    "max_tokens_per_step": _COUNT,
    "max_logit_rows": _COUNT,
    "symbols": Named(Items(tuple(INPUTS), range(2))),
    "inputs": {name: Optional(_INPUT) if name in OPTIONAL_INPUTS else _INPUT for name in INPUTS},
    "weights": Named({"shape": [_COUNT], "dtype": ("float32", "float16", "uint16", "uint8"), "is_tiled": bool}),
    "pages": {"layers": range(1, 1 << 16), "shape": Items(*[_COUNT] * 4), "dtype": ("float32", "float16", "uint16")},
    "adapters": Optional(Named({"shape": [_COUNT], "dtype": ("float32", "float16")})),
    "storages": [_BYTES],
    "constants": [{"dtype": _DTYPES, "data": _BASE64}],
    "tensors": [Kinds("kind", _TENSORS)],
    "kernels": Named([{"when": _SIZE, "launches": [_LAUNCH]}]),
    "steps": [Items(str, [_INDEX], Named(_SIZE))],
    "output": _INDEX,
    "scratch": _BYTES,
    "counters": _BYTES,
    "module": _BASE64,
}


def _contradictions(plan: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong between the parts of a plan that fits the schema. Raises ArtifactError for sizes that have none."""
    # Intermediate results depend on no other symbols.
    largest = {**_SMALLEST_STEP, "n": plan["max_tokens_per_step"], "rows": plan["max_logit_rows"]}
    for name, spec in plan["inputs"].items():
        if spec["shape"] != INPUTS.get(name):
            yield f"inputs.{name[:80]} is of a shape that no step has"
    for name, spec in plan["weights"].items():
        if spec["is_tiled"] and (len(spec["shape"]) != 3 or spec["shape"][2] != 16 or spec["dtype"] not in TILED):
            yield f"weights.{name[:80]} is not of a shape that has tiles"
    for name, spec in [*plan["weights"].items(), *plan.get("adapters", {}).items(), ("pages", plan["pages"])]:
        if prod(spec["shape"]) not in _BYTES:
            yield f"{name[:80]} is larger than any memory"
    for i, tensor in enumerate(plan["tensors"]):
        if problem := _tensor_problem(plan, tensor, largest):
            yield f"tensors[{i}] {problem}"
    if plan["output"] >= len(plan["tensors"]) or plan["tensors"][plan["output"]]["kind"] != "storage":
        yield f"output is {plan['output']}, which is no tensor that a step computes"
    kernels = {name: _Kernel(plan, name) for name in plan["kernels"]}
    for name, kernel in kernels.items():
        if problem := kernel.problem:
            yield f"kernels.{name[:80]} {problem}"
    for i, (name, tensors, own) in enumerate(plan["steps"]):
        if name not in kernels:
            yield f"steps[{i}] calls {name[:80]!r}, which is no kernel of the plan"
        elif not all(tensor < len(plan["tensors"]) for tensor in tensors):
            yield f"steps[{i}] names a tensor that there is not"
        elif problem := kernels[name].step_problem(tensors, own, largest):
            yield f"steps[{i}] {problem}"


def _tensor_problem(plan: Mapping[str, Any], tensor: Mapping[str, Any], largest: Mapping[str, int]) -> str | None:
    kind = tensor["kind"]
    if kind in ("input", "weights", "adapters"):
        known = tensor["name"] in plan.get("inputs" if kind == "input" else kind, {})
        return None if known else f"names {tensor['name'][:80]!r}, which is not among the {kind}"
    if kind == "pages":
        return None if tensor["layer"] < plan["pages"]["layers"] else "is of a layer that there is not"
    if kind == "constant":
        return None if tensor["constant"] < len(plan["constants"]) else "is a constant that there is not"
    if tensor["storage"] >= len(plan["storages"]):
        return "lies in a storage that there is not"
    sides = [evaluate(size, largest) for size in tensor["shape"]]
    end = tensor["offset"] + prod(sides) * ITEM_BYTES[tensor["dtype"]]
    if min(sides, default=0) < 0 or end > plan["storages"][tensor["storage"]]:
        return f"of shape {str(tensor['shape'])[:80]} reaches beyond its storage"
    return None


def _launches(plan: Mapping[str, Any], kernel: str) -> Iterator[Mapping[str, Any]]:
    return (launch for variant in plan["kernels"][kernel] for launch in variant["launches"])


class _Kernel:
    """What a kernel's launches ask of the steps that call it."""

    def __init__(self, plan: Mapping[str, Any], name: str) -> None:
        launches = list(_launches(plan, name))
        arguments = [arg for launch in launches for arg in launch["args"]]
        self.maps = [value for kind, value in arguments if kind == "map"]
        addresses = [*arguments, *(each["of"] for each in self.maps)]
        tensors = [value for kind, value in addresses if kind == "tensor"]
        tensors += [value[0] for kind, value in addresses if kind == "part"]
        self.num_tensors = 1 + max(tensors, default=-1)
        self.scratch = [value for kind, value in addresses if kind == "scratch"]
        sizes = [*(v["when"] for v in plan["kernels"][name]), *(launch["shared"] for launch in launches)]
        sizes += [size for launch in launches for size in launch["grid"]] + self.scratch
        sizes += [value for kind, value in arguments if kind in ("int32", "int64")]
        sizes += [size for each in self.maps for size in each["dims"]]
        self.symbols = set().union(*map(_symbols, sizes))
        self.scratch_bytes = plan["scratch"]
        self.has_variants = bool(plan["kernels"][name])

    @property
    def problem(self) -> str | None:
        for each in self.maps:
            if not 1 <= len(each["dims"]) == len(each["box"]) == len(each["strides"]) + 1 <= 5:
                sizes = ", ".join(f"{len(each[name])} {name}" for name in ("dims", "strides", "box"))
                return f"has a map of {sizes}"
        return None if self.has_variants else "has no variant"

    def step_problem(self, tensors: list[int], own: Mapping[str, Size], largest: Mapping[str, int]) -> str | None:
        if len(tensors) < self.num_tensors:
            return f"gives {len(tensors)} tensors to a kernel that reads {self.num_tensors}"
        unknown = sorted((self.symbols - own.keys()).union(*map(_symbols, own.values())) - SYMBOLS)
        if unknown:
            return f"has no value for the symbol {unknown[0][:80]!r}"
        symbols = {**largest, **{name: evaluate(size, largest) for name, size in own.items()}}
        if not all(0 <= evaluate(offset, symbols) <= self.scratch_bytes for offset in self.scratch):
            return "uses more scratch memory than the plan sets aside"
        return None


def _symbols(size: Size) -> set[str]:
    if isinstance(size, list):
        return _symbols(size[1]) | _symbols(size[2])
    return {size} if isinstance(size, str) else set()
