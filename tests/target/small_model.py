"""A model small enough for emulators, and an engine over executors of it."""

from typing import Any

from mlcgen.runtime.engine import Engine
from mlcgen.runtime.executor import Executor
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
    executor: Executor, prompts: list[list[int]], params: list[SamplingParams], max_batch: int = 8
) -> list[list[int]]:
    """Tokens of the prompts, served together."""
    engine = Engine(executor, None, [2], context_length=CONTEXT, max_batch=max_batch)
    outputs = [
        engine.add_request(str(i), prompt, its) for i, (prompt, its) in enumerate(zip(prompts, params, strict=True))
    ]
    while engine.has_unfinished:
        engine.step()
    assert not [output.error for output in outputs if output.error]
    assert engine.pool.num_free == engine.pool.num_pages
    return [list(output.token_ids) for output in outputs]


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
