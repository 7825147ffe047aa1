"""The result of `mlcgen bench`: a row for each engine, from its samples and the peaks of its device."""

import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mlcgen import artifact
from mlcgen.bench.contestants import LONG_TOKENS, SEED, Contestant, Options, model_of
from mlcgen.bench.engines import PEERS
from mlcgen.bench.result import VERSION
from mlcgen.runtime import hip, metal, webgpu
from mlcgen.runtime.cpu import host_cpu_name, usable_cores
from mlcgen.runtime.cuda import CudaDevice
from mlcgen.runtime.target_choice import cannot_run

__all__ = ["Metrics", "not_run", "ratios", "result_of", "summaries"]

Metrics = dict[str, float]


def result_of(
    contestants: Sequence[Contestant],
    samples: Mapping[Contestant, Sequence[Metrics]],
    peaks: Mapping[str, Sequence[Any]],
    options: Options,
) -> dict[str, Any]:
    kinds = dict.fromkeys(each.kind for each in contestants)
    devices = {kind: {"name": _device_name(kind), "peaks": _limits(peaks.get(kind, ()))} for kind in kinds}
    rows = [_row(each, summaries(samples[each]), devices[each.kind], options) for each in contestants]
    peers = {row["name"]: row["metrics"] for row in rows if row["engine"] != "mlcgen"}
    for row in rows:
        row["ratios"] = {name: ratios(row["metrics"], theirs) for name, theirs in peers.items() if name != row["name"]}
    manifest = artifact.read_manifest(contestants[0].model)
    return {
        "version": VERSION,
        "command": shlex.join(["mlcgen", *sys.argv[1:]]),
        "model": {"name": manifest["name"], **model_of(manifest)},
        "options": {**asdict(options), "long_tokens": LONG_TOKENS, "seed": SEED},
        "machine": {"cpu": host_cpu_name(), "cores": usable_cores(), "threads": options.threads},
        "versions": _versions(contestants),
        "devices": devices,
        "engines": rows,
    }


def _device_name(kind: str) -> str:
    if kind == "cuda":
        return CudaDevice().name
    if kind == "rocm":
        return hip.HipDevice().name
    if kind == "metal":
        return metal.MetalDevice().name
    adapter = webgpu.adapter() if kind == "webgpu" else None
    return adapter.name if adapter else host_cpu_name()


def _limits(turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Empty for a device that has no probe; that of the link only where weights may be streamed."""
    limits: dict[str, Any] = {
        peak: summaries([turn.get(peak, {}) for turn in turns]) for peak in ("bytes_per_s", "ops_per_s")
    }
    if links := [turn["link_bytes_per_s"] for turn in turns if "link_bytes_per_s" in turn]:
        limits["link_bytes_per_s"] = _summary(links)
    return limits


def _row(
    contestant: Contestant, metrics: dict[str, Any], device: Mapping[str, Any], options: Options
) -> dict[str, Any]:
    return {
        "name": contestant.name,
        "engine": contestant.engine,
        "model": contestant.model,
        "device": device["name"],
        **(_about_artifact(contestant) if contestant.engine == "mlcgen" else _about_peer(contestant)),
        "metrics": metrics,
        "achieved": _achieved(contestant, metrics, device["peaks"], options),
        "skipped": contestant.skipped(options),
    }


def _about_artifact(contestant: Contestant) -> dict[str, Any]:
    manifest = artifact.read_manifest(contestant.model)
    entry = next(each for each in manifest["targets"] if each["name"] == contestant.target)
    return _about(Path(contestant.model), manifest, entry)


def _about(path: Path, manifest: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says of an artifact's target besides its figures."""
    code = artifact.inside(path, entry["file"]).stat().st_size
    return {
        "target": entry["name"],
        "kind": entry["kind"],
        "targets": [each["name"] for each in manifest["targets"]],
        "quantization": manifest["quantization"],
        "size": {"weights_bytes": sum(file["bytes"] for file in manifest["weights"]), "code_bytes": code},
        "quality": _quality(manifest, entry["name"]),
        "versions": manifest["versions"],
    }


def _quality(manifest: Mapping[str, Any], target: str) -> dict[str, float]:
    """What `mlcgen verify` found, if it looked at this target."""
    verified = manifest.get("verify") or {}
    names = ("kl_divergence", "top1_agreement")
    return {name: verified[name] for name in names} if verified.get("target") == target else {}


def _about_peer(contestant: Contestant) -> dict[str, Any]:
    file, distribution = Path(contestant.model), PEERS[contestant.engine].distribution
    return {
        "target": None,
        "kind": contestant.kind,
        "targets": [],
        "quantization": None,
        "size": {"weights_bytes": file.stat().st_size} if file.is_file() else {},
        "quality": {},
        "versions": {distribution: _version(distribution)},
    }


def not_run(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """A row for each target of the artifacts that this machine cannot run."""
    return [
        {"name": str(path), **_about(path, manifest, entry), "reason": f"compiled, not run: {why}"}
        for path in paths
        for manifest in [artifact.read_manifest(path)]
        for entry in manifest["targets"]
        if (why := cannot_run(entry))
    ]


def _achieved(
    contestant: Contestant, metrics: Mapping[str, Any], limits: Mapping[str, Any], options: Options
) -> dict[str, float]:
    """Bandwidth of decode and arithmetic of prefill, and each as a share of the device's measured peak; the link's."""
    result: dict[str, float] = {}
    decode, reads = metrics.get("decode_tokens_per_s"), contestant.reads
    if decode and reads:
        result["decode_bytes_per_s"] = decode["median"] * reads.step(options.prompt + options.tokens / 2)
        if peak := limits["bytes_per_s"].get(str(reads.weights)):
            result["decode_peak_share"] = result["decode_bytes_per_s"] / peak["median"]
    if contestant.flops:
        result["prefill_flops_per_s"] = contestant.flops * metrics["prefill_tokens_per_s"]["median"] / options.prompt
        ops = limits["ops_per_s"]
        if peak := ops.get("float32") or ops.get("float16"):  # of a CPU; of a GPU's tensor cores
            result["prefill_peak_share"] = result["prefill_flops_per_s"] / peak["median"]
    if streamed := metrics.get("streamed_bytes_per_s"):
        result["streamed_bytes_per_s"] = streamed["median"]
        if link := limits.get("link_bytes_per_s"):
            result["link_share"] = streamed["median"] / link["median"]
    return result


def summaries(samples: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Name -> median, min, max and all samples."""
    names = dict.fromkeys(name for sample in samples for name in sample)
    return {name: _summary([sample[name] for sample in samples if name in sample]) for name in names}


def _summary(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "samples": values}


def ratios(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float]:
    """Our median over theirs, of what both have."""
    return {name: ours[name]["median"] / theirs[name]["median"] for name in ours if name in theirs}


def _versions(contestants: Sequence[Contestant]) -> dict[str, str]:
    distributions = ["mlcgen", "apache-tvm"]
    if any(each.kind == "webgpu" for each in contestants):
        distributions.append("wgpu")
    distributions += [PEERS[each.engine].distribution for each in contestants if each.engine in PEERS]
    return {"python": sys.version.split()[0], **{name: _version(name) for name in distributions}}


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"
