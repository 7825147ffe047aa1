"""From an artifact's path to an executor that is ready to run: choose a target, check the files, map the weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcgen import artifact
from mlcgen.errors import ArtifactError
from mlcgen.runtime.cpu import host_arch
from mlcgen.runtime.executor import Executor
from mlcgen.runtime.heavy_hitters import KeyLayout
from mlcgen.runtime.kv_size import page_bytes, useful_pages
from mlcgen.runtime.load_plan import load_plan
from mlcgen.runtime.mapped_layers import MappedLayers
from mlcgen.runtime.offload import divide, num_bytes
from mlcgen.runtime.target_choice import choose_target
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
    window: int  # last tokens that the model sees from a token; 0: all
    keys: KeyLayout


def load_executor(
    path: str | Path,
    target: str = "auto",
    num_pages: int | None = None,
    max_batch: int | None = None,
    num_threads: int | None = None,
    gpu_memory_utilization: float = 0.9,
    weight_memory: int | str | None = None,
) -> LoadedModel:
    """Load the artifact at `path`.

    num_pages: pages of the KV cache; None takes what the batch can use, at most half of the free memory, or what
    `gpu_memory_utilization` of a GPU's memory leaves after weights and workspace.
    weight_memory: bytes ("4GiB" too) that weights may take of the device's memory, or of a CPU's; layers that do not
    fit are streamed in each step. None: all are there.
    Raises ArtifactError for damage, TargetError where nothing in it runs here, DeviceError where memory is short,
    RequestError for a weight_memory that is no size.
    """
    budget = None if weight_memory is None else num_bytes(weight_memory)
    manifest = artifact.read_manifest(path)
    entry = choose_target(manifest["targets"], target)
    library = artifact.check_hash(path, entry)
    weights_file = artifact.check_hash(path, manifest["weights"][0]) if manifest["weights"] else None
    weights = artifact.map_weights(weights_file) if weights_file else None
    missing = [name for name in manifest["entry"]["weights"] if weights is not None and name not in weights]
    if missing:
        raise ArtifactError(f"{path} lacks the tensor {missing[0]!r}; compile the model again")
    batch = _batch(manifest, max_batch)
    adapted = artifact.check_hash(path, entry["adapted"]) if "adapters" in manifest else None
    executor: Executor
    if entry["executor"] == "plan":
        sizes = num_pages, batch, gpu_memory_utilization, budget
        executor = load_plan(entry["kind"], library, manifest, weights, *sizes, adapted)
    else:
        if weights is None or weights_file is None:
            raise ArtifactError(f"{path} has no weights, and {entry['name']} cannot make random ones")
        load_runtime_library(_carried_runtime(path, manifest))
        pages = num_pages or default_num_pages(manifest, batch)
        limit = int(entry["max_tokens_per_step"])
        stream = _stream(weights_file, weights, manifest["entry"]["weights"], budget)
        executor = VmExecutor(library, manifest, weights, pages, limit, num_threads, stream, adapted)
    config = artifact.read_tokenizer_config(path)
    eos = [int(token) for token in manifest["model"].get("eos_token_ids", [])]
    window = int(manifest["model"].get("window", 0))
    tokenizer, context = artifact.tokenizer_path(path), int(manifest["context_length"])
    return LoadedModel(executor, tokenizer, config, eos, context, batch, entry["name"], window, _key_layout(manifest))


def _stream(file: Path, weights: Mapping[str, Any], names: Sequence[str], budget: int | None) -> MappedLayers | None:
    """What brings the layers that do not stay in memory; None where all do."""
    division = divide({name: int(weights[name].nbytes) for name in names}, budget)
    return MappedLayers(file, weights, division.streamed) if division.streamed else None


def _key_layout(manifest: Mapping[str, Any]) -> KeyLayout:
    kv, inv_freq = manifest["kv"], manifest["model"]["rope"]["inv_freq"]
    if 2 * len(inv_freq) != kv["head_dim"]:
        raise ArtifactError(
            f"model.rope.inv_freq has {len(inv_freq)} numbers for heads of {kv['head_dim']}; compile the model again"
        )
    return KeyLayout(kv["num_kv_heads"], kv["page_size"], kv["head_dim"], KV_STORAGE[kv["dtype"]], tuple(inv_freq))


def _batch(manifest: Mapping[str, Any], wanted: int | None) -> int:
    """Sequences per step. Memory was planned for what was compiled, so more would write past it."""
    compiled = int(manifest["max_batch"])
    if wanted is not None and not 1 <= wanted <= compiled:
        raise ArtifactError(
            f"max_batch {wanted} is not between 1 and the {compiled} that this artifact was compiled for"
        )
    return wanted or compiled


def default_num_pages(manifest: Mapping[str, Any], max_batch: int) -> int:
    affordable = int(free_memory() * MEMORY_SHARE) // page_bytes(manifest["kv"])
    return max(1, min(useful_pages(manifest, max_batch), affordable))


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
