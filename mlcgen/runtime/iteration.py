"""An iteration that the executor works on, and how it fails."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mlcgen.runtime.draft import Draft
from mlcgen.runtime.executor import SamplingExecutor, StepInput
from mlcgen.runtime.host_sampling import HostSampling
from mlcgen.runtime.request import Request

__all__ = ["Iteration", "StepError", "concerning"]


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
