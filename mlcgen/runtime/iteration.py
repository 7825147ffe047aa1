"""An iteration that the executor works on, and how it fails."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mlcgen.runtime.draft import Draft
from mlcgen.runtime.executor import SamplingExecutor, StepInput
from mlcgen.runtime.host_sampling import HostSampling
from mlcgen.runtime.request import Request
from mlcgen.runtime.step_input import step_input

__all__ = ["Iteration", "StepError", "begin", "concerning"]


@dataclass
class Iteration:
    """A batch under way."""

    batch: list[Request]
    ready: list[Request]  # those whose next token it samples
    input: StepInput
    sampling: SamplingExecutor | HostSampling  # who samples
    rows: list[int]  # the first row of logits of each that is ready; its drafts have the next ones
    drafts: dict[Request, Draft]
    begun: float
    is_decode: bool  # of all of them
    is_finished: bool = False  # whether the executor has nothing more to do for it
    is_advanced: bool = False  # whether they count as computed and sampled


def begin(
    batch: list[Request], before: Iteration | None, sampling: SamplingExecutor | HostSampling, on_host: HostSampling
) -> Iteration:
    """Have the executor start a batch, `before` being under way. on_host: samples where drafts are not all greedy."""
    _mark_scheduled(batch)
    ready = [request for request in batch if request.reaches_end]  # in the order of the logit rows
    before_rows = dict(zip(before.ready, before.rows, strict=True)) if before is not None else {}
    batch_input, sampled_rows, rows = step_input(batch, before_rows, sampling.page_size)
    drafts = {request: request.draft for request in ready if request.draft}
    samplers = [request.sampler for request in ready]
    is_decode = all(request.is_decoding for request in batch)
    started = Iteration(batch, ready, batch_input, sampling, rows, drafts, time.perf_counter(), is_decode)
    if not drafts:
        sampling.start(batch_input, samplers, sampled_rows)
    elif all(sampler.is_argmax and sampler.params.logprobs is None for sampler in samplers):
        each_row = [request.sampler for request in ready for _ in range(1 + len(request.draft))]
        sampling.start(batch_input, each_row)
    else:  # which row is the last one that counts is known only when those before it were sampled
        started.sampling = on_host
        on_host.start_drafts(batch_input, samplers, [request.draft for request in ready])
    return started


def _mark_scheduled(batch: list[Request]) -> None:
    now = time.monotonic()
    for request in batch:
        if request.output.metrics.scheduled is None:
            request.output.metrics.scheduled = now


class StepError(Exception):
    """The executor failed; its cause says how."""

    def __init__(self, batch: list[Request]) -> None:
        self.batch = batch


@contextmanager
def concerning(batch: list[Request]) -> Iterator[None]:
    """An exception in here is one of the executor, with these requests."""
    try:
        yield
    except Exception as error:
        raise StepError(batch) from error
