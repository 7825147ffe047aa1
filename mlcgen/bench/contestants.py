"""Who takes part in `mlcgen bench`: targets of artifacts, and peers, with what each is opened with and can take."""

import importlib.util
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mlcgen import artifact
from mlcgen.bench.engines import PEERS, Spec
from mlcgen.bench.work import DecodeReads, artifact_reads, gguf_reads, prefill_flops, torch_reads
from mlcgen.checkpoint.source import gguf_file
from mlcgen.errors import BenchError
from mlcgen.runtime import cuda
from mlcgen.runtime.cpu import usable_cores
from mlcgen.runtime.offload import num_bytes
from mlcgen.runtime.target_choice import cannot_run, choose_target

__all__ = ["LONG_TOKENS", "SEED", "Contestant", "Options", "artifacts_of", "model_of", "peers_of"]

SEED = 0
LONG_TOKENS = 32  # generated after the long prompt
BATCH_PROMPT = 512  # tokens of a batch's prompts together, one step of every engine, where nothing else is asked for


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
    weight_memory: str | None = None  # what an artifact's weights may take; None: all of them are there

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_prompt", self.batch_prompt or max(1, BATCH_PROMPT // self.batch))
        if self.weight_memory is not None:
            num_bytes(self.weight_memory)  # raises RequestError for what is no size

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
        memory = options.weight_memory if self.engine == "mlcgen" else None
        return asdict(Spec(self.engine, self.model, options.threads, context, batch, self.target, memory))


def artifacts_of(paths: Sequence[Path], targets: Sequence[str], options: Options) -> list[Contestant]:
    """One for each target of each artifact. Raises TargetError where there is none that runs here."""
    manifests = {path: artifact.read_manifest(path) for path in paths}
    if len({tuple(model_of(manifest).values()) for manifest in manifests.values()}) > 1:
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


def model_of(manifest: Mapping[str, Any]) -> dict[str, Hashable]:
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


def peers_of(names: Sequence[str], path: Path, peer_model: str | Path | None, flops: int) -> list[Contestant]:
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
