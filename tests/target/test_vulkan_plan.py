"""A whole model as WGSL through launch plan, plan executor and wgpu, against the CPU target."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import mlcgen
from mlcgen.errors import DeviceError
from mlcgen.runtime import webgpu
from mlcgen.runtime.executor import Executor, StepInput
from mlcgen.runtime.load import load_executor
from mlcgen.runtime.sampler import SamplingParams

from .small_model import (
    CONFIG,
    PAGE_SIZE,
    PAGES,
    VOCAB,
    LogitsOnly,
    OneAtATime,
    adapted,
    generate,
    random_matrices,
)
from .trees import check_model

pytestmark = pytest.mark.skipif(webgpu.missing() is not None, reason=str(webgpu.missing()))

Compile = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """compiled(quantization, type of the cache) -> artifact for the CPU and for WebGPU."""

    @functools.cache
    def compile_once(quantization: str, kv_dtype: str) -> Path:
        path = tmp_path_factory.mktemp(quantization)
        (path / "config.json").write_text(json.dumps(CONFIG))
        options = {"kv_dtype": kv_dtype, "page_size": PAGE_SIZE, "max_batch": 4}
        return mlcgen.compile(path, ["cpu", "vulkan"], quantization, path / "out", random_weights=True, **options)

    return compile_once


def steps(seed: int) -> list[StepInput]:
    """Two prompts of 9 and 40 tokens in one step, a token more of each, again, 3 and 2 more, and one of the second."""
    rng = np.random.default_rng(seed)
    tables = rng.permutation(PAGES - 1)[:21].reshape(3, 7) + 1
    long = np.concatenate([tables[1], tables[2]])
    found = []
    lengths = [0, 0]
    for counts in ([9, 40], [1, 1], [1, 1], [3, 2], [0, 1]):
        used = [s for s in range(2) if counts[s]]
        positions = [np.arange(lengths[s], lengths[s] + counts[s]) for s in used]
        lengths = [length + count for length, count in zip(lengths, counts, strict=True)]
        rows = [[tables[0], long][s] for s in used]
        width = max(-(-lengths[s] // PAGE_SIZE) for s in used)
        table = np.zeros((len(used), width), np.int32)
        for row, pages in zip(table, rows, strict=True):
            row[: min(width, len(pages))] = pages[:width]
        slots = [p[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE for p, at in zip(rows, positions, strict=True)]
        position, slot = np.concatenate(positions), np.concatenate(slots)
        start = np.cumsum([0, *(counts[s] for s in used)])
        ids = rng.integers(0, VOCAB, len(position))
        arrays = (ids, position, slot, table, [lengths[s] for s in used], start, start[1:] - 1)
        found.append(StepInput(*(np.asarray(array).astype(np.int32) for array in arrays)))
    return found


def logits(executor: Executor, seed: int) -> np.ndarray:
    return np.concatenate([executor.step(step).copy() for step in steps(seed)])


@pytest.mark.parametrize(
    ("quantization", "kv_dtype"),
    [("f32", "f32"), ("bf16", "bf16"), ("q4", "f16")],  # q4 has a vocabulary of q8
)
def test_logits_of_the_cpu(compiled: Compile, quantization: str, kv_dtype: str) -> None:
    path, seed = compiled(quantization, kv_dtype), np.random.default_rng().integers(1 << 30)
    cpu, gpu = (logits(load_executor(path, target, num_pages=PAGES).executor, seed) for target in ("cpu", "vulkan"))
    assert np.abs(gpu - cpu).max() < 2e-3 * np.abs(cpu).max(), f"seed {seed}"


def test_paths_of_trees_have_the_logits_of_plain_sequences(compiled: Compile) -> None:
    path = compiled("f32", "f32")
    cpu, gpu = (load_executor(path, target, num_pages=PAGES).executor for target in ("cpu", "vulkan"))
    for _ in range(3):
        check_model(gpu, cpu, VOCAB, 2e-3)


def test_a_recorded_step_takes_new_inputs(compiled: Compile) -> None:
    """The second and third step of one size are the recorded one's."""
    executor = load_executor(compiled("f32", "f32"), "webgpu", num_pages=PAGES).executor
    first, again = logits(executor, 1), logits(executor, 1)
    np.testing.assert_array_equal(first, again)
    assert np.abs(logits(executor, 2) - first).max() > 1e-2


def test_tokens_are_those_that_the_host_samples(compiled: Compile) -> None:
    """Sequences of different lengths, ending by length and by token, more than the pages hold at once.

    Greedy ones are chosen on the device, a step ahead; where one among them is not, all of a step's on the host.
    """
    executor = load_executor(compiled("f32", "f32"), "vulkan", num_pages=PAGES).executor
    rng = np.random.default_rng()
    prompts = [rng.integers(3, VOCAB, length).tolist() for length in (3, 17, 9, 1, 30)]
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=count % 2 == 0) for count in (4, 9, 1, 12, 6)]
    params[4] = SamplingParams(temperature=0, max_tokens=9, stop_token_ids=list(range(3, 90)))
    tokens = generate(LogitsOnly(executor), prompts, params, max_batch=4)
    assert [len(t) for t in tokens[2:4]] == [1, 12]
    assert generate(executor, prompts, params, max_batch=4) == tokens
    assert generate(OneAtATime(executor), prompts, params, max_batch=4) == tokens  # type: ignore[arg-type]
    params[1] = SamplingParams(temperature=0.9, seed=3, max_tokens=5)
    params[3] = SamplingParams(temperature=0, max_tokens=12, presence_penalty=0.5, ignore_eos=True)
    assert generate(executor, prompts, params, max_batch=4) == generate(LogitsOnly(executor), prompts, params, 4)


@pytest.fixture(scope="module")
def with_adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters")
    (path / "config.json").write_text(json.dumps(CONFIG))
    options = {"kv_dtype": "f32", "page_size": PAGE_SIZE, "max_batch": 4, "lora_rank": 6, "adapters": 3}
    return mlcgen.compile(path, ["cpu", "vulkan"], "q8", path / "out", random_weights=True, **options)


def test_adapters_mixed_in_a_batch(with_adapters: Path) -> None:
    """Prompts, decodes that are recorded, with other adapters, and with none between."""
    seed = int(np.random.default_rng().integers(1 << 30))
    executors = [load_executor(with_adapters, target, num_pages=PAGES).executor for target in ("cpu", "vulkan")]
    slots = ([2, -1], [2, -1], [0, 1], None, [1])
    found = []
    for executor in executors:
        for slot in range(3):
            executor.write_adapter(slot, random_matrices(executor.adapters, slot))  # type: ignore[attr-defined]
        given = [step if its is None else adapted(step, its) for step, its in zip(steps(seed), slots, strict=True)]
        found.append(np.concatenate([executor.step(step).copy() for step in given]))
    cpu, gpu = found
    assert np.abs(gpu - cpu).max() < 2e-3 * np.abs(cpu).max(), f"seed {seed}"
    plain = logits(executors[1], seed)
    assert np.abs(plain - gpu).max() > 0.05 * np.abs(gpu).max()


def test_tokens_with_adapters_a_step_ahead(with_adapters: Path) -> None:
    rng = np.random.default_rng()
    prompts = [rng.integers(3, VOCAB, length).tolist() for length in (3, 17, 9, 2)]
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in (4, 9, 2, 12)]
    executor = load_executor(with_adapters, "vulkan", num_pages=PAGES).executor
    tokens = [
        generate(each, prompts, params, max_batch=4, slots=[0, -1, 1, 0])
        for each in (executor, OneAtATime(executor))  # type: ignore[arg-type]
    ]
    assert tokens[0] == tokens[1]
    assert generate(executor, prompts, params, max_batch=4) != tokens[0]


def test_a_tensor_that_no_kernel_can_be_given(compiled: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    made = webgpu.WebgpuDevice.__init__

    def small(self: webgpu.WebgpuDevice) -> None:
        made(self)
        self.largest_binding = 1 << 16

    monkeypatch.setattr(webgpu.WebgpuDevice, "__init__", small)
    with pytest.raises(DeviceError, match=r"has \d+ MiB, kernels on .* reach 0 MiB; quantize further"):
        load_executor(compiled("f32", "f32"), "vulkan", num_pages=PAGES)


def test_more_pages_than_kernels_reach(compiled: Compile) -> None:
    with pytest.raises(DeviceError, match=r"1000000000 pages are more than the \d+ that kernels on"):
        load_executor(compiled("f32", "f32"), "vulkan", num_pages=10**9)
