"""The CUDA target on a real GPU, against the CPU target; skipped, with the reason, where there is none.

The artifacts can be made on another machine, and a GPU's then needs no compiler:

    python tests/target/test_cuda_gpu.py DIR
    MLCGEN_GPU_ARTIFACTS=DIR pytest tests/target/test_cuda_gpu.py
"""

import itertools
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlcgen
from mlcgen import SamplingParams, nvrtc
from mlcgen.adapter_layout import AdapterLayout
from mlcgen.artifact import read_manifest
from mlcgen.runtime import cuda, load_plan
from mlcgen.runtime.engine import Engine
from mlcgen.runtime.executor import AdaptedExecutor, AdaptedStepInput, Executor, StepInput
from mlcgen.runtime.host_sampling import HostSampling
from mlcgen.runtime.load import load_executor
from mlcgen.runtime.peft import Matrices
from mlcgen.runtime.plan_executor import PlanExecutor
from mlcgen.runtime.sampler import Sampler

REASON = cuda.missing() or (None if nvrtc.find_library() else "NVRTC is not installed: pip install 'mlcgen[cuda]'")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 512,
    "intermediate_size": 896,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
SMALL = {"hidden_size": 128, "intermediate_size": 128}  # where attention alone is meant
DEEP = {"num_hidden_layers": 6}
MAX_BATCH = 128
SLOTS, RANKS = 4, [16, 5]  # of adapters


def both(path: Path, num_pages: int) -> tuple[Executor, Executor]:
    """(the GPU's executor, the CPU's) of one artifact."""
    return load_executor(path, "cuda", num_pages).executor, load_executor(path, "cpu", num_pages).executor


QUANTIZATIONS, PAGE_SIZES, HEAD_DIMS, KV_HEADS = ["f16", "bf16", "q8", "q4"], [1, 16, 64], [64, 96, 256], [1, 2, 8]


def compile_into(folder: Path, quantization: str, page_size: int = 16, lora_rank: int = 0, **config: int) -> Path:
    """The artifact, made where it is not there yet."""
    words = [quantization, str(page_size), *(f"{key}-{value}" for key, value in sorted(config.items()))]
    words += [f"lora-{lora_rank}"] * bool(lora_rank)
    out = folder / "_".join(words)
    if not out.exists():
        model = folder / f"{out.name}.model"
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps(CONFIG | config))
        options = {"page_size": page_size, "max_batch": MAX_BATCH, "kv_dtype": "float16", "random_weights": True}
        options |= {"lora_rank": lora_rank or None, "adapters": SLOTS}
        mlcgen.compile(model, ["cpu:x86-64-v3", "cuda"], quantization, out, **options)
    return out


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = os.environ.get("MLCGEN_GPU_ARTIFACTS")
    return partial(compile_into, Path(folder) if folder else tmp_path_factory.mktemp("artifacts"))


def step_input(before: list[int], counts: list[int], tables: np.ndarray, page_size: int) -> StepInput:
    """Sequence s has before[s] tokens and adds counts[s]; the token at position p is a function of s and p."""
    positions = np.concatenate([np.arange(b, b + c) for b, c in zip(before, counts, strict=True)])
    owner = np.repeat(np.arange(len(counts)), counts)
    slots = tables[owner, positions // page_size] * page_size + positions % page_size
    start = np.cumsum([0, *counts])
    ids = (owner * 37 + positions * 11) % CONFIG["vocab_size"]
    arrays = [ids, positions, slots, tables, np.add(before, counts), start, start[1:] - 1]
    return StepInput(*(array.astype(np.int32) for array in arrays))


def assert_same(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < tolerance, error


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("tokens", [1, 4, 5, 16, 17, 40, 64, 65, 96, 128, 129, 192, 200, 256, 300, 512])
def test_products_of_any_number_of_tokens(compiled: Any, quantization: str, tokens: int) -> None:
    gpu, cpu = both(compiled(quantization), num_pages=40)
    batch = step_input([0], [tokens], np.arange(40)[::-1][None], 16)
    assert_same(gpu.step(batch), cpu.step(batch), 2e-2 if quantization == "bf16" else 5e-3)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("context", [1, 15, 16, 17, 511, 4096, 32768])
def test_contexts(compiled: Any, page_size: int, context: int) -> None:
    """A prompt in chunks, then a decoded token: its logits against those of the CPU."""
    pages = -(-context // page_size)
    gpu, cpu = both(compiled("f16", page_size, **SMALL), num_pages=pages)
    tables = np.random.default_rng(context).permutation(pages)[None]
    for done in range(0, context - 1, 512):
        chunk = step_input([done], [min(512, context - 1 - done)], tables, page_size)
        found, expected = gpu.step(chunk), cpu.step(chunk)
    last = step_input([context - 1], [1], tables, page_size)
    found, expected = gpu.step(last), cpu.step(last)
    assert_same(found, expected, 5e-3)


def test_pages_that_were_on_the_host(compiled: Any) -> None:
    """A token after a prompt whose pages have gone to the host and come back elsewhere: the same numbers."""
    executor = load_executor(compiled("f16", 16, **SMALL), "cuda", 16).executor
    layers, layer_bytes = executor.page_shape
    host = executor.pinned(layers * 5 * layer_bytes)[: layers * 5 * layer_bytes].reshape(layers, 5, layer_bytes)
    tables = np.array([[3, 4, 5, 0]])
    executor.step(step_input([0], [50], tables, 16))
    executor.read_pages([3, 4, 5, 0], host, [1, 2, 3, 0])
    expected = executor.step(step_input([50], [1], tables, 16)).copy()
    for moved in ([7, 8, 9, 1], [15, 2, 11, 6]):
        executor.write_pages(moved, host, [1, 2, 3, 0])
        found = executor.step(step_input([50], [1], np.array([moved]), 16))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("batch", [1, 2, 3, 8, 17, 64, 128])
def test_batches_of_ragged_sequences(compiled: Any, batch: int) -> None:
    gpu, cpu = both(compiled("q4"), num_pages=batch * 5)
    rng = np.random.default_rng(batch)
    tables = rng.permutation(batch * 5).reshape(batch, 5)
    lengths = rng.integers(1, 70, batch).tolist()
    for start in range(0, batch, 7):  # prompts of a few sequences at a time
        part = slice(start, min(start + 7, batch))
        chunk = step_input([0] * len(lengths[part]), lengths[part], tables[part], 16)
        assert_same(gpu.step(chunk), cpu.step(chunk), 5e-3)
    for _ in range(3):
        decode = step_input(lengths, [1] * batch, tables, 16)
        assert_same(gpu.step(decode), cpu.step(decode), 5e-3)
        lengths = [length + 1 for length in lengths]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("kv_heads", KV_HEADS)
def test_head_sizes_and_groups(compiled: Any, head_dim: int, kv_heads: int) -> None:
    gpu, cpu = both(compiled("f16", head_dim=head_dim, num_key_value_heads=kv_heads, **SMALL), num_pages=12)
    tables = np.arange(12).reshape(2, 6)
    for before, counts in (([0, 0], [33, 60]), ([33, 60], [1, 1]), ([34, 61], [1, 20])):
        batch = step_input(before, counts, tables, 16)
        assert_same(gpu.step(batch), cpu.step(batch), 5e-3)


def test_greedy_tokens_are_those_of_the_cpu(compiled: Any) -> None:
    """Looking ahead, in batches, with more sequences than pages."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, 1000, int(length)).tolist() for length in rng.integers(1, 60, 20)]
    greedy = partial(SamplingParams, temperature=0, max_tokens=20)
    params = [
        greedy(ignore_eos=True),
        greedy(repetition_penalty=1.3, logit_bias={5: 3.0}),
        greedy(min_tokens=5, logprobs=3),
    ]
    gpu, cpu = (_generate(executor, prompts, params) for executor in both(compiled("f16"), num_pages=60))
    same = sum(a == b for a, b in zip(gpu, cpu, strict=True))
    assert same >= 16, (gpu, cpu)  # of 20: near ties may go either way


def test_tokens_are_chosen_as_on_the_host(compiled: Any) -> None:
    """The device's sampler against NumPy on the logits that it saw, with every parameter."""
    gpu = load_executor(compiled("f16"), "cuda", 40).executor
    host = HostSampling(gpu)
    batch = step_input([0] * 20, list(range(1, 21)), np.arange(40).reshape(20, 2), 16)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.8, "top_p": 0.9},
        {"top_k": 30, "min_p": 0.02},
        {"temperature": 0.7, "repetition_penalty": 1.3, "logit_bias": {5: 3.0}},
        {"temperature": 2.0, "min_tokens": 5, "logprobs": 3},
    ]
    params = [SamplingParams(**kinds[row % len(kinds)], seed=row) for row in range(20)]
    on_device, on_host = ([Sampler(p, [row], [2]) for row, p in enumerate(params)] for _ in range(2))
    same = 0
    for _ in range(10):
        gpu.start(batch, on_device)
        found = gpu.finish()
        host.start(batch, on_host)
        expected = host.finish()
        same += sum(a == b for a, b in zip(found.tokens, expected.tokens, strict=True))
        assert [p is None for p in found.logprobs] == [p is None for p in expected.logprobs]
    assert same >= 190, same  # of 200: the GPU's exponentials are not NumPy's to the last bit


@pytest.mark.parametrize("host_share", [0.8, 0.0], ids=["host", "file"])
@pytest.mark.parametrize("quantization", ["bf16", "q4"])
def test_streamed_layers_give_the_same_tokens(
    compiled: Any, monkeypatch: pytest.MonkeyPatch, quantization: str, host_share: float
) -> None:
    """Most layers of six on the way, in steps of prompts and of up to 20 decodes."""
    monkeypatch.setattr(load_plan, "HOST_SHARE", host_share)
    path = compiled(quantization, **DEEP)
    prompts = [np.random.default_rng(i).integers(5, 900, 5 + 11 * i).tolist() for i in range(20)]
    greedy = [SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)]
    budget = read_manifest(path)["weights"][0]["bytes"] * 6 // 10
    whole, streamed = (load_executor(path, "cuda", 60, weight_memory=size).executor for size in (None, budget))
    assert isinstance(streamed, PlanExecutor)
    assert streamed.stream is not None
    assert len(streamed.stream.visits) >= 4
    assert _generate(streamed, prompts, greedy) == _generate(whole, prompts, greedy)


def random_matrices(layout: AdapterLayout, seed: int) -> Matrices:
    """An adapter that changes results by about as much as they are."""
    rng = np.random.default_rng(seed)
    arrays = [(rng.standard_normal(shape[1:]) * 0.06).astype(np.float16) for shape in layout.buffers.values()]
    return list(zip(arrays[::2], arrays[1::2], strict=True))


def load_adapters(executor: Executor) -> None:
    assert isinstance(executor, AdaptedExecutor)
    assert executor.adapters is not None
    for slot in range(SLOTS):
        executor.write_adapter(slot, random_matrices(executor.adapters, slot))


def adapted(step: StepInput, slots: np.ndarray) -> AdaptedStepInput:
    """The step, its sequences with the adapters in these slots."""
    return AdaptedStepInput(**vars(step), adapter_slots=np.repeat(slots.astype(np.int32), np.diff(step.query_start)))


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("batch", [1, 3, 8, 17, 64, 128])
def test_adapters_mixed_in_a_batch(compiled: Any, rank: int, batch: int) -> None:
    """Prompts of up to 70 tokens, then decodes: run, recorded, with other adapters, and with none between."""
    gpu, cpu = both(compiled("q4", lora_rank=rank), num_pages=batch * 5)
    for each in (gpu, cpu):
        load_adapters(each)
    rng = np.random.default_rng(batch)
    tables = rng.permutation(batch * 5).reshape(batch, 5)
    lengths, slots = rng.integers(1, 70, batch), rng.integers(-1, SLOTS, batch)
    for start in range(0, batch, 7):
        part = slice(start, start + 7)
        chunk = adapted(step_input([0] * len(lengths[part]), lengths[part].tolist(), tables[part], 16), slots[part])
        assert_same(gpu.step(chunk), cpu.step(chunk), 5e-3)
    for given in (slots, slots, slots[::-1], None, np.full(batch, 2), np.full(batch, -1)):
        decode = step_input(lengths.tolist(), [1] * batch, tables, 16)
        decode = decode if given is None else adapted(decode, given)
        assert_same(gpu.step(decode), cpu.step(decode), 5e-3)
        lengths = lengths + 1


@pytest.mark.parametrize("tokens", [3, 16, 65, 128, 129, 200, 300, 512])
def test_adapters_of_prompts(compiled: Any, tokens: int) -> None:
    """Three prompts of one adapter, of none and of another, the second a single token."""
    gpu, cpu = both(compiled("q4", lora_rank=RANKS[0]), num_pages=99)
    for each in (gpu, cpu):
        load_adapters(each)
    batch = step_input([0, 0, 0], [tokens // 2, 1, tokens - tokens // 2 - 1], np.arange(99).reshape(3, 33), 16)
    for slots in ([1, -1, 3], [-1, 0, -1], [2, 2, 2]):
        step = adapted(batch, np.array(slots))
        assert_same(gpu.step(step), cpu.step(step), 5e-3)


def test_steps_without_adapters_are_as_they_were(compiled: Any) -> None:
    gpu = load_executor(compiled("q4", lora_rank=RANKS[0]), "cuda", 40).executor
    batch = step_input([0, 0], [20, 7], np.arange(40).reshape(2, 20), 16)
    decode = step_input([20, 7], [1, 1], np.arange(40).reshape(2, 20), 16)
    before = [gpu.step(step).copy() for step in (batch, decode)]
    load_adapters(gpu)
    changed = [gpu.step(adapted(step, np.array([0, 1]))).copy() for step in (batch, decode)]
    assert all(np.linalg.norm(a - b) > 0.05 * np.linalg.norm(b) for a, b in zip(changed, before, strict=True))
    for step, logits in zip((batch, decode), before, strict=True):
        np.testing.assert_array_equal(gpu.step(step), logits)


def test_greedy_tokens_with_adapters_are_those_of_the_cpu(compiled: Any) -> None:
    """Looking ahead; sequences with adapters and without end at different times."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, 1000, int(length)).tolist() for length in rng.integers(1, 60, 20)]
    params = [SamplingParams(temperature=0, max_tokens=8 + 3 * i, ignore_eos=True) for i in range(5)]
    executors = both(compiled("q4", lora_rank=RANKS[0]), num_pages=100)
    gpu, cpu = (_generate(executor, prompts, params, adapters=3) for executor in executors)
    same = sum(a == b for a, b in zip(gpu, cpu, strict=True))
    assert same >= 16, (gpu, cpu)  # of 20: near ties may go either way
    assert sum(a == b for a, b in zip(gpu, _generate(executors[0], prompts, params), strict=True)) < 10


@pytest.mark.parametrize("host_share", [0.8, 0.0], ids=["host", "file"])
def test_streamed_layers_with_adapters(compiled: Any, monkeypatch: pytest.MonkeyPatch, host_share: float) -> None:
    monkeypatch.setattr(load_plan, "HOST_SHARE", host_share)
    path = compiled("q4", lora_rank=RANKS[1], **DEEP)
    prompts = [np.random.default_rng(i).integers(5, 900, 5 + 11 * i).tolist() for i in range(10)]
    greedy = [SamplingParams(temperature=0, max_tokens=6 + 9 * i, ignore_eos=True) for i in range(3)]
    budget = read_manifest(path)["weights"][0]["bytes"] * 6 // 10
    whole, streamed = (load_executor(path, "cuda", 60, weight_memory=size).executor for size in (None, budget))
    assert _generate(streamed, prompts, greedy, adapters=2) == _generate(whole, prompts, greedy, adapters=2)


def _generate(
    executor: Executor, prompts: list[list[int]], params: list[SamplingParams], adapters: int = 0
) -> list[list[int]]:
    """adapters: how many the prompts take turns with; one more has none."""
    engine = Engine(executor, None, [2], context_length=1024, max_batch=MAX_BATCH)
    names: list[str | None] = [*map(str, range(adapters)), None]
    for slot in range(adapters):
        engine.adapters.load(str(slot), random_matrices(engine.adapters.layout, slot))
    outputs = [
        engine.add_request(str(i), p, params[i % len(params)], adapter=names[i % len(names)])
        for i, p in enumerate(prompts)
    ]
    while engine.has_unfinished:
        engine.step()
    assert not [output.error for output in outputs if output.error]
    return [list(output.token_ids) for output in outputs]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for quantization in QUANTIZATIONS:
        compile_into(folder, quantization)
    for quantization in ("bf16", "q4"):
        compile_into(folder, quantization, **DEEP)
    for rank in RANKS:
        compile_into(folder, "q4", lora_rank=rank)
    compile_into(folder, "q4", lora_rank=RANKS[1], **DEEP)
    for page_size in PAGE_SIZES:
        compile_into(folder, "f16", page_size, **SMALL)
    for head_dim, kv_heads in itertools.product(HEAD_DIMS, KV_HEADS):
        compile_into(folder, "f16", head_dim=head_dim, num_key_value_heads=kv_heads, **SMALL)
