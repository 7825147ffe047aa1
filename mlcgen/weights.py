"""Weights from a checkpoint to an artifact: which format each is stored in, and the conversion, tensor by tensor."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm

from mlcgen.artifact import WeightWriter
from mlcgen.checkpoint import Checkpoint
from mlcgen.errors import CheckpointError
from mlcgen.formats import stored_format, wanted_format
from mlcgen.passes.lift_weights import GROUP_PARTS, Lifted
from mlcgen.passes.quantize import WeightSource
from mlcgen.passes.rewrite import FORWARD, static_shape

Array = npt.NDArray[Any]


def check_parameters(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError that names the first parameter which is missing or of another shape."""
    for name, shape in shapes.items():
        if name not in checkpoint.tensors:
            raise CheckpointError(f"{checkpoint.name} has no tensor {name!r}, which its config asks for")
        found = tuple(checkpoint.tensors[name].shape)
        if found != shape:
            raise CheckpointError(f"{checkpoint.name}: tensor {name!r} has shape {found}, its config says {shape}")


def storage_plan(
    quantization: str, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]
) -> tuple[dict[str, WeightSource], list[str]]:
    """How each matrix is stored, by parameter name, and the fallbacks that this took, in words."""
    plan: dict[str, WeightSource] = {}
    fallbacks = []
    for name, shape in shapes.items():
        if len(shape) != 2:
            continue
        wanted = wanted_format(quantization, name, dtypes[name])
        fmt = stored_format(wanted, shape)
        if fmt != wanted:
            fallbacks.append(f"{name}: {shape[1]} columns do not divide into groups, stored as {fmt.name}")
        plan[name] = WeightSource(name, fmt, quantization.startswith("gguf") and fmt.is_grouped)
    return plan, fallbacks


def stored_tensors(lifted: Lifted) -> dict[str, tuple[tuple[int, ...], str]]:
    """name -> (shape, dtype) of every tensor that the lifted function takes, in order."""
    params = lifted.forward[FORWARD].params[-len(lifted.weights) :]
    return {name: (static_shape(p), str(p.ty.dtype)) for name, p in zip(lifted.weights, params, strict=True)}


def convert_weights(
    lifted: Lifted,
    vm: Any,
    read: Callable[[str], Array],
    file: Path,
    progress: Callable[[int, int], None],
) -> None:
    """Run every transform and write its results; `vm` holds the built transform functions.

    Memory stays near the largest stack of tensors: one transform's sources and results at a time.
    """
    writer = WeightWriter(file, stored_tensors(lifted))
    try:
        for done, transform in enumerate(lifted.transforms):
            progress(done, len(lifted.transforms))
            sources = [read(name) for name in transform.sources]
            if transform.function is None:
                results: Sequence[Array] = sources
            else:
                arguments = [tvm.runtime.tensor(s) for s in sources]
                results = [np.from_dlpack(result) for result in vm[transform.function](*arguments)]
            for name, array in zip(transform.outputs, results, strict=True):
                writer.write(name, array)
        progress(len(lifted.transforms), len(lifted.transforms))
    finally:
        writer.close()


def checkpoint_reader(checkpoint: Checkpoint) -> Callable[[str], Array]:
    """Reads `<parameter>` as float32, or `<parameter>.<part>` of a matrix held in groups.

    Parts of stacked matrices are asked for in turns, so as many matrices as a pass stacks are kept.
    """
    kept: dict[str, Any] = {}

    def read(name: str) -> Array:
        parameter, _, part = name.rpartition(".")
        if part not in GROUP_PARTS:
            kept.clear()
            array = checkpoint.read(name)
            return array if array.dtype == np.float32 else array.astype(np.float32)
        if parameter not in kept:
            if len(kept) >= 3:  # q, k and v
                kept.clear()
            kept[parameter] = checkpoint.read_grouped(parameter)
        return np.ascontiguousarray(getattr(kept[parameter], part))

    return read


def random_reader(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> Callable[[str], Array]:
    """Weights that keep activations in range: N(0, 0.02) matrices, norms of one, no bias; by name, so repeatable."""

    def read(name: str) -> Array:
        shape = shapes[name]
        if len(shape) == 1:
            return np.full(shape, float(name.endswith("norm.weight")), np.float32)
        rng = np.random.default_rng([seed, *name.encode()])
        return rng.standard_normal(shape, np.float32) * np.float32(0.02)

    return read
