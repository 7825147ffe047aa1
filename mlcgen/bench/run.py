"""`mlcgen bench`: every engine takes its turn at every test; the first turn warms up, the others give medians."""

import importlib.util
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from mlcgen import artifact
from mlcgen.bench.engines import PEERS, Spec
from mlcgen.bench.process import Worker
from mlcgen.bench.work import DecodeReads, artifact_reads, gguf_reads, prefill_flops, torch_reads
from mlcgen.checkpoint.source import gguf_file
from mlcgen.errors import BenchError
from mlcgen.runtime.cpu import host_cpu_name, usable_cores
from mlcgen.runtime.cuda import CudaDevice
from mlcgen.runtime.load import choose_target

__all__ = ["Options", "bench"]

FIRST_PROMPT = 128  # tokens of the prompt that follows a load
LONG_TOKENS = 32  # generated after the long prompt
BATCH_PROMPT = 512  # tokens of a batch's prompts together, one step of every engine, where nothing else is asked for
SEED = 0
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
    """One row of the result: an artifact or a peer."""

    name: str
    engine: str
    model: str
    context: int  # tokens of a sequence at most
    max_batch: int | None = None  # None: no limit that we know
    reads: DecodeReads | None = None  # None: not known
    target: str = "auto"

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
    target: str = "auto",
    peers: Sequence[str] = (),
    peer_model: str | Path | None = None,
    options: Options | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure artifacts of one model, and `peers` (names in engines.PEERS) on the GGUF file `peer_model`.

    The default file is the one behind the first artifact's source. progress(stage, calls done, calls in all).
    Raises BenchError for a peer that is not installed or has no model, and if an engine fails.
    """
    options = options or Options()
    contestants = _contestants([Path(path) for path in artifacts], target, peers, peer_model, options)
    manifest = artifact.read_manifest(artifacts[0])
    sizes = sorted({each.reads.weights for each in contestants if each.reads})
    entry = choose_target(manifest["targets"], target)
    flops = prefill_flops(Path(artifacts[0]), manifest, entry["name"], options.prompt)
    vocab, on_gpu = int(manifest["model"]["vocab_size"]), entry["kind"] == "cuda"
    turns = _turns(contestants, sizes, vocab, options, progress or _silent, on_gpu)
    next(turns)  # the first one warms up
    peaks: list[Any] = []
    samples: dict[str, list[Metrics]] = {each.name: [] for each in contestants}
    for turn_peaks, turn in turns:
        peaks.append(turn_peaks)
        for name, metrics in turn.items():
            samples[name].append(metrics)
    result = _result(contestants, samples, peaks, flops, options)
    if on_gpu:
        result["machine"]["gpu"] = CudaDevice().name
    return result


def _silent(stage: str, done: int, total: int) -> None:
    pass


# Who takes part


def _contestants(
    paths: Sequence[Path], target: str, peers: Sequence[str], peer_model: str | Path | None, options: Options
) -> list[Contestant]:
    found = [_artifact(path, target, options) for path in dict.fromkeys(paths)]
    manifests = [artifact.read_manifest(path) for path in paths]
    if len({_shape(manifest) for manifest in manifests}) > 1:
        raise BenchError(f"{', '.join(map(str, paths))} are not builds of one model; measure each model by itself")
    for name in dict.fromkeys(peers):
        _require(name)
        found.append(_peer(name, paths[0], peer_model, manifests[0]))
    return found


def _shape(manifest: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(manifest["model"].get(key) for key in ("model_type", "hidden_size", "num_layers", "vocab_size"))


def _artifact(path: Path, target: str, options: Options) -> Contestant:
    manifest = artifact.read_manifest(path)
    context = int(manifest["context_length"])
    if options.sequence > context:
        raise BenchError(
            f"{path} has a context of {context} tokens, too short for --prompt {options.prompt} and "
            f"--tokens {options.tokens}; lower them"
        )
    entry = choose_target(manifest["targets"], target)["name"]
    reads = artifact_reads(path, manifest, entry)
    return Contestant(str(path), "mlcgen", str(path), context, int(manifest["max_batch"]), reads, entry)


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
        return Contestant(name, name, str(path), int(manifest["context_length"]), None, torch_reads(manifest))
    file = _peer_model(peer_model, manifest)
    # OpenVINO repacks the weights and quantizes the cache, so what it reads is not known.
    reads = gguf_reads(file, manifest["kv"]) if name == "llama.cpp" else None
    return Contestant(name, name, str(file), int(manifest["model"]["max_position_embeddings"]), None, reads)


# Turns


def _turns(
    contestants: Sequence[Contestant],
    sizes: Sequence[int],
    vocab: int,
    options: Options,
    progress: Callable[[str, int, int], None],
    on_gpu: bool = False,
) -> Iterator[tuple[Any, dict[str, Metrics]]]:
    """repeat + 1 times: (the machine's peaks, metrics by engine)."""
    done, total = 0, (options.repeat + 1) * len(TESTS) * len(contestants)
    rng = np.random.default_rng(SEED)
    with ExitStack() as stack:
        spec = {"engine": "cuda probe" if on_gpu else "probe", "threads": options.threads}
        probe = stack.enter_context(Worker("the machine probe", spec))
        workers = {
            each.name: stack.enter_context(Worker(each.name, each.spec(options, only_plain=False)))
            for each in contestants
        }
        for _ in range(options.repeat + 1):
            metrics: dict[str, Metrics] = {each.name: {} for each in contestants}
            peaks = probe.call(sizes=sizes).result
            for name, test in TESTS.items():
                ids = rng.integers(vocab, size=_prompt_shape(name, options)).tolist()
                for each in contestants:
                    if name not in each.skipped(options):
                        metrics[each.name] |= test(each, workers[each.name], ids, options)
                    done += 1
                    progress("measuring", done, total)
            yield peaks, metrics


def _prompt_shape(test: str, options: Options) -> tuple[int, int]:
    """(sequences, tokens of each)"""
    shapes = {"batch": (options.batch, options.batch_prompt), "long": (1, options.long_context)}
    return shapes.get(test, (1, options.prompt))


def _load(contestant: Contestant, worker: Worker, prompts: Prompts, options: Options) -> Metrics:
    """In a new process, with room for the plain test only: the load, a first token, and the memory of that test."""
    with Worker(contestant.name, contestant.spec(options, only_plain=True)) as fresh:
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


# The result


def _result(
    contestants: Sequence[Contestant],
    samples: Mapping[str, Sequence[Metrics]],
    peaks: Sequence[Any],
    flops: int,
    options: Options,
) -> dict[str, Any]:
    limits = {kind: summaries([turn[kind] for turn in peaks]) for kind in peaks[0]}
    rows = [_row(each, summaries(samples[each.name]), limits, flops, options) for each in contestants]
    peers = {row["name"]: row["metrics"] for row in rows if row["engine"] != "mlcgen"}
    for row in rows:
        row["ratios"] = {name: ratios(row["metrics"], theirs) for name, theirs in peers.items() if name != row["name"]}
    return {
        "command": shlex.join(["mlcgen", *sys.argv[1:]]),
        "options": {**asdict(options), "long_tokens": LONG_TOKENS, "seed": SEED},
        "machine": {"cpu": host_cpu_name(), "cores": usable_cores(), "threads": options.threads},
        "versions": _versions([row["engine"] for row in rows]),
        "peaks": limits,
        "engines": rows,
    }


def _row(
    contestant: Contestant, metrics: dict[str, Any], limits: Mapping[str, Any], flops: int, options: Options
) -> dict[str, Any]:
    return {
        "name": contestant.name,
        "engine": contestant.engine,
        "model": contestant.model,
        "metrics": metrics,
        "achieved": _achieved(contestant, metrics, limits, flops, options),
        "skipped": contestant.skipped(options),
    }


def _achieved(
    contestant: Contestant, metrics: Mapping[str, Any], limits: Mapping[str, Any], flops: int, options: Options
) -> dict[str, float]:
    """Bandwidth of decode and arithmetic of prefill, and each as a share of the machine's measured peak."""
    result: dict[str, float] = {}
    decode, reads = metrics.get("decode_tokens_per_s"), contestant.reads
    if decode and reads:
        result["decode_bytes_per_s"] = decode["median"] * reads.step(options.prompt + options.tokens / 2)
        peak = limits["bytes_per_s"][str(reads.weights)]["median"]
        result["decode_peak_share"] = result["decode_bytes_per_s"] / peak
    if flops:
        result["prefill_flops_per_s"] = flops * metrics["prefill_tokens_per_s"]["median"] / options.prompt
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


def _versions(engines: Sequence[str]) -> dict[str, str]:
    distributions = ["mlcgen", "apache-tvm", *(PEERS[name].distribution for name in engines if name in PEERS)]
    return {"python": sys.version.split()[0], **{name: _version(name) for name in distributions}}


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"
