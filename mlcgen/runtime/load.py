"""From an artifact's path to an executor that is ready to run: choose a target, check the files, map the weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mlcgen import artifact
from mlcgen.errors import ArtifactError, TargetError
from mlcgen.runtime.cpu import host_arch, host_features
from mlcgen.runtime.executor import Executor
from mlcgen.runtime.vm_executor import KV_STORAGE, VmExecutor, load_runtime_library

MEMORY_SHARE = 0.5  # of what is free, for pages, when the user names no number


@dataclass(frozen=True)
class LoadedModel:
    executor: Executor
    tokenizer_path: Path | None
    tokenizer_config: dict[str, Any]
    eos_token_ids: list[int]
    context_length: int
    max_batch: int
    target: str


def load_executor(
    path: str | Path,
    target: str = "auto",
    num_pages: int | None = None,
    max_batch: int | None = None,
    num_threads: int | None = None,
) -> LoadedModel:
    """Load the artifact at `path`. num_pages: pages of the KV cache; None takes what the batch can use, at most half
    of the free memory. Raises ArtifactError for damage, TargetError where nothing in it runs here."""
    manifest = artifact.read_manifest(path)
    entry = choose_target(manifest["targets"], target)
    library = artifact.check_hash(path, entry)
    weights = artifact.map_weights(artifact.check_hash(path, manifest["weights"][0]))
    missing = [name for name in manifest["entry"]["weights"] if name not in weights]
    if missing:
        raise ArtifactError(f"{path} lacks the tensor {missing[0]!r}; compile the model again")
    load_runtime_library(_carried_runtime(path, manifest))
    batch = _batch(manifest, max_batch)
    pages = num_pages or default_num_pages(manifest, batch)
    executor = VmExecutor(library, manifest, weights, pages, num_threads)
    config = artifact.read_tokenizer_config(path)
    eos = [int(token) for token in manifest["model"].get("eos_token_ids", [])]
    return LoadedModel(
        executor, artifact.tokenizer_path(path), config, eos, manifest["context_length"], batch, entry["name"]
    )


def _batch(manifest: Mapping[str, Any], wanted: int | None) -> int:
    """Sequences per step. Memory was planned for what was compiled, so more would write past it."""
    compiled = int(manifest["max_batch"])
    if wanted is not None and not 1 <= wanted <= compiled:
        raise ArtifactError(
            f"max_batch {wanted} is not between 1 and the {compiled} that this artifact was compiled for"
        )
    return wanted or compiled


def choose_target(entries: Sequence[Mapping[str, Any]], wanted: str) -> Mapping[str, Any]:
    """The entry for this machine that uses the most of its features, or the named one."""
    problems = {str(e["name"]): cannot_run(e) for e in entries}
    if wanted != "auto" and wanted not in problems:
        raise TargetError(f"target {wanted!r} is not in this artifact; it has: {', '.join(problems)}")
    able = [e for e in entries if wanted in ("auto", e["name"]) and problems[str(e["name"])] is None]
    if not able:
        reasons = "; ".join(f"{name}: {why}" for name, why in problems.items() if wanted in ("auto", name))
        raise TargetError(f"this artifact has no target that runs here ({reasons}); compile it for this machine")
    return max(able, key=lambda e: len(e.get("features", ())))


def cannot_run(entry: Mapping[str, Any]) -> str | None:
    """Why this machine cannot run a target's entry, or None."""
    machine = host_arch()
    if entry.get("executor") != "vm":
        return f"executor {entry.get('executor')!r} is not in this version"
    if entry.get("arch") != machine:
        return f"needs {entry.get('arch')}, this is {machine}"
    missing = sorted(set(entry.get("features", ())) - host_features())
    return f"this CPU has no {', '.join(missing)}" if missing else None


def page_bytes(kv: Mapping[str, Any]) -> int:
    """Bytes of one page over all layers."""
    shape = (kv["num_layers"], 2, kv["num_kv_heads"], kv["page_size"], kv["head_dim"])
    return prod(int(d) for d in shape) * np.dtype(KV_STORAGE[kv["dtype"]]).itemsize


def default_num_pages(manifest: Mapping[str, Any], max_batch: int) -> int:
    useful = max_batch * -(-int(manifest["context_length"]) // int(manifest["kv"]["page_size"]))
    affordable = int(free_memory() * MEMORY_SHARE) // page_bytes(manifest["kv"])
    return max(1, min(useful, affordable))


def free_memory() -> int:
    """Bytes that this machine can give: MemAvailable, or all of it where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return 8 << 30


def _carried_runtime(path: str | Path, manifest: Mapping[str, Any]) -> Path | None:
    for entry in manifest.get("runtime_libraries", ()):
        if entry.get("arch") == host_arch():
            return artifact.check_hash(path, entry)
    return None
