"""A whole model through launch plan and plan executor, its kernels under the emulator, against the CPU target."""

import base64
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlcgen
from mlcgen import artifact, weights
from mlcgen.errors import DeviceError
from mlcgen.formats import Q8
from mlcgen.passes.quantize import WeightSource
from mlcgen.runtime import device_weights, load_plan
from mlcgen.runtime.device_sampler import DeviceSampler
from mlcgen.runtime.executor import Executor, StepInput
from mlcgen.runtime.host_layers import padded_bytes
from mlcgen.runtime.load import load_executor
from mlcgen.runtime.plan import function_names, read_plan
from mlcgen.runtime.sampler import SamplingParams
from mlcgen.runtime.sampling_executor import SamplingPlanExecutor
from mlcgen.targets import cuda_codegen
from mlcgen.weights import storage_plan

from .emulate_cuda import needs_compiler
from .emulated_device import EmulatedDevice
from .small_model import CONFIG, PAGE_SIZE, PAGES, VOCAB, OneAtATime, generate
from .trees import check_model

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """compiled(quantization, layers) -> artifact for the CPU and for CUDA, the latter's machine code being its source.

    Under q4 with values in 8 bits, as GGUF files mix them: q, k and v are then products of their own.
    """

    @functools.cache
    def compile_once(quantization: str, num_layers: int = 2) -> Path:
        path = tmp_path_factory.mktemp(quantization)
        (path / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": num_layers}))
        options = {"page_size": PAGE_SIZE, "max_batch": 8, "kv_dtype": "float16", "random_weights": True}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_codegen, "compile_cuda", lambda source, arch: (source.encode(), ""))
            if quantization == "q4":
                patch.setattr(weights, "storage_plan", with_8_bit_values)
            return mlcgen.compile(path, ["cpu", "cuda:sm_80"], quantization, path / "out", **options)

    return compile_once


def with_8_bit_values(*arguments: Any) -> tuple[dict[str, WeightSource], list[str]]:
    plan, fallbacks = storage_plan(*arguments)
    return {n: WeightSource(n, Q8) if n.endswith("v_proj.weight") else s for n, s in plan.items()}, fallbacks


def emulated(path: Path) -> tuple[SamplingPlanExecutor, EmulatedDevice]:
    manifest = artifact.read_manifest(path)
    plan = read_plan(path / "lib" / "cuda-sm_80.plan")
    device = EmulatedDevice()
    device.load(base64.b64decode(plan["module"]), function_names(plan))
    stored = artifact.map_weights(path / artifact.WEIGHTS)
    addresses = device_weights.upload_weights(device, plan["weights"], stored)
    return SamplingPlanExecutor(device, plan, manifest, addresses, PAGES, DeviceSampler), device


def batch(before: list[int], counts: list[int], rng: np.random.Generator, tables: np.ndarray) -> StepInput:
    """Sequence s has before[s] tokens and adds counts[s]; logits of each one's last token."""
    positions = np.concatenate([np.arange(b, b + c) for b, c in zip(before, counts, strict=True)])
    owner = np.repeat(np.arange(len(counts)), counts)
    slots = tables[owner, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
    start = np.cumsum([0, *counts])
    arrays = [rng.integers(0, 300, len(positions)), positions, slots, tables, np.add(before, counts), start]
    return StepInput(*(a.astype(np.int32) for a in arrays), (start[1:] - 1).astype(np.int32))


@pytest.mark.parametrize("quantization", ["q4", "bf16"])
def test_plan_gives_the_logits_of_the_cpu(compiled: Callable[..., Path], quantization: str) -> None:
    path = compiled(quantization)
    executor, device = emulated(path)
    expected: Executor = load_executor(path, "cpu", num_pages=PAGES).executor
    rng = np.random.default_rng(1)
    tables = rng.permutation(PAGES).reshape(3, 8)
    steps = [
        ([0, 0, 0], [9, 1, 5]),  # prompts
        ([9, 1, 5], [1, 1, 1]),  # decoding: run, then recorded
        ([10, 2, 6], [1, 1, 1]),  # the recording
        ([11, 3, 7], [1, 11, 1]),  # a chunk beside decodes
    ]
    for before, counts in steps:
        step = batch(before, counts, rng, tables)
        wanted = expected.step(step).copy()
        found = executor.step(step)
        error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        assert error < (2e-2 if quantization == "bf16" else 3e-3), (before, counts, error)
    assert any("attention_decode" in name for name in device.launched)
    assert any("attention_prefill" in name for name in device.launched)


def test_paths_of_trees_have_the_logits_of_plain_sequences(compiled: Callable[..., Path]) -> None:
    path = compiled("bf16")
    executor, device = emulated(path)
    check_model(executor, load_executor(path, "cpu", num_pages=PAGES).executor, VOCAB, 2e-2)
    prefills = [name.endswith("_trees") for name in device.launched if "attention_prefill" in name]
    assert prefills == [False, False, True, True]  # of two layers: the prompts, and the step with trees


def test_looking_ahead_gives_the_same_tokens(compiled: Callable[..., Path]) -> None:
    """Sequences of different lengths, ending by length and by token, more than the pages hold at once."""
    executor, device = emulated(compiled("bf16"))
    rng = np.random.default_rng(2)
    prompts = [rng.integers(3, 300, length).tolist() for length in (3, 17, 9, 1, 30)]
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=count % 2 == 0) for count in (4, 9, 1, 12, 6)]
    params[1] = SamplingParams(temperature=0.9, seed=3, max_tokens=9, stop_token_ids=list(range(3, 90)))
    params[3] = SamplingParams(temperature=1.2, top_k=20, seed=5, max_tokens=12, ignore_eos=True)
    tokens = generate(executor, prompts, params)
    assert [len(t) for t in tokens[2:]] == [1, 12, 6]
    assert generate(OneAtATime(executor), prompts, params) == tokens  # type: ignore[arg-type]
    with_history = [SamplingParams(temperature=0, max_tokens=4, presence_penalty=0.5), *params[1:]]
    assert len(generate(executor, prompts, with_history)[0]) <= 4
    assert "take_tokens" in device.launched


def test_the_kernel_that_gives_nan_is_named(compiled: Callable[..., Path]) -> None:
    executor, device = emulated(compiled("bf16"))
    rng = np.random.default_rng(3)
    tables = rng.permutation(PAGES).reshape(3, 8)
    step = batch([0, 0, 0], [2, 1, 3], rng, tables)
    executor.step(step)
    assert executor.first_not_finite(step) is None
    name = next(name for name in executor._weights if "layers.1.post_attention_layernorm" in name)
    device.upload(executor._weights[name], np.full(4, np.nan, np.float32))
    assert np.isnan(executor.step(step)).any()
    assert name in (executor.first_not_finite(step) or "")
    decode = batch([2, 1, 3], [1, 1, 1], rng, tables)
    executor.step(decode)
    assert name in (executor.first_not_finite(decode) or "")


def test_streamed_layers_give_the_same_tokens(compiled: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The fewest that there can be from the host's memory, and all of them from the file."""
    path = compiled("bf16", 5)
    monkeypatch.setattr(load_plan, "open_device", lambda kind: EmulatedDevice())
    plan = read_plan(path / "lib" / "cuda-sm_80.plan")
    sizes = {name: padded_bytes(spec) for name, spec in plan["weights"].items()}
    num_bytes = sum(sizes.values())
    least = num_bytes - 3 * sum(size for name, size in sizes.items() if ".layers.2." in name)  # two are there at a time
    prompts = [[5, 9, 100], [7]]
    params = [SamplingParams(temperature=0, max_tokens=3, ignore_eos=True) for _ in prompts]
    tokens = []
    cases = ((num_bytes, 1.0, 0), (num_bytes - 1, 1.0, 3), (least, 0.0, 5))
    for weight_memory, share, layers in cases:
        monkeypatch.setattr(load_plan, "HOST_SHARE", share)
        manifest, stored = artifact.read_manifest(path), artifact.map_weights(path / artifact.WEIGHTS)
        arguments = (path / "lib" / "cuda-sm_80.plan", manifest, stored, PAGES, 8, 0.9, weight_memory)
        executor = load_plan.load_plan("cuda", *arguments)
        assert isinstance(executor, SamplingPlanExecutor)
        assert (len(executor.stream.visits) if executor.stream else 0) == layers
        tokens.append(generate(executor, prompts, params))
    assert tokens[1:] == tokens[:1] * 2
    with pytest.raises(DeviceError, match=f"give at least {least} bytes"):
        load_plan.load_plan("cuda", *arguments[:-1], least - 1)
