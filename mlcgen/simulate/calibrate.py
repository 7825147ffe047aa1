"""Times the steps of a loaded engine: decodes, chunks of prompts, and both together, at short and long contexts."""

from collections.abc import Callable, Iterator, Sequence
from statistics import median
from time import perf_counter

import numpy as np

from mlcgen.runtime.engine import Engine
from mlcgen.runtime.executor import SamplingExecutor
from mlcgen.runtime.host_sampling import HostSampling
from mlcgen.runtime.kv_cache import PagePool, num_pages_for
from mlcgen.runtime.sampler import Sampler, SamplingParams
from mlcgen.runtime.scheduler import Sequence as Cached
from mlcgen.runtime.step_input import step_input
from mlcgen.simulate.cost import MeasuredStep, StepShape, medians
from mlcgen.simulate.step_times import Limits, StepTimes

__all__ = ["calibrate"]

Part = tuple[int, int]  # a sequence's tokens in the cache, and of this step
GREEDY = SamplingParams(temperature=0.0)
# Rounds over all shapes, so that what else the machine does slows all of them, after one to warm up.
LEAST_ROUNDS, ROUNDS, SECONDS = 3, 10, 10.0  # and how long to go on beyond the least
MOVED = 16  # pages moved together, as of a preempted sequence
MOST_CACHED = 1 << 14  # tokens in the cache of all sequences together: filling more pages takes long


def calibrate(engine: Engine, source: str, progress: Callable[[int, int], None] | None = None) -> StepTimes:
    """Time steps of an engine that serves nobody. What its pages held is lost. progress(shapes done, of)"""
    stepper = _Stepper(engine)
    shapes = [parts for parts in _shapes(engine) if stepper.num_pages(parts) <= engine.executor.num_pages]
    page_seconds = stepper.fill_pages(max(map(stepper.num_pages, shapes)))
    batches = [(StepShape.of((*part, True) for part in parts), stepper.batch(parts)) for parts in shapes]
    steps: list[MeasuredStep] = []
    begun, rounds, total = perf_counter(), 0, (LEAST_ROUNDS + 1) * len(batches)
    while rounds <= LEAST_ROUNDS or (rounds <= ROUNDS and perf_counter() - begun < SECONDS):
        for done, (shape, batch) in enumerate(batches):
            if progress is not None:
                progress(min(rounds, LEAST_ROUNDS) * len(batches) + done, total)
            seconds = stepper.run(batch)
            if rounds:  # the first one warms up
                steps.append(MeasuredStep(shape, seconds))
        rounds += 1
    if progress is not None:
        progress(total, total)
    executor, layers = engine.executor, engine.executor.page_shape
    limits = Limits(
        executor.num_pages,
        executor.page_size,
        engine.scheduler.max_batch,
        engine.scheduler.max_tokens_per_step,
        engine.context_length,
        layers[0] * layers[1],
        stepper.looks_ahead,
    )
    return StepTimes(source, medians(steps), limits, page_seconds)


def _shapes(engine: Engine) -> Iterator[list[Part]]:
    """Batches that the engine takes, if it has pages for them."""
    most, context, batch = engine.scheduler.max_tokens_per_step, engine.context_length, engine.scheduler.max_batch
    short, long = min(64, context // 4), min(1024, context // 2)
    candidates: list[list[Part]] = []
    for count in _powers(1, min(batch, most)):
        candidates += [[(short, 1)] * count, [(min(long, MOST_CACHED // count), 1)] * count]
    for tokens in _powers(8, min(most, context - 1)):
        candidates.append([(0, tokens)])
    chunk, few, many = min(128, most // 2), min(8, batch - 1, most // 2), min(batch - 1, most // 2)
    candidates += [[(long, chunk)], [(long, 1)] * few + [(0, chunk)], [(short, 1)] * few + [(long, most // 4)]]
    candidates += [[(short, 1)] * many + [(0, count)] for count in (chunk // 8, chunk, most // 2)]
    candidates.append([(0, max(most // 4, 2))] * min(4, batch))
    for parts in candidates:
        counts = [count for _, count in parts]
        longest = max(before + count for before, count in parts)
        if min(counts) > 0 and sum(counts) <= most and longest <= context:
            yield parts


def _powers(first: int, last: int) -> list[int]:
    """first, twice that, and so on, then last."""
    found = [first]
    while found[-1] * 2 < last:
        found.append(found[-1] * 2)
    return [*found, last] if last > first else [last]


class _Stepper:
    """Runs steps of given shapes on an executor, with the choice of tokens, as the engine does."""

    def __init__(self, engine: Engine) -> None:
        self._executor = executor = engine.executor
        self._sampling = executor if isinstance(executor, SamplingExecutor) else HostSampling(executor)
        self._random = np.random.default_rng(0)
        self.looks_ahead = self._sampling.looks_ahead([Sampler(GREEDY, [0], frozenset())])

    def num_pages(self, parts: Sequence[Part]) -> int:
        return sum(num_pages_for(before + count, self._executor.page_size) for before, count in parts)

    def fill_pages(self, num_pages: int) -> float:
        """Give the first pages contents, as memory that nobody wrote to is read too fast; seconds to move one."""
        executor, (layers, layer_bytes) = self._executor, self._executor.page_shape
        count = min(executor.page_size, executor.max_tokens_per_step)
        self.run([self._sequence(0, count, PagePool(executor.num_pages))])
        contents = executor.pinned(layers * layer_bytes)[: layers * layer_bytes].reshape(layers, 1, layer_bytes)
        begun = perf_counter()
        executor.read_pages([0], contents, [0])
        times = [perf_counter() - begun]
        for first in range(1, num_pages, MOVED):
            pages = range(first, min(first + MOVED, num_pages))
            begun = perf_counter()
            executor.write_pages(pages, contents, [0] * len(pages))  # one by one, as pages of a sequence lie apart
            times.append((perf_counter() - begun) / len(pages))
        return median(times[1:] or times)

    def batch(self, parts: Sequence[Part]) -> list[Cached]:
        pool = PagePool(self._executor.num_pages)
        return [self._sequence(before, count, pool) for before, count in parts]

    def run(self, batch: Sequence[Cached]) -> float:
        """Seconds of a step alone; the engine hides a part of them behind the step before, where it looks ahead."""
        begun = perf_counter()
        samplers = [Sampler(GREEDY, sequence.tokens, frozenset()) for sequence in batch]
        step, sampled_rows, _ = step_input(batch, {}, self._executor.page_size)
        self._sampling.start(step, samplers, sampled_rows)
        self._sampling.finish()
        return perf_counter() - begun

    def _sequence(self, before: int, count: int, pool: PagePool) -> Cached:
        sequence = Cached(self._random.integers(self._executor.vocab_size, size=before + count).tolist())
        sequence.num_computed, sequence.num_scheduled = before, count
        sequence.table.extend(pool.allocate(num_pages_for(before + count, self._executor.page_size)))
        return sequence
