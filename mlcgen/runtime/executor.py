"""What the engine asks of a device: run one step over a ragged batch of tokens. Executors know no requests."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from mlcgen.adapter_layout import AdapterLayout
    from mlcgen.runtime.sampler import Sampled, Sampler

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
Uint8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class StepInput:
    """One iteration's tokens: sequence s owns rows query_start[s]:query_start[s+1] of the token arrays."""

    input_ids: Int32  # (tokens,)
    positions: Int32  # (tokens,) position of each token in its own sequence
    slot_mapping: Int32  # (tokens,) page * page_size + offset where the token's key and value go
    block_table: Int32  # (seqs, max_blocks) pages of each sequence in order; unused entries 0
    seq_lens: Int32  # (seqs,) tokens of the sequence in the cache after this step
    query_start: Int32  # (seqs + 1,)
    logit_rows: Int32  # (rows,) token rows whose logits are wanted
    tree_masks: Int32 | None = None
    """(tokens,) for a token of a tree, which of its sequence's tokens in this step it sees, a bit each, the first one
    the lowest; `positions` is then its depth, as several tokens may be at one position. 0, or no array: it sees all
    that are before it. A sequence with a tree has 32 tokens in the step at most."""


@dataclass(frozen=True, kw_only=True)
class AdaptedStepInput(StepInput):
    """A step in which some sequence has an adapter."""

    adapter_slots: Int32  # (tokens,) the slot of each token's adapter; -1: none


class Executor(Protocol):
    """A loaded artifact on one device, with its KV pages."""

    num_pages: int
    page_size: int
    vocab_size: int
    max_tokens_per_step: int
    page_shape: tuple[int, int]  # layers, and bytes of a page of one layer
    supports_trees: bool  # whether it can be given `tree_masks`

    def step(self, batch: StepInput) -> Float32:
        """Logits, (rows, vocab_size) float32. The array is valid until the next call."""
        ...

    def first_not_finite(self, batch: StepInput) -> str | None:
        """Run a step that was run before once more, kernel by kernel: the first whose results are not all finite, with
        the weights that it read; None if there is none."""
        ...

    def copy_page(self, source: int, to: int) -> None:
        """Copy a page's contents on the device, in the order of steps."""
        ...

    def pinned(self, num_bytes: int) -> Uint8:
        """Host memory for pages that moves fastest, kept as long as the executor; DeviceError where there is none."""
        ...

    def read_pages(self, pages: Sequence[int], host: Uint8, places: Sequence[int]) -> None:
        """Copy each page's contents, as they are after the steps that were begun, to its place in the host's memory.

        host: (layers, places, bytes of a page of one layer).
        """
        ...

    def write_pages(self, pages: Sequence[int], host: Uint8, places: Sequence[int]) -> None:
        """What `read_pages` gave, into pages, before the next step is begun."""
        ...

    def synchronize(self) -> None:
        """Wait for the steps that were begun."""
        ...


@runtime_checkable
class AdaptedExecutor(Executor, Protocol):
    """An executor whose artifact may take adapters; its steps may be AdaptedStepInputs then."""

    adapters: "AdapterLayout | None"

    def write_adapter(self, slot: int, matrices: "Sequence[tuple[npt.NDArray[Any], npt.NDArray[Any]]]") -> None:
        """Fill a slot, before the next step is begun: (lora_a, lora_b) of each group, as AdapterLayout says."""
        ...


@runtime_checkable
class SamplingExecutor(Executor, Protocol):
    """An executor that chooses tokens where it computes the logits."""

    def looks_ahead(self, samplers: "Sequence[Sampler]") -> bool:
        """Whether a step may be begun while one with these samplers is under way, as its tokens are all it needs."""
        ...

    def start(self, batch: StepInput, samplers: "Sequence[Sampler]", sampled_rows: Int32 | None = None) -> None:
        """Begin a step and the choice of a token for each of its logit rows; at most two steps are under way.

        sampled_rows (tokens,): for a token that the step before is sampling, the index of its logit row there, else -1.
        """
        ...

    def finish(self) -> "Sampled":
        """Wait for the step that was begun first; its samplers have recorded their tokens."""
        ...
