"""Adapters as PEFT saves them, a folder with adapter_config.json and adapter_model.safetensors, read strictly."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcgen import safetensors
from mlcgen.adapter_layout import AdapterLayout, AdapterLimits, ProjectionGroup, num_tiles
from mlcgen.errors import CheckpointError, UnsupportedError
from mlcgen.formats import TILE
from mlcgen.json_file import read_object
from mlcgen.runtime import bfloat16
from mlcgen.safetensors import Entry

__all__ = ["Matrices", "read_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG = 1 << 20  # bytes
Array = npt.NDArray[Any]
Matrices = list[tuple[Array, Array]]  # lora_a and lora_b of each group, one slot of them

_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_STORAGE = {"F32": "float32", "F16": "float16", "BF16": "uint16"}
# Fields that would change the result: what they may be.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "modules_to_save": (None, []),
    "lora_bias": (None, False),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    # Others, such as pissa, change the model's own weights too.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}
_HARMLESS = ("use_rslora", "eva_config", "megatron_config")  # the first is honoured, the others are of training


@dataclass(frozen=True)
class _Config:
    path: Path
    rank: int
    alpha: float
    ranks: Mapping[str, int]  # of modules, where they differ
    alphas: Mapping[str, float]
    has_root_scale: bool  # rsLoRA (Kalajdzievski, 2023)

    def rank_of(self, module: str) -> int:
        return int(_of(self.ranks, module, self.rank))

    def scale_of(self, module: str) -> float:
        rank = self.rank_of(module)
        return float(_of(self.alphas, module, self.alpha)) / (math.sqrt(rank) if self.has_root_scale else rank)


def read_adapter(path: str | Path, layout: AdapterLayout) -> Matrices:
    """The adapter in the folder `path` as it lies in one slot: (lora_a, lora_b) of each group, the scale in lora_b.

    Raises CheckpointError for what is missing or damaged, UnsupportedError for what is no plain LoRA, of a larger rank
    than the artifact was compiled for, or of modules that the artifact does not have.
    """
    path = Path(path)
    config = _read_config(path / CONFIG)
    if not (path / WEIGHTS).exists():
        found = "adapter_model.bin, which may hold code" if (path / "adapter_model.bin").exists() else "no weights"
        raise CheckpointError(f"{path} has {found}; save the adapter as {WEIGHTS} (PEFT's save_pretrained does)")
    modules = _modules(path / WEIGHTS, layout.groups)
    return [_packed(group, layout.limits, config, modules) for group in layout.groups]


def _read_config(file: Path) -> _Config:
    if not file.exists():
        raise CheckpointError(f"{file.parent} is no adapter: it has no {CONFIG}; name a folder that PEFT saved")
    fields = read_object(file, CheckpointError, "save the adapter again", MAX_CONFIG)
    _check_plain(file, fields)
    rank, alpha = fields.get("r"), fields.get("lora_alpha")
    if not _is_rank(rank):
        raise CheckpointError(f"{file}: r is {rank!r:.40}, not a positive integer")
    if not _is_number(alpha):
        raise CheckpointError(f"{file}: lora_alpha is {alpha!r:.40}, not a number")
    ranks = _pattern(file, fields, "rank_pattern", _is_rank)
    alphas = _pattern(file, fields, "alpha_pattern", _is_number)
    return _Config(file, rank, alpha, ranks, alphas, bool(fields.get("use_rslora")))  # type: ignore[arg-type]


def _check_plain(file: Path, fields: Mapping[str, Any]) -> None:
    for name, allowed in _PLAIN.items():
        value = fields.get(name)
        if not any(type(value) is type(each) and value == each for each in allowed):
            raise UnsupportedError(f"{file}: {name} is {value!r:.60}; only plain LoRA is supported: train it without")
    for name, value in fields.items():  # use_dora, kasa_config, and what may follow
        if (name.startswith("use_") or name.endswith("_config")) and name not in _HARMLESS and value:
            raise UnsupportedError(
                f"{file}: {name[:40]} is {value!r:.40}; only plain LoRA is supported: train it without"
            )


def _is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value < 1 << 31


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9  # type: ignore[arg-type]


def _pattern(file: Path, fields: Mapping[str, Any], name: str, is_valid: Any) -> dict[str, Any]:
    """Module names, or their ends, -> value. PEFT takes regular expressions too; those of names alone are honoured."""
    pattern = fields.get(name) or {}
    if not isinstance(pattern, dict) or not all(map(is_valid, pattern.values())):
        raise CheckpointError(f"{file}: {name} is {pattern!r:.60}, not an object of numbers")
    for key in pattern:
        if not re.fullmatch(r"[A-Za-z0-9_.]+", key):
            raise UnsupportedError(f"{file}: {name} has the regular expression {key[:40]!r}; name the modules instead")
    return pattern


def _of(pattern: Mapping[str, Any], module: str, default: float) -> float:
    """The first entry that is for the module, as PEFT finds it."""
    return next((v for key, v in pattern.items() if module == key or module.endswith(f".{key}")), default)


def _modules(file: Path, groups: Sequence[ProjectionGroup]) -> dict[str, dict[str, Entry]]:
    """Module -> its "A" and "B"; all of the file's tensors."""
    known = {name for group in groups for name in group.projections}
    modules: dict[str, dict[str, Entry]] = {}
    for name, entry in safetensors.read_entries(file).items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise UnsupportedError(f"{file} has the tensor {name[:80]!r}, which is no part of a plain LoRA")
        module, part = match.groups()
        if module not in known:
            kinds = ", ".join(sorted({each.rpartition(".")[2] for each in known}))
            raise UnsupportedError(
                f"{file} adapts {module[:80]!r}; the artifact takes adapters of each layer's {kinds}"
            )
        modules.setdefault(module, {})[part] = entry
    for module, parts in modules.items():
        if len(parts) != 2:
            raise CheckpointError(f"{file} has lora_{next(iter(parts))} of {module}, but not the other matrix")
    if not modules:
        raise CheckpointError(f"{file} has no tensors")
    return modules


def _packed(
    group: ProjectionGroup, limits: AdapterLimits, config: _Config, modules: Mapping[str, Mapping[str, Entry]]
) -> tuple[Array, Array]:
    a = np.zeros((group.a_shape(limits)[1] * TILE, group.in_features), np.float32)
    b = np.zeros((group.b_shape(limits)[1] * TILE, limits.rank), np.float32)
    row = 0
    for part, (name, features) in enumerate(zip(group.projections, group.out_features, strict=True)):
        if name in modules:
            rank = config.rank_of(name)
            if rank > limits.rank:
                raise UnsupportedError(
                    f"{config.path}: rank {rank} of {name} is beyond the {limits.rank} that this artifact was compiled "
                    f"for; compile it again with --lora-rank {rank}"
                )
            first = part * limits.rank
            a[first : first + rank] = _read(modules[name]["A"], (rank, group.in_features), name)
            b[row : row + features, :rank] = _read(modules[name]["B"], (features, rank), name) * config.scale_of(name)
        row += num_tiles(features) * TILE
    return tuple(_stored(matrix, limits.dtype, config.path) for matrix in (a, b))  # type: ignore[return-value]


def _read(entry: Entry, shape: tuple[int, ...], module: str) -> npt.NDArray[np.float32]:
    if entry.shape != shape:
        raise CheckpointError(f"{entry.path}: a matrix of {module} has shape {entry.shape}, not {shape}")
    if entry.dtype not in _STORAGE:
        raise UnsupportedError(f"{entry.path}: {module} is stored as {entry.dtype}; have: {', '.join(_STORAGE)}")
    array = safetensors.read_tensor(entry, _STORAGE[entry.dtype])
    if entry.dtype == "BF16":
        return bfloat16.to_float32(array)
    return array.astype(np.float32)


def _stored(matrix: npt.NDArray[np.float32], dtype: str, path: Path) -> Array:
    """(rows, columns) as tiles of 16 rows, (tiles, columns, 16)."""
    with np.errstate(over="ignore"):
        stored = matrix.astype(dtype)
    if not np.isfinite(stored).all():
        raise CheckpointError(f"{path.parent}: its weights are not finite in {dtype}")
    return np.ascontiguousarray(stored.reshape(-1, TILE, matrix.shape[1]).transpose(0, 2, 1))
