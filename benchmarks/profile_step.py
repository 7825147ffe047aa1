"""Where the time of a step goes: each kernel of an artifact, in a real prefill and in real decode steps.

    python benchmarks/profile_step.py dist/sq4 --prompt 512 --context 128 4000 --batch 8

Per kernel: calls, time per step, share, and for those that read weights the bandwidth reached. Kernels are timed by
the virtual machine's own instrument, which adds about a microsecond to each call, so the sums lie above the step's own
time: that is measured without it.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable
from time import perf_counter

import numpy as np
import tvm_ffi

from mlcgen import artifact
from mlcgen.bench.work import LOOKUPS
from mlcgen.runtime.llm import LLM
from mlcgen.runtime.load import choose_target
from mlcgen.runtime.sampler import SamplingParams

NO_OP = 0  # VMInstrumentReturnKind: go on


class Profile:
    """Counts and times every kernel call while it is on."""

    def __init__(self, llm: LLM) -> None:
        self._vm = llm.engine.executor._vm
        self.times: dict[str, list[float]] = defaultdict(list)
        self._start = 0.0

    def __call__(self, _func: object, name: str, before: bool, _result: object, *_args: object) -> int:
        if before:
            self._start = perf_counter()
        else:
            self.times[name].append(perf_counter() - self._start)
        return NO_OP

    def run(self, work: Callable[[], None]) -> None:
        self.times.clear()
        self._vm["set_instrument"](tvm_ffi.convert(self))
        try:
            work()
        finally:
            self._vm["set_instrument"](None)


def main() -> None:
    args = parse_args()
    llm = LLM(args.artifact, args.target, num_threads=args.threads)
    manifest = artifact.read_manifest(args.artifact)
    target = choose_target(manifest["targets"], args.target)["name"]
    report = artifact.read_report(args.artifact)[target]["kernels"]
    read = {k["name"]: k["weight_bytes"] for k in report if not k["name"].startswith(LOOKUPS)}
    vocab = int(manifest["model"]["vocab_size"])

    def requests(count: int, tokens: int) -> "Requests":
        return Requests(llm, np.random.default_rng().integers(0, vocab, (count, tokens)).tolist())

    for tokens in args.prompt:
        work = requests(1, tokens)
        show(f"prefill of {tokens}", *measure(Profile(llm), work.prefill, args.steps, work.start, work.stop), {})
    for count, tokens in [(1, context) for context in args.context] + [(batch, 64) for batch in args.batch]:
        work = requests(count, tokens)
        work.start()
        work.prefill()
        show(f"decode of {count} after {tokens}", *measure(Profile(llm), llm.engine.step, args.steps), read)
        work.stop()


class Requests:
    """Prompts that are served together, as often as wanted."""

    def __init__(self, llm: LLM, prompts: list[list[int]]) -> None:
        self.engine, self.prompts = llm.engine, prompts

    def start(self) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=10_000, ignore_eos=True)
        for i, prompt in enumerate(self.prompts):
            self.engine.add_request(str(i), list(prompt), params, stream=False)

    def prefill(self) -> None:
        tokens = sum(map(len, self.prompts))
        for _ in range(-(-tokens // self.engine.executor.max_tokens_per_step)):
            self.engine.step()

    def stop(self) -> None:
        for i in range(len(self.prompts)):
            self.engine.abort(str(i))
        self.engine.step()


def measure(
    profile: Profile,
    step: Callable[[], object],
    repeat: int,
    before: Callable[[], None] = lambda: None,
    after: Callable[[], None] = lambda: None,
) -> tuple[float, dict[str, tuple[int, float]]]:
    """Seconds of a step, and of each kernel its (calls, seconds) in one: medians, since others share the machine."""

    def run() -> float:
        before()
        begin = perf_counter()
        step()
        seconds = perf_counter() - begin
        after()
        return seconds

    seconds = statistics.median(run() for _ in range(repeat))
    profile.run(lambda: [run() for _ in range(repeat)])
    kernels = {}
    for name, times in profile.times.items():
        calls = len(times) // repeat
        sums = [sum(times[i * calls : (i + 1) * calls]) for i in range(repeat)]
        kernels[name] = calls, statistics.median(sums)
    return seconds, kernels


def show(title: str, step: float, kernels: dict[str, tuple[int, float]], read: dict[str, int]) -> None:
    print(f"\n{title}: {1e3 * step:.2f} ms a step")
    print(f"{'kernel':42s} {'calls':>6s} {'ms':>8s} {'share':>6s} {'GB/s':>6s}")
    for name, (calls, seconds) in sorted(kernels.items(), key=lambda item: -item[1][1]):
        rate = f"{read[name] / seconds / 1e9:6.1f}" if read.get(name) else ""
        print(f"{name:42s} {calls:6d} {1e3 * seconds:8.3f} {100 * seconds / step:5.1f}% {rate}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--target", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompt", type=int, nargs="*", default=[], help="tokens of each prefill")
    parser.add_argument("--context", type=int, nargs="*", default=[], help="cached tokens of each decode")
    parser.add_argument("--batch", type=int, nargs="*", default=[], help="sequences of each batched decode")
    parser.add_argument("--steps", type=int, default=20, help="steps that are measured for each")
    return parser.parse_args()


if __name__ == "__main__":
    main()
