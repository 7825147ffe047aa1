"""Weights streamed through a memory that is too small for them: the rate reached, beside the link's own.

    python benchmarks/offload.py ARTIFACT --target cuda --weight-memory none 8GiB 2GiB --batch 1 64

The link is what is measured before and after each case: copies from pinned memory to the GPU, or for a CPU, and with
--from-file for a GPU, reading the weights' file from its beginning to its end, none of it in the system's cache. A case
generates tokens for sequences that all decode; its time is that of --steps steps after the first few. It needs what
running the artifact needs, and no more.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlcgen import artifact
from mlcgen.bench.link import open_link_probe
from mlcgen.errors import DeviceError
from mlcgen.runtime import load_plan
from mlcgen.runtime.engine import Engine
from mlcgen.runtime.llm import load_engine
from mlcgen.runtime.sampler import SamplingParams
from mlcgen.runtime.target_choice import choose_target

PROMPT = 16  # tokens
WARM_UP = 3  # steps that do not count, after the prompts


@dataclass(frozen=True)
class Sample:
    """Of the steps that count."""

    batch: int
    seconds: float
    steps: int
    tokens: int
    streamed: int  # bytes
    memory: int  # bytes of this process, after


def measure(path: Path, target: str, weight_memory: str | None, batches: Sequence[int], steps: int) -> list[Sample]:
    """Of each number of sequences, with the weights loaded once."""
    manifest = artifact.read_manifest(path)
    length = PROMPT + steps + WARM_UP + 2
    pages = max(batches) * -(-length // int(manifest["kv"]["page_size"]))
    engine = load_engine(path, target, pages, max(batches), weight_memory=weight_memory)
    return [run(engine, batch, length, steps) for batch in batches]


def run(engine: Engine, batch: int, length: int, steps: int) -> Sample:
    greedy = SamplingParams(temperature=0, max_tokens=length - PROMPT, ignore_eos=True)
    prompts = np.random.default_rng(batch).integers(5, engine.executor.vocab_size - 5, (batch, PROMPT)).tolist()
    outputs = [engine.add_request(str(i), prompt, greedy, stream=False) for i, prompt in enumerate(prompts)]
    while min(len(output.token_ids) for output in outputs) < WARM_UP:
        engine.step()
        if failed := next((output.error for output in outputs if output.error), None):
            raise failed  # deep models of random weights overflow 16 bits, say
    stream = getattr(engine.executor, "stream", None)
    loaded, count, begun = _loaded(stream), _count(outputs), time.perf_counter()
    for _ in range(steps):
        engine.step()
    seconds = time.perf_counter() - begun
    sample = Sample(batch, seconds, steps, _count(outputs) - count, _loaded(stream) - loaded, _memory(engine))
    while engine.has_unfinished:
        engine.step()
    return sample


def _loaded(stream: Any) -> int:
    return 0 if stream is None else int(stream.bytes_loaded)


def _count(outputs: Sequence[Any]) -> int:
    return sum(len(output.token_ids) for output in outputs)


def _memory(engine: Engine) -> int:
    """What a CPU's process has in memory, or what of a GPU's memory is taken."""
    device = getattr(engine.executor, "device", None)
    if device is not None:
        free, total = device.memory()
        return int(total - free)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def link(path: Path, target: str, from_file: bool) -> Callable[[], float]:
    manifest = artifact.read_manifest(path)
    kind = "cpu" if from_file else choose_target(manifest["targets"], target)["kind"]
    files = [str(path / weights["file"]) for weights in manifest["weights"]]  # none of random weights
    return open_link_probe(kind, *files)


HEADER = (
    "weight memory",
    "batch",
    "MB/step",
    "ms/step",
    "tokens/s",
    "streamed GB/s",
    "link GB/s",
    "share",
    "memory MB",
)


def row(weight_memory: str, sample: Sample, links: Sequence[float]) -> tuple[str, ...]:
    rate, own = sample.streamed / sample.seconds, statistics.mean(links)
    return (
        weight_memory,
        str(sample.batch),
        f"{sample.streamed / sample.steps / 1e6:.1f}",
        f"{sample.seconds / sample.steps * 1e3:.1f}",
        f"{sample.tokens / sample.seconds:.2f}",
        f"{rate / 1e9:.2f}",
        f"{own / 1e9:.2f}",
        f"{rate / own:.0%}",
        f"{sample.memory / 1e6:.0f}",
    )


def show(cells: Sequence[str]) -> None:
    print("  ".join(f"{cell:>{max(len(title), 8)}}" for cell, title in zip(cells, HEADER, strict=True)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--target", default="auto")
    parser.add_argument("--weight-memory", nargs="+", default=["none"], help="sizes; none: all weights are there")
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=1, help="times that each case is measured, in turns")
    parser.add_argument("--from-file", action="store_true", help="on a GPU: as if the host had no memory for layers")
    given = parser.parse_args()
    if given.from_file:
        load_plan.HOST_SHARE = 0.0
    probe = link(given.artifact, given.target, given.from_file)
    show(HEADER)
    links = [probe()]
    for _ in range(given.repeat):
        for weight_memory in given.weight_memory:
            budget = None if weight_memory == "none" else weight_memory
            try:
                samples = measure(given.artifact, given.target, budget, given.batch, given.steps)
            except DeviceError as error:
                print(f"{weight_memory}: {error}", flush=True)
                continue
            gc.collect()
            links.append(probe())
            for sample in samples:
                show(row(weight_memory, sample, links[-2:]))


if __name__ == "__main__":
    main()
