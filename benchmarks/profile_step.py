"""Where the time of a step goes: each kernel of an artifact, in a real prefill and in real decode steps.

    python benchmarks/profile_step.py dist/sq4 --prompt 512 --context 128 --context 4096 --batch 8

Per kernel: calls, time per step, share, and for those that read weights the bandwidth reached. Kernels are timed by
the virtual machine's own instrument, which adds about a microsecond to each call, so the sums lie above the step's own
time: that is measured without it. "outside" is what the engine and the virtual machine spend beside the kernels.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable
from time import perf_counter

import numpy as np
import tvm_ffi

from mlcgen import artifact
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
    weights = {kernel["name"]: kernel["weight_bytes"] for kernel in report}
    vocab = int(manifest["model"]["vocab_size"])
    profile = Profile(llm)

    def prompts(count: int, tokens: int) -> list[list[int]]:
        return np.random.default_rng().integers(0, vocab, (count, tokens)).tolist()

    for tokens in args.prompt:
        show(llm, profile, f"prefill of {tokens}", prompts(1, tokens), 1, weights)
    for context in args.context:
        show(llm, profile, f"decode after {context}", prompts(1, context), args.steps, weights)
    for batch in args.batch:
        show(llm, profile, f"decode of {batch} after 64 each", prompts(batch, 64), args.steps, weights)


def show(llm: LLM, profile: Profile, title: str, prompts: list[list[int]], steps: int, weights: dict[str, int]) -> None:
    """steps: 1 profiles the prefill itself, more the decode steps after it."""

    def start(request: str) -> None:
        for i, prompt in enumerate(prompts):
            params = SamplingParams(temperature=0.0, max_tokens=3 * steps + 9, ignore_eos=True)
            llm.engine.add_request(f"{request}{i}", list(prompt), params, stream=False)

    def stop(request: str) -> None:
        for i in range(len(prompts)):
            llm.engine.abort(f"{request}{i}")
        while llm.engine.has_unfinished:
            llm.engine.step()

    def prefill() -> None:
        tokens = sum(map(len, prompts))
        for _ in range(-(-tokens // llm.engine.executor.max_tokens_per_step)):
            llm.engine.step()

    def timed(work: Callable[[], object]) -> float:
        begin = perf_counter()
        work()
        return perf_counter() - begin

    plain = []
    if steps == 1:
        for turn in range(6):
            start(str(turn))
            plain.append(timed(prefill))
            stop(str(turn))
        start("p")
        profile.run(prefill)
        stop("p")
    else:
        start("d")
        prefill()
        plain += [timed(llm.engine.step) for _ in range(steps)]
        profile.run(lambda: [llm.engine.step() for _ in range(steps)])
        plain += [timed(llm.engine.step) for _ in range(steps)]
        stop("d")
    step = statistics.median(plain)
    print(f"\n{title}: {1e3 * step:.2f} ms a step")
    print(f"{'kernel':42s} {'calls':>6s} {'ms':>8s} {'share':>6s} {'GB/s':>6s}")
    inside = 0.0
    for name, times in sorted(profile.times.items(), key=lambda item: -sum(item[1])):
        calls = len(times) // steps
        # The median of a kernel's steps: other machines' work shows up as a few slow ones.
        per_step = [sum(times[i * calls : (i + 1) * calls]) for i in range(steps)]
        seconds = statistics.median(per_step)
        inside += seconds
        rate = f"{weights[name] / seconds / 1e9:6.1f}" if weights.get(name) and steps > 1 else ""
        print(f"{name:42s} {calls:6d} {1e3 * seconds:8.3f} {100 * seconds / step:5.1f}% {rate}")
    print(f"{'outside':42s} {'':6s} {1e3 * (step - inside):8.3f} {100 * (step - inside) / step:5.1f}%")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--target", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompt", type=int, nargs="*", default=[], help="tokens of each prefill to profile")
    parser.add_argument("--context", type=int, nargs="*", default=[], help="cached tokens of each decode")
    parser.add_argument("--batch", type=int, nargs="*", default=[], help="sequences of each batched decode")
    parser.add_argument("--steps", type=int, default=20)
    return parser.parse_args()


if __name__ == "__main__":
    main()
