"""Adapters of a whole model through its second launch plan, kernels under the emulator, against the CPU target."""

import json
from pathlib import Path

import numpy as np
import pytest

import mlcgen
from mlcgen import artifact
from mlcgen.runtime import load_plan
from mlcgen.runtime.executor import Executor
from mlcgen.runtime.load import load_executor
from mlcgen.runtime.sampler import SamplingParams
from mlcgen.runtime.sampling_executor import SamplingPlanExecutor
from mlcgen.targets import cuda_codegen

from .emulate_cuda import needs_compiler
from .emulated_device import EmulatedDevice
from .small_model import CONFIG, PAGE_SIZE, PAGES, OneAtATime, adapted, generate, random_matrices
from .test_cuda_plan import batch

pytestmark = needs_compiler

SLOTS, RANK = 3, 5
BIASES = {"attention_bias": True, "mlp_bias": True}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact for the CPU and for CUDA, the latter's machine code being its source."""
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(CONFIG | BIASES | {"num_hidden_layers": 3}))
    options = {"page_size": PAGE_SIZE, "max_batch": 8, "kv_dtype": "float16", "random_weights": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_codegen, "compile_cuda", lambda source, arch: (source.encode(), ""))
        options |= {"lora_rank": RANK, "adapters": SLOTS}
        return mlcgen.compile(path, ["cpu", "cuda:sm_80"], "q8", path / "out", **options)


def emulated(path: Path, weight_memory: int | None = None) -> SamplingPlanExecutor:
    manifest, stored = artifact.read_manifest(path), artifact.map_weights(path / artifact.WEIGHTS)
    plans = [path / "lib" / f"cuda-sm_80{kind}.plan" for kind in ("", ".adapters")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_plan, "open_device", lambda kind: EmulatedDevice())
        sizes = PAGES, 8, 0.9, weight_memory
        executor = load_plan.load_plan("cuda", plans[0], manifest, stored, *sizes, plans[1])
    assert isinstance(executor, SamplingPlanExecutor)
    return executor


def test_logits_of_the_cpu(path: Path) -> None:
    """Mixed in a batch, in steps of each kind, and between steps without adapters."""
    executor, cpu = emulated(path), load_executor(path, "cpu", num_pages=PAGES).executor
    for slot in range(SLOTS):
        for each in (executor, cpu):
            each.write_adapter(slot, random_matrices(executor.adapters, slot))  # type: ignore[attr-defined]
    rng = np.random.default_rng()
    tables = rng.permutation(PAGES).reshape(3, 8)
    steps = [
        ([0, 0, 0], [9, 1, 5], [2, -1, 0]),  # prompts
        ([9, 1, 5], [1, 1, 1], [2, -1, 0]),  # decoding: run, then recorded
        ([10, 2, 6], [1, 1, 1], [-1, 1, 1]),  # the recording
        ([11, 3, 7], [1, 1, 1], None),
        ([12, 4, 8], [1, 11, 1], [0, 1, 2]),  # a chunk beside decodes
        ([13, 15, 9], [1, 1, 1], [0, 1, 2]),
    ]
    for before, counts, slots in steps:
        step = batch(before, counts, rng, tables)
        step = adapted(step, slots) if slots else step
        wanted = cpu.step(step).copy()
        found = executor.step(step)
        error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        assert error < 3e-3, (before, counts, slots, error)
    assert executor.first_not_finite(adapted(batch([0], [3], rng, tables[:1]), [1])) is None


def test_a_step_without_adapters_runs_the_plan_that_knows_of_none(path: Path) -> None:
    executor = emulated(path)
    rng = np.random.default_rng()
    step = batch([0, 0], [3, 2], rng, rng.permutation(16).reshape(2, 8))
    before = executor.step(step).copy()
    launched = executor.device.launched  # type: ignore[attr-defined]
    assert not any("low_rank" in name for name in launched)
    for slot in range(SLOTS):
        executor.write_adapter(slot, random_matrices(executor.adapters, slot))  # type: ignore[arg-type]
    found = executor.step(adapted(step, [0, 1]))
    assert any("low_rank" in name for name in launched)
    assert np.linalg.norm(found - before) > 0.05 * np.linalg.norm(before)
    none = executor.step(adapted(step, [-1, -1]))
    assert np.linalg.norm(none - before) < 1e-3 * np.linalg.norm(before)
    np.testing.assert_array_equal(executor.step(step), before)


def test_looking_ahead_gives_the_same_tokens(path: Path) -> None:
    rng = np.random.default_rng(2)
    prompts = [rng.integers(3, 300, length).tolist() for length in (3, 9, 2)]
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in (3, 6, 2)]
    params[1] = SamplingParams(temperature=0.9, seed=3, max_tokens=6, ignore_eos=True)
    slots = [0, -1, 1]
    tokens = generate(emulated(path), prompts, params, slots=slots)
    assert generate(one_at_a_time(emulated(path)), prompts, params, slots=slots) == tokens
    assert generate(emulated(path), prompts, params) != tokens


def one_at_a_time(executor: SamplingPlanExecutor) -> Executor:
    return OneAtATime(executor)  # type: ignore[return-value]


def test_streamed_layers_give_the_same_tokens(path: Path) -> None:
    """Steps with adapters and without have the same layers on their way."""
    budget = artifact.read_manifest(path)["weights"][0]["bytes"] - 100_000
    prompts, slots = [[5, 9, 100], [7], [8, 11]], [1, -1, 0]
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in (2, 4, 3)]
    whole, streamed = emulated(path), emulated(path, budget)
    assert streamed.stream is not None
    assert len(streamed.stream.visits) >= 2
    assert generate(streamed, prompts, params, slots=slots) == generate(whole, prompts, params, slots=slots)
