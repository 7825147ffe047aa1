"""The simulator beside the engine itself: one trace served by an artifact, and replayed with the cost of its steps.

python benchmarks/simulated.py [ARTIFACT] [--target T] [--rate R] [--rate R ...]; without an artifact SmolLM2-135M is
compiled for this CPU. The steps are timed before and after each run: what else the machine does then slows both alike.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import mlcgen
from mlcgen.runtime.engine import Engine
from mlcgen.runtime.llm import load_engine
from mlcgen.runtime.outputs import RequestOutput
from mlcgen.runtime.sampler import SamplingParams
from mlcgen.simulate.calibrate import calibrate
from mlcgen.simulate.replay import Job, Replay, replay
from mlcgen.simulate.report import Percentiles
from mlcgen.simulate.run import Options, server_of
from mlcgen.simulate.step_times import StepTimes
from mlcgen.simulate.trace import Arrival, Load, make_trace, parse_lengths

Figures = dict[str, float]


def fresh(engine: Engine, tokens_per_step: int | None) -> Engine:
    """An engine on the same executor, with empty pages."""
    options = replace(engine.options, tokens_per_step=tokens_per_step)
    return Engine(engine.executor, None, engine.eos_token_ids, engine.context_length, 64, options)


def serve(engine: Engine, trace: list[Arrival]) -> Figures:
    """The trace in real time, with random tokens."""
    random, outputs = np.random.default_rng(0), []
    times: list[tuple[RequestOutput, Arrival]] = []
    begun, index = time.monotonic(), 0
    while index < len(trace) or engine.has_unfinished:
        now = time.monotonic() - begun
        while index < len(trace) and trace[index].seconds <= now:
            arrival = trace[index]
            prompt = random.integers(engine.executor.vocab_size, size=arrival.prompt_tokens).tolist()
            params = SamplingParams(temperature=0, max_tokens=arrival.output_tokens, ignore_eos=True)
            outputs.append(engine.add_request(str(index), prompt, params, stream=False))
            times.append((outputs[-1], arrival))
            index += 1
        if engine.has_unfinished:
            engine.step()
        else:
            time.sleep(max(trace[index].seconds - (time.monotonic() - begun), 0))
    found = []
    for output, arrival in times:
        metrics = output.metrics
        assert metrics.first_token is not None
        assert metrics.finished is not None
        found.append((arrival, metrics.first_token - begun, metrics.finished - begun, metrics.num_tokens))
    return figures(found)


def figures(requests: list[tuple[Arrival, float, float, int]]) -> Figures:
    """requests: each with the seconds of its first and last token, and how many it has."""
    seconds = max(last for _, _, last, _ in requests) - requests[0][0].seconds
    ttft = Percentiles.of([first - arrival.seconds for arrival, first, _, _ in requests])
    tpot = Percentiles.of([(last - first) / (count - 1) for _, first, last, count in requests if count > 1])
    return {
        "requests/s": len(requests) / seconds,
        "generated tokens/s": sum(count for *_, count in requests) / seconds,
        "first token p50, s": ttft.p50,
        "first token p95, s": ttft.p95,
        "per token p50, ms": tpot.p50 * 1e3,
        "per token p95, ms": tpot.p95 * 1e3,
    }


def simulated(result: Replay) -> Figures:
    jobs: list[Job] = result.finished
    return figures([(job.arrival, job.token_times[0], job.token_times[-1], len(job.token_times)) for job in jobs])


def compare(engine: Engine, load: Load, rate: float, tokens_per_step: int | None) -> Table:
    trace = make_trace(load, rate, engine.context_length)
    before = calibrate(fresh(engine, None), "before")
    measured = serve(fresh(engine, tokens_per_step), trace)
    after = calibrate(fresh(engine, None), "after")
    # Where the two differ, a step cost something in between, on average; a fit takes the median of each shape.
    times = StepTimes("both", before.steps + after.steps, after.limits, after.page_seconds)
    server = server_of(times, Options(load))
    if tokens_per_step:
        server = replace(server, tokens_per_step=tokens_per_step)
    begun = time.perf_counter()
    predicted = simulated(replay(trace, server))
    seconds = time.perf_counter() - begun
    name = (
        f"{load.num_requests} requests, {rate:g}/s, {server.tokens_per_step} tokens a step; replayed in {seconds:.2f} s"
    )
    drift = sum(step.seconds for step in after.steps) / sum(step.seconds for step in before.steps)
    table = Table("", "measured", "simulated", "error", title=f"{name}; steps after / before: {drift:.2f}")
    for figure, value in measured.items():
        error = predicted[figure] / value - 1
        table.add_row(figure, f"{value:.4g}", f"{predicted[figure]:.4g}", f"{error:+.1%}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", nargs="?", type=Path)
    parser.add_argument("--target", default="auto")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--rate", type=float, action="append", help="requests a second; default: 2")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--prompt", default="48:160", help="tokens: N, or MEDIAN:P95")
    parser.add_argument("--output", default="24:64", help="likewise")
    parser.add_argument("--tokens-per-step", type=int)
    arguments = parser.parse_args()
    lengths = parse_lengths(arguments.prompt), parse_lengths(arguments.output)
    load = Load(arguments.requests, "poisson", *lengths)
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.artifact
        if path is None:
            path = Path(folder) / "smollm2"
            mlcgen.compile("smollm2-135m", ["cpu"], "q8", path)
        engine = load_engine(path, arguments.target, num_threads=arguments.threads)
        for rate in arguments.rate or (2.0,):
            Console().print(compare(engine, load, rate, arguments.tokens_per_step))


if __name__ == "__main__":
    main()
