"""What the engine's features are worth on real weights, each beside the same without it, in turns.

python benchmarks/serving.py [ARTIFACT] [--target T] [--case NAME ...]; without an artifact SmolLM2-135M is compiled for
this CPU. Medians of turns; a table per case. Prompts are token ids of tests/data, so nothing is downloaded.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import mlcgen
from mlcgen.artifact import read_manifest
from mlcgen.runtime.draft_model import ModelDrafter
from mlcgen.runtime.engine import Engine
from mlcgen.runtime.grammar import StructuredOutput
from mlcgen.runtime.llm import load_engine
from mlcgen.runtime.load import load_executor
from mlcgen.runtime.options import EngineOptions
from mlcgen.runtime.outputs import RequestOutput
from mlcgen.runtime.sampler import SamplingParams

TEXT = Path(__file__).parents[1] / "tests" / "data" / "smollm2_135m_ppl_ids_humaneval.json"
TURNS = 3
WARM_UP = 4  # turns in which a GPU may still record graphs
Row = dict[str, str]


def greedy(max_tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **more)


def real_tokens() -> list[int]:
    held = json.loads(TEXT.read_text())
    ids: list[int] = held if isinstance(held, list) else next(v for v in held.values() if isinstance(v, list))
    return ids


class Server:
    """Engines with different options over one executor: weights are loaded once, and pages start empty each time."""

    def __init__(self, path: Path, target: str, draft_model: Path | None, **sizes: Any) -> None:
        self.draft_model = draft_model
        self.loaded = load_engine(path, target, **sizes)
        if draft_model is not None:
            loaded = load_executor(draft_model, target, num_pages=256)
            self._draft = loaded.executor, loaded.context_length, loaded.max_batch

    def engine(self, max_batch: int | None = None, **options: Any) -> Engine:
        loaded = self.loaded
        most = max_batch or loaded.scheduler.max_batch
        drafter = None
        if options.get("speculation") == "model":
            options["draft_model"] = self.draft_model
            drafter = ModelDrafter(*self._draft, options.get("branches", 1))
        chosen, sizes = EngineOptions(**options), (loaded.context_length, most)
        return Engine(loaded.executor, loaded.tokenizer, loaded.eos_token_ids, *sizes, chosen, drafter)


def serve(
    engine: Engine, requests: list[tuple[list[int], SamplingParams]], adapters: list[str | None] | None = None
) -> tuple[list[RequestOutput], float]:
    """All requests at once; (outputs, seconds)."""
    begun, names = time.perf_counter(), adapters or [None] * len(requests)
    outputs = [
        engine.add_request(str(i), *request, stream=False, adapter=name)
        for i, (request, name) in enumerate(zip(requests, names, strict=True))
    ]
    while engine.has_unfinished:
        engine.step()
    assert not any(output.error for output in outputs)
    return outputs, time.perf_counter() - begun


def in_turns(cases: dict[str, Callable[[], float]]) -> dict[str, float]:
    """The median of what each gives, after one turn to warm up."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(TURNS + 1):
        for name, case in cases.items():
            value = case()
            if turn:
                found[name].append(value)
    return {name: statistics.median(values) for name, values in found.items()}


MIXES = {"short questions": ((8, 65), (32, 129)), "documents": ((16, 257), (16, 65))}  # tokens of prompts, generated


def mixed_load(server: Server) -> list[Row]:
    """64 requests of random lengths: all at once, and one after another."""
    rows = []
    for name, (prompts, answers) in MIXES.items():
        random, text = np.random.default_rng(0), real_tokens()
        requests = []
        for _ in range(64):
            length, start = int(random.integers(*prompts)), int(random.integers(0, len(text) - 300))
            requests.append((text[start : start + length], greedy(int(random.integers(*answers)))))
        num_tokens = sum(params.max_tokens or 0 for _, params in requests)
        policy: list[float] = []

        def together(requests: Any = requests, num_tokens: int = num_tokens, policy: Any = policy) -> float:
            engine = server.engine(prefix_cache=False)
            _, seconds = serve(engine, requests)
            policy.append(engine.stats().policy_seconds / seconds)
            return num_tokens / seconds

        def one_by_one(requests: Any = requests, num_tokens: int = num_tokens) -> float:
            engine = server.engine(prefix_cache=False)
            return num_tokens / sum(serve(engine, [request])[1] for request in requests)

        rates = in_turns({"together": together, "one by one": one_by_one})
        rows.append(
            {
                "generated tokens/s": name,
                "one by one": f"{rates['one by one']:.1f}",
                "together": f"{rates['together']:.1f}",
                "ratio": f"{rates['together'] / rates['one by one']:.2f}",
                "scheduler's share": f"{statistics.median(policy):.2%}",
            }
        )
    return rows


def shared_prefix(server: Server) -> list[Row]:
    """Time to first token of two requests with the same 1,024 tokens first and 32 of their own."""
    text = real_tokens()
    system = (text * 2)[:1024]
    times: dict[str, list[float]] = {"first": [], "second": []}
    for turn in range(TURNS + WARM_UP):
        engine = server.engine()
        for name, start in (("first", 0), ("second", 500)):
            _, seconds = serve(engine, [([*system, *text[start : start + 32]], greedy(1))])
            if turn >= WARM_UP:
                times[name].append(seconds * 1e3)
    first, second = (statistics.median(times[name]) for name in ("first", "second"))
    return [
        {"": "first request, ms", "value": f"{first:.1f}"},
        {"": "second", "value": f"{second:.1f}"},
        {"": "share", "value": f"{second / first:.1%}"},
    ]


EDIT = (
    "Original:\nThe harbour was quiet in the morning. Three boats lay at the pier, their sails folded, and a dog slept "
    "on the warm stones. An old man mended a net and did not look up when the ferry came. Nobody got off. The captain "
    "waved, the bell rang twice, and the ferry went on to the next island, where the market was already open.\n\n"
    "Corrected:\nThe harbour was quiet in the morning. Three boats"
)


GUESSES: dict[str, dict[str, Any]] = {
    "off": {},
    "ngram": {"speculation": "ngram"},
    "ngram, trees": {"speculation": "ngram", "branches": 3},
    "lookahead": {"speculation": "lookahead"},
    "lookahead, trees": {"speculation": "lookahead", "branches": 3},
    "model": {"speculation": "model"},
    "model, trees": {"speculation": "model", "branches": 3},
}


def speculation(server: Server) -> list[Row]:
    """Tokens/s of one request, with and without guesses: an edit of its own prompt, and an ordinary text."""
    rows, prompts, tokenizer = [], {"text": real_tokens()[:64]}, server.loaded.tokenizer
    if tokenizer is not None:
        prompts["edit"] = tokenizer.encode(EDIT)
    kinds = [name for name in GUESSES if server.draft_model or not name.startswith("model")]
    for name, prompt in prompts.items():
        stats: dict[str, Any] = {}
        texts: dict[str, list[int]] = {}

        def run(kind: str, prompt: list[int] = prompt, stats: Any = stats, texts: Any = texts) -> float:
            engine = server.engine(**GUESSES[kind])
            outputs, _ = serve(engine, [(prompt, greedy(128))])
            stats[kind], texts[kind] = engine.stats(), outputs[0].token_ids
            rate = outputs[0].metrics.decode_tokens_per_s
            assert rate is not None
            return rate

        rates = in_turns({kind: lambda kind=kind: run(kind) for kind in kinds})  # type: ignore[misc]
        for kind in kinds:
            rows.append(
                {
                    "": name,
                    "guesses": kind,
                    "tokens/s": f"{rates[kind]:.1f}",
                    "ratio": f"{rates[kind] / rates['off']:.2f}",
                    "drafted": str(stats[kind].num_drafted),
                    "accepted": f"{stats[kind].acceptance:.0%}",
                    "same tokens": str(texts["off"] == texts[kind]),
                }
            )
    return rows


PROMPTS = {
    "chunks": {},
    "chunks of 128": {"tokens_per_step": 128},
    "whole prompts": {"chunked_prefill": False},
}


def chunking(server: Server) -> list[Row]:
    """Requests that come at 70% of what the engine can do, a quarter of them with long prompts: waiting times."""
    random, text = np.random.default_rng(3), real_tokens()
    requests = []
    for i in range(64):
        length, count = (int(random.integers(600, 1001)), 24) if i % 4 == 0 else (int(random.integers(16, 65)), 48)
        start = int(random.integers(0, len(text) - length))
        requests.append((text[start : start + length], greedy(count)))
    seconds = min(serve(server.engine(prefix_cache=False), requests)[1] for _ in range(2))
    arrivals = np.cumsum(random.exponential(seconds / 64 / 0.7, 64)).tolist()
    found: dict[str, list[list[float]]] = {name: [] for name in PROMPTS}
    for turn in range(TURNS + 1):
        for name, options in PROMPTS.items():
            waits = arrive(server.engine(prefix_cache=False, **options), requests, arrivals)  # type: ignore[arg-type]
            if turn:
                found[name].append(waits)
    names = ("first token p50, ms", "first token p95", "each token p50", "each token p95")
    rows = []
    for name, waits in found.items():
        middle = [statistics.median(each) * 1e3 for each in zip(*waits, strict=True)]
        rows.append({"": name, **{column: f"{value:.1f}" for column, value in zip(names, middle, strict=True)}})
    return rows


def arrive(engine: Engine, requests: list[tuple[list[int], SamplingParams]], arrivals: list[float]) -> list[float]:
    """Seconds to the first token and per token after it, of a middling and a slow request each."""
    begun, outputs = time.monotonic(), []
    while len(outputs) < len(requests) or engine.has_unfinished:
        while len(outputs) < len(requests) and time.monotonic() - begun >= arrivals[len(outputs)]:
            outputs.append(engine.add_request(str(len(outputs)), *requests[len(outputs)], stream=False))
        if engine.has_unfinished:
            engine.step()
        else:
            time.sleep(max(0.0, begun + arrivals[len(outputs)] - time.monotonic()))
    first = [(o.metrics.first_token or 0.0) - begun - at for o, at in zip(outputs, arrivals, strict=True)]
    each = [((o.metrics.finished or 0) - (o.metrics.first_token or 0)) / (o.metrics.num_tokens - 1) for o in outputs]
    return [float(np.percentile(values, q)) for values in (first, each) for q in (50, 95)]


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 4, "maxItems": 8},
        "year": {"type": "integer"},
    },
    "required": ["name", "tags", "year"],
}


def structure(server: Server) -> list[Row]:
    """What a JSON schema costs per token, forced tokens and masks together: 1 and 16 requests, with and without it."""
    rows, text = [], real_tokens()
    engine = server.engine(prefix_cache=False)  # one for all: the first schema reads the vocabulary
    for count in (1, 16):
        prompts = [text[start : start + 48] for start in range(0, 60 * count, 60)]
        drafted: list[float] = []

        def run(structured: Any, prompts: Any = prompts, drafted: Any = drafted) -> float:
            params = SamplingParams(temperature=0, max_tokens=96, structured=structured)
            outputs, seconds = serve(engine, [(prompt, params) for prompt in prompts])
            num_tokens = sum(len(output.token_ids) for output in outputs)
            if structured:
                drafted.append(sum(output.metrics.num_accepted for output in outputs) / num_tokens)
            return seconds / num_tokens * 1e3

        schema = StructuredOutput(json_schema=SCHEMA)
        times = in_turns({"free": lambda: run(None), "schema": lambda: run(schema)})  # noqa: B023
        rows.append(
            {
                "requests": str(count),
                "free, ms per token": f"{times['free']:.2f}",
                "with a schema": f"{times['schema']:.2f}",
                "forced tokens": f"{statistics.median(drafted):.0%}",
            }
        )
    return rows


def waste(server: Server) -> list[Row]:
    """Slots of held pages without a token, on average over the steps of a mixed load."""
    random, text = np.random.default_rng(1), real_tokens()
    engine = server.engine(prefix_cache=False)
    for i in range(48):
        length, start = int(random.integers(100, 700)), int(random.integers(0, len(text) - 800))
        engine.add_request(str(i), text[start : start + length], greedy(int(random.integers(16, 65))), stream=False)
    shares = []
    size = engine.executor.page_size
    while engine.has_unfinished:
        engine.step()
        running = engine.scheduler.running
        held = sum(len(request.table) for request in running) * size
        if held:
            shares.append(1 - sum(request.num_tokens for request in running) / held)
    return [{"": f"page size {size}", "value": f"{statistics.mean(shares):.2%}"}]


def swapping(server: Server) -> list[Row]:
    """A load that does not fit the pages: generated tokens/s with preempted pages saved, and computed anew."""
    text = real_tokens()
    requests = [(text[start : start + 96], greedy(64)) for start in range(0, 1600, 100)]
    num_tokens = sum(params.max_tokens or 0 for _, params in requests)
    stats = {}

    def run(swap_bytes: int) -> float:
        engine = server.engine(swap_bytes=swap_bytes, prefix_cache=False)
        held = engine.pool.allocate(max(engine.pool.num_pages - 64, 0))  # leave 64 pages
        _, seconds = serve(engine, requests)
        engine.pool.free(held)
        stats[swap_bytes] = engine.stats()
        return num_tokens / seconds

    rates = in_turns({"saved": lambda: run(1 << 30), "anew": lambda: run(0)})
    rows = []
    for name, size in (("saved", 1 << 30), ("anew", 0)):
        moved = stats[size].num_saved + stats[size].num_loaded
        row = {"": name, "tokens/s": f"{rates[name]:.1f}", "preemptions": str(stats[size].num_preemptions)}
        each = stats[size].swap_seconds * 1e3 / max(moved, 1)
        rows.append(row | {"pages moved": str(moved), "ms each": f"{each:.3f}"})
    return rows


def moving_pages(server: Server) -> list[Row]:
    """16 pages to pinned memory of the host and back, which are neighbours or lie apart."""
    executor = server.loaded.executor
    layers, layer_bytes = executor.page_shape
    count = min(16, executor.num_pages // 2)
    size = layers * count * layer_bytes
    host = executor.pinned(size)[:size].reshape(layers, count, layer_bytes)
    places, rows = range(count), []
    executor.write_pages(range(2 * count), host, [0] * 2 * count)  # memory that nobody wrote to is read too fast
    for name, pages in (("neighbours", range(count)), ("apart", range(0, 2 * count, 2))):

        def timed(move: Callable[..., None], pages: Any = pages) -> float:
            begun = time.perf_counter()
            move(pages, host, places)
            return (time.perf_counter() - begun) / count

        seconds = in_turns(
            {"to the host": lambda: timed(executor.read_pages), "back": lambda: timed(executor.write_pages)}
        )
        row = {"16 pages": name, "MiB each": f"{layers * layer_bytes / 2**20:.3f}"}
        for way, each in seconds.items():
            row |= {f"{way}, ms each": f"{each * 1e3:.3f}", f"{way}, GB/s": f"{layers * layer_bytes / each / 1e9:.1f}"}
        rows.append(row)
    return rows


def adapters(server: Server) -> list[Row]:
    """Generated tokens/s of 1 to 32 requests without adapters, with one that all have, and with as many as there is
    room for, turn by turn. The artifact must have been compiled with --lora-rank."""
    engine, text, rows = server.engine(prefix_cache=False), real_tokens(), []
    layout = engine.adapters.layout
    random = np.random.default_rng(0)
    arrays = [
        (random.standard_normal(shape[1:]) * 0.01).astype(layout.limits.dtype) for shape in layout.buffers.values()
    ]
    names = [str(slot) for slot in range(layout.limits.slots)]
    for name in names:  # what is in them makes no difference
        engine.adapters.load(name, list(zip(arrays[::2], arrays[1::2], strict=True)))
    for count in (1, 4, 8, 16, 32):
        requests = [(text[start : start + 16], greedy(128)) for start in range(0, 16 * count, 16)]

        def run(given: list[str | None], requests: Any = requests) -> float:
            named = list(itertools.islice(itertools.cycle(given), len(requests)))
            _, seconds = serve(engine, requests, named)
            return 128 * len(requests) / seconds

        cases: dict[str, list[str | None]] = {"none": [None], "one": ["0"]}
        if count > 1:
            cases |= {"half of them one": ["0", None], f"{min(count, len(names))} of them": [*names]}
        rates = in_turns({name: lambda given=given: run(given) for name, given in cases.items()})  # type: ignore[misc]
        for name, rate in rates.items():
            ratio = f"{rate / rates['none']:.2f}"
            rows.append({"requests": str(count), "adapters": name, "tokens/s": f"{rate:.1f}", "ratio": ratio})
    for name in names:
        engine.unload_adapter(name)
    return rows


def aborts(server: Server) -> list[Row]:
    """24 aborts a second while 16 requests run, for ten seconds: pages held at the end."""
    text, engine = real_tokens(), server.engine()
    begun, count, number = time.perf_counter(), 0, 0
    alive: list[str] = []
    while (now := time.perf_counter() - begun) < 10:
        while len(alive) < 16:
            number += 1
            engine.add_request(str(number), text[number % 500 :][:80], greedy(500), stream=False)
            alive.append(str(number))
        while count < 24 * now and alive:
            count += 1
            engine.abort(alive.pop(count % len(alive)))
        engine.step()
    for name in alive:
        engine.abort(name)
    while engine.has_unfinished:
        engine.step()
    held = engine.pool.num_pages - engine.pool.num_free
    return [{"": "aborts", "value": str(count)}, {"": "pages held at the end", "value": str(held)}]


CASES = {
    "mixed load": mixed_load,
    "shared prefix": shared_prefix,
    "speculation": speculation,
    "chunking": chunking,
    "structure": structure,
    "page waste": waste,
    "swapping": swapping,
    "moving pages": moving_pages,
    "adapters": adapters,
    "aborts": aborts,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", nargs="?", type=Path)
    parser.add_argument("--target", default="auto")
    parser.add_argument("--num-pages", type=int, help="default: what memory allows")
    parser.add_argument("--quantization", default="q8", help="of SmolLM2, where no artifact is given")
    parser.add_argument("--page-size", type=int, default=16, help="likewise")
    parser.add_argument("--draft-model", type=Path, help="an artifact that guesses in the case of speculation")
    parser.add_argument("--case", action="append", choices=CASES)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.artifact
        if path is None:
            path = Path(folder) / "smollm2"
            options = {"page_size": arguments.page_size, "max_batch": 64, "lora_rank": 16}
            mlcgen.compile("smollm2-135m", ["cpu"], arguments.quantization, path, **options)
        server = Server(path, arguments.target, arguments.draft_model, num_pages=arguments.num_pages)
        takes_adapters = "adapters" in read_manifest(path)
        for name in arguments.case or [name for name in CASES if name != "adapters" or takes_adapters]:
            rows = CASES[name](server)
            table = Table(*rows[0], title=name)
            for row in rows:
                table.add_row(*row.values())
            Console().print(table)


if __name__ == "__main__":
    main()
