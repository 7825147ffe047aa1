"""`mlcgen bench`: every engine takes its turn at every test; the first turn warms up, the others give medians."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from mlcgen import artifact
from mlcgen.bench.contestants import LONG_TOKENS, SEED, Contestant, Options, artifacts_of, peers_of
from mlcgen.bench.process import Worker
from mlcgen.bench.summary import Metrics, not_run, result_of

__all__ = ["bench"]

FIRST_PROMPT = 128  # tokens of the prompt that follows a load
PROBES = {"cpu": "probe", "cuda": "cuda probe", "webgpu": "webgpu probe"}  # kind of target -> what measures its peaks
STREAMING = ("cpu", "cuda", "rocm")  # kinds of targets that can
STREAMED = ("streamed_bytes_per_step", "streamed_bytes_per_s")
Prompts = list[list[int]]


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
    ours = artifacts_of(paths, targets, options)
    contestants = [*ours, *peers_of(peers, paths[0], peer_model, ours[0].flops)]
    peaks: dict[str, list[Any]] = {}
    samples: dict[Contestant, list[Metrics]] = {each: [] for each in contestants}
    turns = _turns(contestants, _vocab_size(paths[0]), options, progress or _silent)
    next(turns)  # the first one warms up
    for turn_peaks, turn in turns:
        for kind, measured in turn_peaks.items():
            peaks.setdefault(kind, []).append(measured)
        for each, metrics in turn.items():
            samples[each].append(metrics)
    result = result_of(contestants, samples, peaks, options)
    result["not_run"] = not_run(paths)
    if text is not None:
        result["options"]["text"] = Path(text).name
        for row, each in zip(result["engines"], ours, strict=False):  # they come before the peers
            row["quality"]["perplexity"] = _perplexity(each, Path(text), options)
    return result


def _silent(stage: str, done: int, total: int) -> None:
    pass


def _vocab_size(path: Path) -> int:
    return int(artifact.read_manifest(path)["model"]["vocab_size"])


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
        links = {
            kind: stack.enter_context(Worker("the link probe", {"engine": "link probe", "kind": kind, "file": file}))
            for kind, file in _streamed_files(contestants, options).items()
        }
        workers = {
            each: stack.enter_context(Worker(each.label, each.spec(options, only_plain=False))) for each in contestants
        }
        for _ in range(options.repeat + 1):
            metrics: dict[Contestant, Metrics] = {each: {} for each in contestants}
            peaks = {kind: probe.call(sizes=sizes(contestants, kind)).result for kind, probe in probes.items()}
            for kind, link in links.items():
                peaks.setdefault(kind, {})["link_bytes_per_s"] = link.call().result
            for name, test in TESTS.items():
                ids = rng.integers(vocab, size=_prompt_shape(name, options)).tolist()
                for each in contestants:
                    if name not in each.skipped(options):
                        metrics[each] |= test(each, workers[each], ids, options)
                    done += 1
                    progress("measuring", done, total)
            yield peaks, metrics


def _streamed_files(contestants: Sequence[Contestant], options: Options) -> dict[str, str]:
    """Kind of target -> file of weights whose layers may be streamed there."""
    if options.weight_memory is None:
        return {}
    ours = [each for each in contestants if each.engine == "mlcgen" and each.kind in STREAMING]
    return {each.kind: str(Path(each.model) / artifact.WEIGHTS) for each in ours}


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
    streamed = {name: timing[name] for name in STREAMED if timing.get(name) is not None}
    return metrics | streamed | _decode("decode_tokens_per_s", timing)


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
