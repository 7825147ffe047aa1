"""Tokens for executors that hand over logits: sampled with NumPy, row by row."""

import math
from collections.abc import Sequence

from mlcgen.runtime.executor import Executor, Float32, Int32, StepInput
from mlcgen.runtime.sampler import Sampled, Sampler

__all__ = ["HostSampling", "sample_rows"]


class HostSampling:
    """Gives an executor of logits the interface of one that samples."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._batch: tuple[StepInput, Sequence[Sampler]] | None = None

    def looks_ahead(self, samplers: Sequence[Sampler]) -> bool:
        """See SamplingExecutor.looks_ahead."""
        return False

    def start(self, batch: StepInput, samplers: Sequence[Sampler], sampled_rows: Int32 | None = None) -> None:
        """See SamplingExecutor.start."""
        assert sampled_rows is None
        self._batch = batch, samplers

    def finish(self) -> Sampled:
        """See SamplingExecutor.finish."""
        assert self._batch is not None, "start a step first"
        (batch, samplers), self._batch = self._batch, None
        logits = self._executor.step(batch)  # (rows, vocab)
        assert logits.shape == (len(samplers), self._executor.vocab_size), logits.shape
        return sample_rows(logits, samplers)


def sample_rows(logits: Float32, samplers: Sequence[Sampler]) -> Sampled:
    """logits: (rows, vocab), a row for each sampler."""
    best = logits.argmax(axis=1).tolist()
    sampled = Sampled(list(best), [float(row[top]) for row, top in zip(logits, best, strict=True)], [None] * len(best))
    for i, (sampler, row) in enumerate(zip(samplers, logits, strict=True)):
        if not math.isfinite(sampled.maxima[i]):  # a NaN wins the argmax
            continue
        if not sampler.is_argmax:
            sampled.tokens[i] = sampler.sample(row, best[i])
        if sampler.params.logprobs is not None:
            sampled.logprobs[i] = sampler.logprobs(row, best[i], sampled.tokens[i])
    return sampled
