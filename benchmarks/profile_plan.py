"""Where the time of a GPU's step goes: whole steps, and each kernel of an artifact on the tensors of a real step.

    python benchmarks/profile_plan.py dist/llama-3-8b-q4 --decode 1:512 16:512 64:512 --prefill 1024

`--decode BATCH:CONTEXT`: sequences and cached tokens. A step is a graph launched again and again (`graph`), and the
same with inputs filled and logits copied back (`step`). A kernel's time is that of a graph of all its launches in the
step, one after the other, each layer with its own weights: no gaps between different kernels, so the sums lie below
the step's own time.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np

from mlcgen.runtime.executor import AdaptedStepInput, StepInput
from mlcgen.runtime.load import load_executor
from mlcgen.runtime.plan_executor import PlanExecutor

REPEAT = 30


def decode_input(executor: PlanExecutor, batch: int, context: int) -> StepInput:
    """Every sequence adds its token number `context`; pages repeat where the pool is too small for all."""
    blocks = -(-context // executor.page_size)
    table = np.arange(batch * blocks).reshape(batch, blocks) % executor.num_pages
    position = np.full(batch, context - 1)
    slots = table[:, -1] * executor.page_size + position % executor.page_size
    return step_input(position, slots, table, np.full(batch, context), np.arange(batch + 1))


def prefill_input(executor: PlanExecutor, tokens: int) -> StepInput:
    table = np.arange(-(-tokens // executor.page_size))[None]
    position = np.arange(tokens)
    return step_input(position, position, table, np.array([tokens]), np.array([0, tokens]))


def step_input(position: Any, slots: Any, table: Any, lengths: Any, start: Any) -> StepInput:
    ids = np.random.default_rng(0).integers(5, 1000, len(position))
    arrays = (ids, position, slots, table, lengths, start, start[1:] - 1)
    return StepInput(*(array.astype(np.int32) for array in arrays))


def load_adapters(executor: PlanExecutor, count: int) -> None:
    layout, random = executor.adapters, np.random.default_rng(0)
    for slot in range(count):
        assert layout is not None, "compile the artifact with --lora-rank"
        assert slot < layout.limits.slots, "compile the artifact with more --adapters"
        shapes = [shape[1:] for shape in layout.buffers.values()]
        arrays = [(random.standard_normal(shape) * 0.01).astype(layout.limits.dtype) for shape in shapes]
        executor.write_adapter(slot, list(zip(arrays[::2], arrays[1::2], strict=True)))


def adapted(step: StepInput, count: int) -> StepInput:
    """The step, its sequences having so many adapters in turns."""
    if not count:
        return step
    slots = np.arange(len(step.seq_lens), dtype=np.int32) % count
    return AdaptedStepInput(**vars(step), adapter_slots=np.repeat(slots, np.diff(step.query_start)))


def profile(executor: PlanExecutor, name: str, batch: StepInput, top: int) -> None:
    logits = executor.step(batch)
    assert np.isfinite(logits).all(), "the step gave NaN or infinities"
    whole = statistics.median(seconds(lambda: executor.step(batch)) for _ in range(REPEAT))
    step, device = executor.prepared(batch), executor.device
    line = f"{name}: step {whole * 1e3:.3f} ms, {len(logits) / whole:.0f} sequences/s"
    if step.graph is not None:
        graph = step.graph
        device.synchronize()
        alone = seconds(lambda: [device.launch_graph(graph) for _ in range(REPEAT)], device.synchronize) / REPEAT
        line += f"; graph {alone * 1e3:.3f} ms, {len(logits) / alone:.0f} sequences/s"
    print(line)
    times = kernel_times(executor, step)
    print(f"  kernels {sum(t for t, _ in times.values()) * 1e3:.3f} ms")
    for kernel, (total, count) in sorted(times.items(), key=lambda item: -item[1][0])[:top]:
        print(f"  {total * 1e6:9.0f} us  {count:3d} x {total / count * 1e6:8.1f}  {kernel}")


def kernel_times(executor: PlanExecutor, step: Any) -> dict[str, tuple[float, int]]:
    """Kernel -> (seconds of all its launches in a step, launches)."""
    device, calls = executor.device, defaultdict[str, list[Any]](list)
    launch = device.launch
    device.launch = lambda *args: calls[args[0]].append(args)  # type: ignore[method-assign]
    executor.run(step)
    device.launch = launch  # type: ignore[method-assign]
    found = {}
    for kernel, launches in calls.items():
        turns = max(1, 16 // len(launches))
        with device.capture() as graph:
            for args in launches * turns:
                launch(*args)
        device.launch_graph(graph)
        device.synchronize()
        best = min(seconds(lambda graph=graph: device.launch_graph(graph), device.synchronize) for _ in range(5))
        found[kernel] = best / turns, len(launches)
    return found


def seconds(work: Callable[[], Any], wait: Callable[[], None] = lambda: None) -> float:
    start = perf_counter()
    work()
    wait()
    return perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--target", default="cuda")
    parser.add_argument("--decode", nargs="*", default=[], metavar="BATCH:CONTEXT")
    parser.add_argument("--prefill", nargs="*", type=int, default=[], metavar="TOKENS")
    parser.add_argument("--adapters", type=int, default=0, help="that sequences take turns with, of random values")
    parser.add_argument("--top", type=int, default=12, help="kernels to show")
    args = parser.parse_args()
    executor = load_executor(args.artifact, args.target).executor
    assert isinstance(executor, PlanExecutor), "this profiles targets that run launch plans"
    load_adapters(executor, args.adapters)
    for case in args.decode:
        batch, context = map(int, case.split(":"))
        step = adapted(decode_input(executor, batch, context), args.adapters)
        profile(executor, f"decode {batch} x {context}", step, args.top)
    for tokens in args.prefill:
        profile(executor, f"prefill {tokens}", adapted(prefill_input(executor, tokens), args.adapters), args.top)


if __name__ == "__main__":
    main()
