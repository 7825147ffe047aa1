"""Greedy ids of unquantized builds equal transformers' in float32; quantized ones keep the perplexity."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcgen import LLM, EngineOptions, SamplingParams
from mlcgen.add_targets import add_targets
from mlcgen.evaluate import perplexity
from mlcgen.runtime import webgpu
from mlcgen.runtime.load import load_executor

DATA = Path(__file__).parents[1] / "data"
Compile = Callable[..., Path]


def golden(name: str) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = json.loads((DATA / name).read_text())["results"]
    return results


SMOLLM2 = golden("golden_smollm2_135m.json")
QWEN = golden("golden_qwen2.5_coder_0.5b.json")


def greedy(results: list[dict[str, Any]]) -> list[SamplingParams]:
    return [SamplingParams(temperature=0.0, max_tokens=len(r["output_ids"])) for r in results]


def assert_golden(outputs: list[Any], results: list[dict[str, Any]]) -> None:
    for output, expected in zip(outputs, results, strict=True):
        assert output.error is None
        assert output.prompt_token_ids == expected["input_ids"]
        assert list(output.token_ids) == expected["output_ids"]


@pytest.mark.parametrize("page_size", [1, 16])
def test_smollm2_alone_and_as_one_batch(compile_smollm2: Compile, page_size: int) -> None:
    llm = LLM(compile_smollm2("f32", page_size=page_size), num_pages=-(-512 // page_size))
    prompts = [r["prompt"] for r in SMOLLM2]
    alone = [llm.generate([p], [params])[0] for p, params in zip(prompts, greedy(SMOLLM2), strict=True)]
    assert_golden(alone, SMOLLM2)
    assert_golden(llm.generate(prompts, greedy(SMOLLM2)), SMOLLM2)


def test_smollm2_with_half_of_its_weights_in_memory(compile_smollm2: Compile) -> None:
    llm = LLM(compile_smollm2("f32", page_size=16), num_pages=32, weight_memory="300MB")
    assert_golden(llm.generate([SMOLLM2[0]["prompt"]], greedy(SMOLLM2[:1])), SMOLLM2[:1])


@pytest.mark.skipif(webgpu.missing() is not None, reason=str(webgpu.missing()))
def test_smollm2_as_wgsl(compile_smollm2: Compile) -> None:
    """On whatever WebGPU finds, perhaps a GPU in software, for which one prompt is enough to do."""
    path = compile_smollm2("gguf", page_size=64)
    add_targets(path, ["vulkan"])
    llm = LLM(path, target="vulkan", num_pages=8)
    assert_golden(llm.generate([SMOLLM2[0]["prompt"]], greedy(SMOLLM2[:1])), SMOLLM2[:1])


# Every two values of two of these come together in some case.
FIELDS = ("speculation", "branches", "swap_bytes", "tokens_per_step", "prefix_cache", "chunked_prefill")
ENGINES = [
    # page size, few pages, options
    (16, True, ("model", 1, 1 << 30, None, True, True)),
    (1, False, ("model", 3, 0, 7, False, False)),
    (1, True, ("off", 1, 1 << 30, None, False, False)),
    (16, False, ("ngram", 3, 0, 7, True, True)),
    (16, False, ("lookahead", 3, 1 << 30, None, False, False)),
    (1, True, ("lookahead", 1, 0, 7, True, True)),
    (1, False, ("ngram", 1, 0, None, True, False)),
    (16, False, ("off", 1, 0, 7, True, True)),
    (1, True, ("ngram", 3, 1 << 30, 7, False, True)),
]


@pytest.mark.parametrize(("page_size", "is_tight", "values"), ENGINES)
def test_smollm2_whatever_the_engine_does(
    compile_smollm2: Compile, page_size: int, is_tight: bool, values: tuple[Any, ...]
) -> None:
    """Few pages: room for the longest sequence and a little more, so that others are preempted."""
    chosen = dict(zip(FIELDS, values, strict=True))
    if chosen["speculation"] == "model":
        chosen["draft_model"] = compile_smollm2("q4")
    options = EngineOptions(**chosen)
    longest = max(len(r["input_ids"]) + len(r["output_ids"]) for r in SMOLLM2)
    num_pages = -(-(longest + 4 if is_tight else 1000) // page_size)
    llm = LLM(compile_smollm2("f32", page_size=page_size), num_pages=num_pages, options=options)
    twice = SMOLLM2 + SMOLLM2  # the second of each finds its prompt in the cache, or being computed
    assert_golden(llm.generate([r["prompt"] for r in twice], greedy(twice)), twice)
    stats = llm.engine.stats()
    assert bool(stats.num_preemptions) == is_tight
    assert options.prefix_cache or not stats.num_cached_tokens
    assert bool(stats.num_drafted) == (options.speculation != "off")
    assert stats.num_free_pages == num_pages


def test_first_step_logprobs(compile_smollm2: Compile) -> None:
    llm = LLM(compile_smollm2("f32", page_size=16), num_pages=64)
    for result in SMOLLM2:
        params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=5)
        first = llm.generate([result["prompt"]], params)[0].outputs[0].logprobs[0]
        tokens = [token for token, _ in result["top5_first"]]
        logits = np.array([logit for _, logit in result["top5_first"]])
        got = np.array([getattr(first[t], "logprob", first[t]) for t in tokens])
        np.testing.assert_allclose(got - got[0], logits - logits[0], atol=1e-3)


# Sums of -log p of each window of 512 of the ids in tests/data, by transformers in float32: perplexity 4.4486 in all.
WINDOW_NLL = [861.5063, 957.4913, 647.7765, 798.0005, 800.1069, 717.6812, 598.9333, 720.1660]


@pytest.mark.parametrize(
    ("quantization", "page_size", "windows", "tolerance"),
    [("f32", 16, 2, 1e-5), ("gguf", 64, 3, 2e-4), ("q8", 64, 3, 4e-3)],
)
def test_perplexity(
    compile_smollm2: Compile, quantization: str, page_size: int, windows: int, tolerance: float
) -> None:
    ids = json.loads((DATA / "smollm2_135m_ppl_ids_humaneval.json").read_text())[: windows * 512]
    executor = load_executor(compile_smollm2(quantization, page_size=page_size), num_pages=512 // page_size).executor
    result = perplexity(executor, ids, 512)
    assert result["predicted"] == windows * 511
    assert result["nll_sum"] == pytest.approx(sum(WINDOW_NLL[:windows]), rel=tolerance)


def test_qwen_alone_and_as_one_batch(qwen_artifact: Path) -> None:
    llm = LLM(qwen_artifact, num_pages=64)
    for params, result in zip(greedy(QWEN), QWEN, strict=True):
        assert_golden(llm.generate([result["prompt"]], [params]), [result])
    assert_golden(llm.generate([r["prompt"] for r in QWEN], greedy(QWEN)), QWEN)
