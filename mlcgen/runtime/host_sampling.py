"""Tokens for executors that hand over logits: sampled with NumPy, row by row."""

import math
from collections.abc import Sequence

from mlcgen.runtime.distribution import Distribution
from mlcgen.runtime.draft import ROOT, Draft
from mlcgen.runtime.executor import Executor, Float32, Int32, StepInput
from mlcgen.runtime.sampler import NO_TOKEN, Sampled, Sampler

__all__ = ["HostSampling", "sample_rows"]

Drafts = Sequence[Draft]  # for each sampler


class HostSampling:
    """Gives an executor of logits the interface of one that samples."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.page_size = executor.page_size
        self._batch: tuple[StepInput, Sequence[Sampler], Drafts] | None = None

    def looks_ahead(self, samplers: Sequence[Sampler]) -> bool:
        """See SamplingExecutor.looks_ahead."""
        return False

    def start(self, batch: StepInput, samplers: Sequence[Sampler], sampled_rows: Int32 | None = None) -> None:
        """See SamplingExecutor.start."""
        assert sampled_rows is None
        self._batch = batch, samplers, [Draft()] * len(samplers)

    def start_drafts(self, batch: StepInput, samplers: Sequence[Sampler], drafts: Drafts) -> None:
        """Likewise, with a row of logits for each token of a sampler's draft after the one of its last token."""
        self._batch = batch, samplers, drafts

    def finish(self) -> Sampled:
        """See SamplingExecutor.finish."""
        assert self._batch is not None, "start a step first"
        (batch, samplers, drafts), self._batch = self._batch, None
        logits = self._executor.step(batch)  # (rows, vocab)
        assert logits.shape == (len(batch.logit_rows), self._executor.vocab_size), logits.shape
        return sample_rows(logits, samplers, drafts)


def sample_rows(logits: Float32, samplers: Sequence[Sampler], drafts: Drafts) -> Sampled:
    """logits: (rows, vocab), for each sampler a row for its last token and one for each node of its draft.

    Rows are sampled along the one path of the draft whose tokens are chosen; the others mean nothing.
    """
    best = logits.argmax(axis=1).tolist()
    maxima = [float(row[top]) for row, top in zip(logits, best, strict=True)]
    sampled = Sampled(list(best), maxima, [None] * len(best))
    first = 0
    for sampler, draft in zip(samplers, drafts, strict=True):
        node: int | None = ROOT
        while node is not None:
            row = first + 1 + node
            token = _sample_row(logits[row], row, sampler, sampled, draft.proposal(node))
            node = draft.child(node, token)
            if node is not None and sampler.grammar is not None and sampler.grammar.is_finished:
                sampled.tokens[first + 1 + node], node = NO_TOKEN, None
        first += 1 + len(draft)
    return sampled


def _sample_row(
    logits: Float32, row: int, sampler: Sampler, sampled: Sampled, guess: tuple[int, Distribution] | None
) -> int | None:
    """logits (vocab,); `sampled` has the largest one. Returns the token, or None where no logits are to be trusted."""
    best = sampled.tokens[row]
    if not math.isfinite(sampled.maxima[row]):  # a NaN wins the argmax
        return None
    if not sampler.is_argmax:
        sampled.tokens[row] = sampler.sample(logits, best, guess)
    if sampler.params.logprobs is not None:
        sampled.logprobs[row] = sampler.logprobs(logits, best, sampled.tokens[row])
    return sampled.tokens[row]
