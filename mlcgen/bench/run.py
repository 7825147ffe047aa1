"""`mlcgen bench`: every engine takes its turn at every test; the first turn warms up, the others give medians."""

import importlib.util
import shlex
import statistics
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from mlcgen import artifact
from mlcgen.bench.engines import PEERS, Spec
from mlcgen.bench.process import Worker
from mlcgen.bench.result import VERSION
from mlcgen.bench.work import DecodeReads, artifact_reads, gguf_reads, prefill_flops, torch_reads
from mlcgen.checkpoint.source import gguf_file
from mlcgen.errors import BenchError
from mlcgen.runtime import cuda, hip, metal, webgpu
from mlcgen.runtime.cpu import host_cpu_name, usable_cores
from mlcgen.runtime.cuda import CudaDevice
from mlcgen.runtime.target_choice import cannot_run, choose_target

__all__ = ["Options", "bench"]

FIRST_PROMPT = 128  # tokens of the prompt that follows a load
LONG_TOKENS = 32  # generated after the long prompt
BATCH_PROMPT = 512  # tokens of a batch's prompts together, one step of every engine, where nothing else is asked for
SEED = 0
PROBES = {"cpu": "probe", "cuda": "cuda probe", "webgpu": "webgpu probe"}  # kind of target -> what measures its peaks
Metrics = dict[str, float]
Prompts = list[list[int]]


@dataclass(frozen=True)
class Options:
    """Token counts, sequences, threads, and turns that count."""

    prompt: int = 512
    tokens: int = 128
    long_context: int = 4096
    batch: int = 8
    threads: int = field(default_factory=usable_cores)
    repeat: int = 5
    batch_prompt: int = 0  # tokens of each prompt of the batch; 0: BATCH_PROMPT together

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_prompt", self.batch_prompt or max(1, BATCH_PROMPT // self.batch))

    @property
    def sequence(self) -> int:
        """Tokens of the plain test's sequence."""
        return self.prompt + self.tokens


@dataclass(frozen=True)
class Contestant:
    """One row of the result: one target of an artifact, or a peer."""

    name: str
    engine: str
    model: str
    context: int  # tokens of a sequence at most
    max_batch: int | None = None  # None: no limit that we know
    reads: DecodeReads | None = None  # None: not known
    target: str = "auto"
    kind: str = "cpu"  # of the target: on which device it runs
    flops: int = 0  # of the prefill; 0: not known

    @property
    def label(self) -> str:
        return f"{self.name} on {self.target}" if self.engine == "mlcgen" else self.name

    def skipped(self, options: Options) -> dict[str, str]:
        """Test -> why this engine cannot take it."""
        reasons = {}
        if options.long_context + LONG_TOKENS > self.context:
            needed = f"{options.long_context} cached tokens and {LONG_TOKENS} more"
            reasons["long"] = f"its context of {self.context} is shorter than {needed}"
        if self.max_batch is not None and options.batch > self.max_batch:
            reasons["batch"] = f"it was compiled for {self.max_batch} sequences at most, not {options.batch}"
        elif options.batch_prompt + options.tokens > self.context:
            reasons["batch"] = f"its context of {self.context} is shorter than {options.batch_prompt + options.tokens}"
        return reasons

    def spec(self, options: Options, only_plain: bool) -> dict[str, Any]:
        """What its worker opens: room for all tests that it takes, or for the plain one only."""
        context, batch, skipped = options.sequence, 1, self.skipped(options)
        if not only_plain and "long" not in skipped:
            context = max(context, options.long_context + LONG_TOKENS)
        if not only_plain and "batch" not in skipped:
            batch = options.batch
            context = max(context, batch * (options.batch_prompt + options.tokens))
        return asdict(Spec(self.engine, self.model, options.threads, context, batch, self.target))


def bench(
    artifacts: Sequence[str | Path],
    targets: Sequence[str] = ("auto",),
    peers: Sequence[str] = (),
    peer_model: str | Path | None = None,
    options: Options | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    text: str | Path | None = None,
) -> dict[str, Any]:
    """Measure artifacts of one model on `targets`, and `peers` (names in engines.PEERS) on the GGUF file `peer_model`.

    targets: names or kinds of the artifacts' targets, "auto" for the best that runs here, "all" for all that run here.
    The default file is the one behind the first artifact's source. text: a UTF-8 file, or token ids as JSON, whose
    perplexity is measured too. progress(stage, calls done, calls in all).
    Raises BenchError for a peer that is not installed or has no model, and if an engine fails.
    """
    options = options or Options()
    paths = list(dict.fromkeys(map(Path, artifacts)))
    ours = _artifacts(paths, targets, options)
    contestants = [*ours, *_peers(peers, paths[0], peer_model, ours[0].flops)]
    peaks: dict[str, list[Any]] = {}
    samples: dict[Contestant, list[Metrics]] = {each: [] for each in contestants}
    turns = _turns(contestants, _vocab_size(paths[0]), options, progress or _silent)
    next(turns)  # the first one warms up
    for turn_peaks, turn in turns:
        for kind, measured in turn_peaks.items():
            peaks.setdefault(kind, []).append(measured)
        for each, metrics in turn.items():
            samples[each].append(metrics)
    result = _result(contestants, samples, peaks, options)
    result["not_run"] = _not_run(paths)
    if text is not None:
        result["options"]["text"] = Path(text).name
        for row, each in zip(result["engines"], ours, strict=False):  # they come before the peers
            row["quality"]["perplexity"] = _perplexity(each, Path(text), options)
    return result


def _silent(stage: str, done: int, total: int) -> None:
    pass


def _vocab_size(path: Path) -> int:
    return int(artifact.read_manifest(path)["model"]["vocab_size"])


# Who takes part


def _artifacts(paths: Sequence[Path], targets: Sequence[str], options: Options) -> list[Contestant]:
    """One for each target of each artifact. Raises TargetError where there is none that runs here."""
    manifests = {path: artifact.read_manifest(path) for path in paths}
    if len({tuple(_model(manifest).values()) for manifest in manifests.values()}) > 1:
        raise BenchError(f"{', '.join(map(str, paths))} are not builds of one model; measure each model by itself")
    found = [
        _artifact(path, manifest, entry, options)
        for path, manifest in manifests.items()
        for entry in _entries(manifest["targets"], targets)
    ]
    if not found:
        choose_target([entry for manifest in manifests.values() for entry in manifest["targets"]], "auto")
    return found


def _entries(entries: Sequence[Mapping[str, Any]], targets: Sequence[str]) -> list[Mapping[str, Any]]:
    if "all" in targets:
        return [entry for entry in entries if cannot_run(entry) is None]
    chosen = [choose_target(entries, target) for target in targets]
    return list({str(entry["name"]): entry for entry in chosen}.values())


def _model(manifest: Mapping[str, Any]) -> dict[str, Hashable]:
    return {key: manifest["model"].get(key) for key in ("model_type", "hidden_size", "num_layers", "vocab_size")}


def _artifact(path: Path, manifest: Mapping[str, Any], entry: Mapping[str, Any], options: Options) -> Contestant:
    context = int(manifest["context_length"])
    if options.sequence > context:
        raise BenchError(
            f"{path} has a context of {context} tokens, too short for --prompt {options.prompt} and "
            f"--tokens {options.tokens}; lower them"
        )
    return Contestant(
        str(path),
        "mlcgen",
        str(path),
        context,
        int(manifest["max_batch"]),
        artifact_reads(path, manifest, entry["name"]),
        entry["name"],
        entry["kind"],
        prefill_flops(path, manifest, entry["name"], options.prompt),
    )


def _peers(names: Sequence[str], path: Path, peer_model: str | Path | None, flops: int) -> list[Contestant]:
    manifest = artifact.read_manifest(path)
    for name in names:
        _require(name)
    return [replace(_peer(name, path, peer_model, manifest), flops=flops) for name in dict.fromkeys(names)]


def _require(peer: str) -> None:
    if importlib.util.find_spec(PEERS[peer].module) is None:
        how = "pip install torch==2.13.0" if peer == "torch" else "pip install 'mlcgen[bench]'"
        raise BenchError(f"the peer {peer} is not installed: {how}")


def _peer_model(given: str | Path | None, manifest: Mapping[str, Any]) -> Path:
    if given is not None:
        if not Path(given).is_file():
            raise BenchError(f"--peer-model {given} is not a file; name the model's GGUF file")
        return Path(given)
    source = str(manifest.get("source") or "")
    file = gguf_file(source)
    if file is None:
        raise BenchError(f"no GGUF file is behind this artifact's source {source!r}; name one with --peer-model")
    return file


def _peer(name: str, path: Path, peer_model: str | Path | None, manifest: Mapping[str, Any]) -> Contestant:
    if name == "torch":
        kind = "cpu" if cuda.missing() else "cuda"
        return Contestant(
            name, name, str(path), int(manifest["context_length"]), None, torch_reads(manifest), kind=kind
        )
    file = _peer_model(peer_model, manifest)
    # OpenVINO repacks the weights and quantizes the cache, so what it reads is not known.
    reads = gguf_reads(file, manifest["kv"]) if name == "llama.cpp" else None
    return Contestant(name, name, str(file), int(manifest["model"]["max_position_embeddings"]), None, reads)


# Turns


def _turns(
    contestants: Sequence[Contestant], vocab: int, options: Options, progress: Callable[[str, int, int], None]
) -> Iterator[tuple[dict[str, Any], dict[Contestant, Metrics]]]:
    """repeat + 1 times: (peaks by kind of target, metrics by contestant)."""
    done, total = 0, (options.repeat + 1) * len(TESTS) * len(contestants)
    rng = np.random.default_rng(SEED)
    with ExitStack() as stack:
        probes = {
            kind: stack.enter_context(Worker(f"the {PROBES[kind]}", {"engine": probe, "threads": options.threads}))
            for kind, probe in PROBES.items()
            if any(each.kind == kind for each in contestants)
        }
        workers = {
            each: stack.enter_context(Worker(each.label, each.spec(options, only_plain=False))) for each in contestants
        }
        for _ in range(options.repeat + 1):
            metrics: dict[Contestant, Metrics] = {each: {} for each in contestants}
            peaks = {kind: probe.call(sizes=sizes(contestants, kind)).result for kind, probe in probes.items()}
            for name, test in TESTS.items():
                ids = rng.integers(vocab, size=_prompt_shape(name, options)).tolist()
                for each in contestants:
                    if name not in each.skipped(options):
                        metrics[each] |= test(each, workers[each], ids, options)
                    done += 1
                    progress("measuring", done, total)
            yield peaks, metrics


def sizes(contestants: Sequence[Contestant], kind: str) -> list[int]:
    """Bytes of the weights that are read on a device."""
    return sorted({each.reads.weights for each in contestants if each.reads and each.kind == kind})


def _prompt_shape(test: str, options: Options) -> tuple[int, int]:
    """(sequences, tokens of each)"""
    shapes = {"batch": (options.batch, options.batch_prompt), "long": (1, options.long_context)}
    return shapes.get(test, (1, options.prompt))


def _load(contestant: Contestant, worker: Worker, prompts: Prompts, options: Options) -> Metrics:
    """In a new process, with room for the plain test only: the load, a first token, and the memory of that test."""
    with Worker(contestant.label, contestant.spec(options, only_plain=True)) as fresh:
        first = fresh.call(prompts=[prompts[0][:FIRST_PROMPT]], tokens=1)
        plain = fresh.call(prompts=prompts, tokens=options.tokens)
    metrics = {"load_s": fresh.opened.seconds, "load_to_first_token_s": fresh.opened.seconds + first.seconds}
    if plain.peak_memory_bytes is not None:
        metrics["peak_memory_bytes"] = float(plain.peak_memory_bytes)
    return metrics


def _plain(contestant: Contestant, worker: Worker, prompts: Prompts, options: Options) -> Metrics:
    timing = worker.call(prompts=prompts, tokens=options.tokens).result
    first = timing["first_token_s"]
    metrics = {"prefill_tokens_per_s": options.prompt / first, "first_token_s": first}
    return metrics | _decode("decode_tokens_per_s", timing)


def _batch(contestant: Contestant, worker: Worker, prompts: Prompts, options: Options) -> Metrics:
    return _decode("batch_decode_tokens_per_s", worker.call(prompts=prompts, tokens=options.tokens).result)


def _long(contestant: Contestant, worker: Worker, prompts: Prompts, options: Options) -> Metrics:
    return _decode("long_decode_tokens_per_s", worker.call(prompts=prompts, tokens=LONG_TOKENS).result)


def _decode(name: str, timing: Mapping[str, Any]) -> Metrics:
    rate = timing["decode_tokens_per_s"]
    return {} if rate is None else {name: rate}


TESTS = {"load": _load, "plain": _plain, "batch": _batch, "long": _long}


def _perplexity(contestant: Contestant, text: Path, options: Options) -> float:
    spec = contestant.spec(options, only_plain=True) | {"engine": "perplexity"}
    with Worker(contestant.label, spec) as worker:
        return float(worker.call(text=str(text)).result["ppl"])


# The result


def _result(
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
        "model": {"name": manifest["name"], **_model(manifest)},
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
    """Empty for a device that has no probe."""
    return {peak: summaries([turn[peak] for turn in turns]) for peak in ("bytes_per_s", "ops_per_s")}


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


def _not_run(paths: Sequence[Path]) -> list[dict[str, Any]]:
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
    """Bandwidth of decode and arithmetic of prefill, and each as a share of the device's measured peak."""
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
