"""From an artifact's path to an executor that is ready to run: choose a target, check the files, map the weights."""

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mlcgen import artifact
from mlcgen.errors import ArtifactError, DeviceError, TargetError
from mlcgen.runtime import cuda, webgpu
from mlcgen.runtime.cpu import host_arch, host_features
from mlcgen.runtime.device import Device
from mlcgen.runtime.executor import Executor
from mlcgen.runtime.vm_executor import KV_STORAGE, VmExecutor, load_runtime_library

TEGRA = (72, 87)  # small systems, whose machine code is another
WEBGPU_KV_BYTES = 4 << 30  # for pages, when the user names no number: WebGPU does not tell how much memory there is
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
    gpu_memory_utilization: float = 0.9,
) -> LoadedModel:
    """Load the artifact at `path`.

    num_pages: pages of the KV cache; None takes what the batch can use, at most half of the free memory, or what
    `gpu_memory_utilization` of a GPU's memory leaves after weights and workspace.
    Raises ArtifactError for damage, TargetError where nothing in it runs here, DeviceError where memory is short.
    """
    manifest = artifact.read_manifest(path)
    entry = choose_target(manifest["targets"], target)
    library = artifact.check_hash(path, entry)
    weights = artifact.map_weights(artifact.check_hash(path, manifest["weights"][0])) if manifest["weights"] else None
    missing = [name for name in manifest["entry"]["weights"] if weights is not None and name not in weights]
    if missing:
        raise ArtifactError(f"{path} lacks the tensor {missing[0]!r}; compile the model again")
    batch = _batch(manifest, max_batch)
    executor: Executor
    if entry["executor"] == "plan":
        load = {"cuda": _on_cuda, "webgpu": _on_webgpu}[entry["kind"]]
        executor = load(library, manifest, weights, num_pages, batch, gpu_memory_utilization)
    else:
        if weights is None:
            raise ArtifactError(f"{path} has no weights, and {entry['name']} cannot make random ones")
        load_runtime_library(_carried_runtime(path, manifest))
        pages = num_pages or default_num_pages(manifest, batch)
        limit = int(entry["max_tokens_per_step"])
        executor = VmExecutor(library, manifest, weights, pages, limit, num_threads)
    config = artifact.read_tokenizer_config(path)
    eos = [int(token) for token in manifest["model"].get("eos_token_ids", [])]
    return LoadedModel(
        executor, artifact.tokenizer_path(path), config, eos, manifest["context_length"], batch, entry["name"]
    )


def _on_cuda(
    plan_file: Path,
    manifest: Mapping[str, Any],
    weights: Mapping[str, Any] | None,
    num_pages: int | None,
    max_batch: int,
    memory_utilization: float,
) -> Executor:
    from mlcgen.runtime import device_sampler, device_weights
    from mlcgen.runtime.cuda import CudaDevice
    from mlcgen.runtime.plan import function_names
    from mlcgen.runtime.sampling_executor import TAKE_TOKENS, SamplingPlanExecutor

    plan = _plan(plan_file, manifest, weights)
    device = CudaDevice()
    names = [*function_names(plan), *device_weights.FUNCTIONS, *device_sampler.FUNCTIONS, TAKE_TOKENS]
    device.load(base64.b64decode(plan["module"]), names)
    if weights is None:
        addresses = device_weights.make_random_weights(device, plan["weights"])
    else:
        addresses = device_weights.upload_weights(device, plan["weights"], weights)
    if num_pages is None:
        free, total = device.memory()
        workspace = sum(plan["storages"]) + plan["scratch"]
        left = int(memory_utilization * total) - (total - free) - workspace
        affordable = left // page_bytes(manifest["kv"])
        if affordable < 1:
            raise DeviceError(
                f"{memory_utilization:.0%} of the GPU's {total / 2**30:.1f} GiB leave no room for KV pages: "
                f"{(total - free) / 2**30:.2f} GiB are in use (weights and other programs), kernels need "
                f"{workspace / 2**30:.2f}; raise --gpu-memory-utilization or free memory"
            )
        num_pages = min(affordable, useful_pages(manifest, max_batch))
    return SamplingPlanExecutor(device, plan, manifest, addresses, num_pages)


def _on_webgpu(
    plan_file: Path,
    manifest: Mapping[str, Any],
    weights: Mapping[str, Any] | None,
    num_pages: int | None,
    max_batch: int,
    memory_utilization: float,
) -> Executor:
    from mlcgen.runtime import device_weights
    from mlcgen.runtime.plan import function_names
    from mlcgen.runtime.plan_executor import PlanExecutor
    from mlcgen.runtime.webgpu import WebgpuDevice

    plan = _plan(plan_file, manifest, weights)
    device = WebgpuDevice()
    _check_bindings(plan, device)
    device.load(base64.b64decode(plan["module"]), function_names(plan))
    addresses = device_weights.upload_weights(
        device, plan["weights"], weights or device_weights.Random(plan["weights"])
    )
    most = device.largest_binding // (page_bytes(manifest["kv"]) // plan["pages"]["layers"])
    if num_pages is None:
        affordable = min(WEBGPU_KV_BYTES // page_bytes(manifest["kv"]), useful_pages(manifest, max_batch))
        num_pages = max(1, min(most, affordable))
    if num_pages > most:
        raise DeviceError(f"{num_pages} pages are more than the {most} that kernels on {device.name} reach; lower them")
    return PlanExecutor(device, plan, manifest, addresses, num_pages)


def _plan(file: Path, manifest: Mapping[str, Any], weights: Mapping[str, Any] | None) -> dict[str, Any]:
    from mlcgen.runtime.plan import check_fit, read_plan

    plan = read_plan(file)
    check_fit(plan, manifest, weights)
    return plan


def _check_bindings(plan: Mapping[str, Any], device: Device) -> None:
    """Raises DeviceError for a tensor that the device's kernels cannot be given."""
    from mlcgen.runtime.plan import bound_bytes

    for name, num_bytes in bound_bytes(plan):
        if num_bytes > device.largest_binding:
            has = f"kernels on {device.name} reach {device.largest_binding / 2**20:.0f} MiB"
            raise DeviceError(
                f"{name[:80]} has {num_bytes / 2**20:.0f} MiB, {has}; quantize further (-q), or use another target"
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
    """The entry for this machine that uses the most of it: of all, of a kind ("cuda"), or the named one."""
    problems = {str(e["name"]): cannot_run(e) for e in entries}
    meant = [e for e in entries if wanted in ("auto", e["name"], e.get("kind"))]
    if not meant:
        raise TargetError(f"target {wanted!r} is not in this artifact; it has: {', '.join(problems)}")
    able = [e for e in meant if problems[str(e["name"])] is None]
    if not able:
        reasons = "; ".join(f"{e['name']}: {problems[str(e['name'])]}" for e in meant)
        raise TargetError(f"this artifact has no target that runs here ({reasons}); compile it for this machine")
    # Of several for one GPU the newest machine code, for one CPU what uses most of it.
    return max(able, key=lambda e: (_speed(e), _generation(e), len(e.get("features", ()))))


def _speed(entry: Mapping[str, Any]) -> int:
    """Kinds of targets by what is expected of them; a GPU in software is slower than the CPU that it runs on."""
    kind = entry.get("kind")
    if kind == "webgpu" and (adapter := webgpu.adapter()) is not None and adapter.is_software:
        return -1
    return {"cuda": 2, "webgpu": 1}.get(str(kind), 0)


def cannot_run(entry: Mapping[str, Any]) -> str | None:
    """Why this machine cannot run a target's entry, or None."""
    if entry.get("kind") == "cuda":
        return _cannot_run_cuda(entry)
    if entry.get("kind") == "webgpu":
        return webgpu.missing()
    machine = host_arch()
    if entry.get("executor") != "vm":
        return f"executor {entry.get('executor')!r} is not in this version"
    if entry.get("arch") != machine:
        return f"needs {entry.get('arch')}, this is {machine}"
    missing = sorted(set(entry.get("features", ())) - host_features())
    return f"this CPU has no {', '.join(missing)}" if missing else None


def _generation(entry: Mapping[str, Any]) -> int:
    """Machine code by its number, sm_90 -> 90; assembly (compute_80) and CPUs last."""
    kind, _, number = str(entry.get("arch")).partition("_")
    return int(number) if kind == "sm" and number.isdigit() else 0


def _cannot_run_cuda(entry: Mapping[str, Any]) -> str | None:
    if reason := cuda.missing():
        return reason
    found, arch = cuda.compute_capability(), str(entry.get("arch"))
    if found is None:
        return "the driver does not describe the GPU"
    known = re.fullmatch(r"(?:sm|compute)_(\d{2,3})", arch)
    if known is None:
        return f"needs {arch:.40}, which this version does not know"
    have, needed = int(found.removeprefix("sm_")), int(known[1])
    if arch.startswith("compute"):  # assembly, for this generation and all later ones
        runs = have >= needed
    else:  # machine code, for later members of a generation too, but for what Hopper and Blackwell have of their own
        same_kind = have // 10 == needed // 10 and have >= needed and have not in TEGRA
        runs = have == needed or (needed < 90 and same_kind)
    return None if runs else f"needs {arch}, this GPU is {found}"


def page_bytes(kv: Mapping[str, Any]) -> int:
    """Bytes of one page over all layers."""
    shape = (kv["num_layers"], 2, kv["num_kv_heads"], kv["page_size"], kv["head_dim"])
    return prod(int(d) for d in shape) * np.dtype(KV_STORAGE[kv["dtype"]]).itemsize


def default_num_pages(manifest: Mapping[str, Any], max_batch: int) -> int:
    affordable = int(free_memory() * MEMORY_SHARE) // page_bytes(manifest["kv"])
    return max(1, min(useful_pages(manifest, max_batch), affordable))


def useful_pages(manifest: Mapping[str, Any], max_batch: int) -> int:
    """Pages that a full batch of the longest sequences fills."""
    return max_batch * -(-int(manifest["context_length"]) // int(manifest["kv"]["page_size"]))


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
