"""The engines that are measured, behind one call. They live in worker processes and import their libraries there.

Every engine reports its own times, without tokenization or HTTP: the time to the first token, and the tokens after it.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

from mlcgen.errors import BenchError

Prompts = Sequence[Sequence[int]]  # token ids
WINDOW = 512  # tokens that perplexity is measured over at a time


@dataclass(frozen=True)
class Spec:
    """What an engine is opened with."""

    engine: str  # "mlcgen", one of PEERS, or "perplexity" (of what mlcgen runs)
    model: str  # artifact directory (of "torch" too: it takes the shapes) or GGUF file
    threads: int
    context: int  # tokens, over all sequences, that its KV cache must hold
    batch: int = 1  # sequences at a time
    target: str = "auto"
    weight_memory: str | None = None  # of mlcgen: what weights may take; layers beyond it are streamed


@dataclass(frozen=True)
class Timing:
    first_token_s: float  # from the request to the first token (of the last sequence)
    decode_tokens_per_s: float | None  # of all sequences together, after their first tokens; None if there are none
    streamed_bytes_per_step: float | None = None  # of weights, after the first tokens; None: all weights are there
    streamed_bytes_per_s: float | None = None


class Engine(Protocol):
    def generate(self, prompts: Prompts, tokens: int) -> Timing:
        """Complete all prompts at once with `tokens` tokens each: greedily, and past any end of text."""
        ...


class Mlcgen:
    def __init__(self, spec: Spec) -> None:
        from mlcgen.artifact import read_manifest
        from mlcgen.runtime.llm import load_engine

        page_size = int(read_manifest(Path(spec.model))["kv"]["page_size"])
        pages = -(-spec.context // page_size) + spec.batch  # each sequence's last one may be nearly empty
        self._engine = load_engine(
            spec.model, spec.target, pages, num_threads=spec.threads, weight_memory=spec.weight_memory
        )
        self._stream = getattr(self._engine.executor, "stream", None)

    def generate(self, prompts: Prompts, tokens: int) -> Timing:
        from mlcgen.runtime.sampler import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        start = perf_counter()
        outputs = [self._engine.add_request(str(i), list(p), params, stream=False) for i, p in enumerate(prompts)]
        while not all(output.token_ids or output.finished for output in outputs):
            self._engine.step()
        first, before = perf_counter(), sum(len(output.token_ids) for output in outputs)
        loaded, steps = self._bytes_loaded(), self._engine.stats().num_steps
        while not all(output.finished for output in outputs):
            self._engine.step()
        for output in outputs:
            if output.error:
                raise output.error
        seconds = perf_counter() - first
        streamed, steps = self._bytes_loaded() - loaded, self._engine.stats().num_steps - steps
        decode = _rate(len(prompts) * tokens - before, seconds)
        return Timing(first - start, decode, _rate(streamed, steps), _rate(streamed, seconds))

    def _bytes_loaded(self) -> int:
        return 0 if self._stream is None else self._stream.bytes_loaded


class LlamaCpp:
    """llama.cpp's server without its HTTP."""

    def __init__(self, spec: Spec) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_gpu_layers = spec.model, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = spec.threads
        params.n_ctx, params.n_parallel, params.kv_unified = spec.context, spec.batch, True
        params.n_batch = params.n_ubatch = 512
        params.cache_prompt, params.cache_ram_mib = False, 0
        self._server = xllamacpp.Server(params)

    def generate(self, prompts: Prompts, tokens: int) -> Timing:
        request = {
            "prompt": [list(prompt) for prompt in prompts] if len(prompts) > 1 else list(prompts[0]),
            "n_predict": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        answer = self._server.handle_completions(request)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        if "timings" not in answer:
            raise BenchError(f"llama.cpp refused a request: {answer.get('error', answer)}")
        # Of several prompts the first one's times stand for all: they run in the same batches.
        times = answer["timings"]
        # Its predicted_n counts the first token, its predicted_ms begins after it.
        decoded = len(prompts) * (times["predicted_n"] - 1)
        return Timing(times["prompt_ms"] / 1e3, _rate(decoded, times["predicted_ms"] / 1e3))


class OpenVino:
    def __init__(self, spec: Spec) -> None:
        import openvino_genai

        self._pipeline = openvino_genai.LLMPipeline(spec.model, "CPU", INFERENCE_NUM_THREADS=spec.threads)

    def generate(self, prompts: Prompts, tokens: int) -> Timing:
        import numpy as np
        import openvino
        import openvino_genai

        config = openvino_genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=False)
        ids = np.array(prompts, np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        times = self._pipeline.generate(inputs, config).perf_metrics
        decode = 1e3 / times.get_tpot().mean if tokens > 1 else None  # its time per token is over all sequences
        return Timing(times.get_ttft().mean / 1e3, decode)


def _rate(count: int, per: float) -> float | None:
    return count / per if count and per > 0 else None


@dataclass(frozen=True)
class Peer:
    open: Callable[[Spec], Engine]
    module: str
    distribution: str


def _torch_compile(spec: Spec) -> Engine:
    from mlcgen.bench.torch_engine import TorchCompile

    return TorchCompile(spec)


PEERS = {
    "llama.cpp": Peer(LlamaCpp, "xllamacpp", "xllamacpp"),
    "openvino": Peer(OpenVino, "openvino_genai", "openvino-genai"),
    "torch": Peer(_torch_compile, "torch", "torch"),
}


def _scorer(spec: Spec) -> Callable[..., Any]:
    """Load an artifact to measure its perplexity: of a UTF-8 text, or of token ids in a .json file."""
    from mlcgen.artifact import read_manifest
    from mlcgen.evaluate import Perplexity, perplexity, read_ids, read_text
    from mlcgen.runtime.load import load_executor

    pages = -(-WINDOW // int(read_manifest(Path(spec.model))["kv"]["page_size"]))
    model = load_executor(spec.model, spec.target, pages, num_threads=spec.threads)

    def score(text: str) -> Perplexity:
        file = Path(text)
        ids = read_ids(file) if file.suffix == ".json" else read_text(model, file)
        return perplexity(model.executor, ids, min(WINDOW, model.context_length))

    return score


def open_engine(spec: dict[str, Any]) -> Callable[..., Any]:
    """Load an engine; the answer is its `generate`. `spec` has the fields of Spec."""
    its = Spec(**spec)
    if its.engine == "perplexity":
        return _scorer(its)
    return (Mlcgen(its) if its.engine == "mlcgen" else PEERS[its.engine].open(its)).generate
