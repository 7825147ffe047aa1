"""A model small enough for emulators, and an engine over executors of it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlcgen.adapter_layout import AdapterLayout
from mlcgen.runtime.engine import Engine
from mlcgen.runtime.executor import AdaptedStepInput, Executor, StepInput
from mlcgen.runtime.peft import Matrices
from mlcgen.runtime.sampler import SamplingParams
from mlcgen.runtime.sampling_executor import SamplingPlanExecutor

VOCAB, CONTEXT = 300, 128
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
PAGES, PAGE_SIZE = 24, 4


def generate(
    executor: Executor,
    prompts: list[list[int]],
    params: list[SamplingParams],
    max_batch: int = 8,
    slots: Sequence[int] = (),
) -> list[list[int]]:
    """Tokens of the prompts, served together. slots: of each one's adapter, which is there; -1: none."""
    engine = Engine(executor, None, [2], context_length=CONTEXT, max_batch=max_batch)
    if slots:
        for slot in range(max(slots) + 1):
            engine.adapters.load(str(slot), random_matrices(engine.adapters.layout, slot))
    names = [str(slot) if slot >= 0 else None for slot in slots] or [None] * len(prompts)
    outputs = [
        engine.add_request(str(i), prompt, its, adapter=name)
        for i, (prompt, its, name) in enumerate(zip(prompts, params, names, strict=True))
    ]
    while engine.has_unfinished:
        engine.step()
    assert not [output.error for output in outputs if output.error]
    assert engine.pool.num_free == engine.pool.num_pages
    return [list(output.token_ids) for output in outputs]


def random_matrices(layout: AdapterLayout, seed: int) -> Matrices:
    """An adapter that changes results by about as much as they are; it has values where it should have zeros, too."""
    rng = np.random.default_rng(seed)
    arrays = [(rng.standard_normal(shape[1:]) * 0.1).astype(layout.limits.dtype) for shape in layout.buffers.values()]
    return list(zip(arrays[::2], arrays[1::2], strict=True))


def adapted(step: StepInput, slots: Sequence[int]) -> AdaptedStepInput:
    """The step, its sequences with the adapters in these slots."""
    return AdaptedStepInput(**vars(step), adapter_slots=np.repeat(np.array(slots, np.int32), np.diff(step.query_start)))


class OneAtATime:
    """The same executor, without a step begun before the one under way has ended."""

    def __init__(self, executor: SamplingPlanExecutor) -> None:
        self._executor = executor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def looks_ahead(self, samplers: object) -> bool:
        return False


class LogitsOnly:
    """The same executor, whose tokens are then sampled on the host."""

    def __init__(self, executor: SamplingPlanExecutor) -> None:
        self.step, self.num_pages, self.page_size = executor.step, executor.num_pages, executor.page_size
        self.vocab_size, self.max_tokens_per_step = executor.vocab_size, executor.max_tokens_per_step
        self.page_shape, self.copy_page = executor.page_shape, executor.copy_page
        self.supports_trees = executor.supports_trees
        self.read_pages, self.write_pages = executor.read_pages, executor.write_pages
        self.pinned, self.synchronize = executor.pinned, executor.synchronize
        self.supports_trees = executor.supports_trees
