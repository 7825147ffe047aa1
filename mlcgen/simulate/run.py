"""From measured steps and options to summaries: one replay for each combination of what has several values."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from mlcgen.runtime.kv_cache import num_pages_for
from mlcgen.runtime.options import EngineOptions
from mlcgen.runtime.page_mover import SAVED_PER_PAGE
from mlcgen.simulate.replay import Prefill, Server, replay
from mlcgen.simulate.report import Summary, summarize
from mlcgen.simulate.step_times import StepTimes
from mlcgen.simulate.trace import Arrival, Load, make_trace, read_trace

__all__ = ["Case", "Options", "Simulation", "server_of", "simulate"]

CONTEXT = 4096  # tokens of a sequence that there are pages for, where neither pages nor context are known


@dataclass(frozen=True)
class Options:
    """What to replay, and on what. Several values are all tried; None, or none: as measured."""

    load: Load
    rates: Sequence[float] = (1.0,)
    trace: Path | None = None  # instead of the load
    tokens_per_step: Sequence[int] = ()
    prefills: Sequence[Prefill] = ("chunked",)
    replicas: Sequence[int] = (1,)
    num_pages: int | None = None
    page_size: int | None = None
    max_batch: int | None = None
    prefix_cache: bool = True


@dataclass(frozen=True)
class Case:
    rate: float  # requests a second
    tokens_per_step: int
    prefill: Prefill
    replicas: int
    summary: Summary


@dataclass(frozen=True)
class Simulation:
    source: str
    num_steps: int  # that were measured
    fit_errors: tuple[float, float]  # median and largest, relative
    server: Server
    cases: list[Case]
    warnings: list[str]

    def as_dict(self) -> dict[str, Any]:
        server = asdict(self.server)
        for varied in ("tokens_per_step", "prefill"):
            del server[varied]
        return {
            "source": self.source,
            "measured_steps": self.num_steps,
            "fit_error": dict(zip(("median", "max"), self.fit_errors, strict=True)),
            "server": server,
            "cases": [asdict(case) for case in self.cases],
        }


def simulate(times: StepTimes, options: Options, progress: Callable[[str, int, int], None] | None = None) -> Simulation:
    """Raises SimulationError for steps, a trace or sizes that make no simulation."""
    server = server_of(times, options)
    most = times.limits.tokens_per_step
    sizes = list(dict.fromkeys(options.tokens_per_step)) or [most]
    cases = []
    for rate, trace in _traces(options, server.context_length):
        for size, prefill, replicas in product(sizes, options.prefills, options.replicas):
            name = f"{rate:.3g}/s, {size} tokens a step, {prefill}, x{replicas}"
            report = None if progress is None else lambda done, total, name=name: progress(name, done, total)
            its = replace(server, tokens_per_step=size, prefill=prefill)
            cases.append(Case(rate, size, prefill, replicas, summarize(replay(trace, its, replicas, report))))
    errors = times.cost.errors(times.steps)
    beyond = [f"steps of {size} tokens are beyond the {most} of the measured engine" for size in sizes if size > most]
    return Simulation(times.source, len(times.steps), (median(errors), max(errors)), server, cases, beyond)


def server_of(times: StepTimes, options: Options) -> Server:
    """The measured engine, with what the options change. Another page size keeps the memory's size."""
    limits = times.limits
    size, batch = options.page_size or limits.page_size, options.max_batch or limits.max_batch
    pages = options.num_pages
    if pages is None and limits.num_pages is not None:
        pages = max(limits.num_pages * limits.page_size // size, 1)
    pages = pages or batch * num_pages_for(limits.context_length or CONTEXT, size)
    page_bytes = limits.page_bytes * size // limits.page_size
    can_save = bool(page_bytes and times.page_seconds)
    saved = min(EngineOptions.swap_bytes // page_bytes, SAVED_PER_PAGE * pages) if can_save else 0
    return Server(
        times.cost,
        pages,
        size,
        batch,
        limits.tokens_per_step,
        prefix_cache=options.prefix_cache,
        context_length=limits.context_length,
        host_pages=saved,
        page_seconds=(times.page_seconds or 0.0) * size / limits.page_size,
        looks_ahead=limits.looks_ahead,
    )


def _traces(options: Options, context_length: int | None) -> list[tuple[float, list[Arrival]]]:
    """(requests a second, the requests)"""
    if options.trace is None:
        return [(rate, make_trace(options.load, rate, context_length)) for rate in dict.fromkeys(options.rates)]
    trace = read_trace(options.trace)
    seconds = trace[-1].seconds - trace[0].seconds
    return [(len(trace) / seconds if seconds else float(len(trace)), trace)]
