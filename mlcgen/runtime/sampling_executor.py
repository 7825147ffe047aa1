"""The `plan` executor with the choice of tokens on the device, a step ahead of the host."""

import ctypes
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from mlcgen.runtime.device import Address, Device
from mlcgen.runtime.draft import MAX_ROWS
from mlcgen.runtime.executor import Int32, StepInput
from mlcgen.runtime.layer_stream import LayerStream
from mlcgen.runtime.plan_executor import PlanExecutor, Step
from mlcgen.runtime.sampler import Sampled, Sampler

TAKE_TOKENS = "take_tokens"


class DeviceSampling(Protocol):
    """Chooses a token for each row as Sampler.sample does, from logits on the device."""

    @property
    def token_ids(self) -> Address:
        """Where the step's tokens are on the device, (rows,) int32."""
        ...

    def looks_ahead(self, samplers: Sequence[Sampler]) -> bool:
        """See SamplingExecutor.looks_ahead."""
        ...

    def start(self, logits: Address, samplers: Sequence[Sampler]) -> None:
        """Start sampling from logits (rows, vocab) float32, which are the same again afterwards."""
        ...

    def finish(self) -> Sampled:
        """What `start` started, after the device was waited for. Each sampler has recorded its token."""
        ...


class SamplingPlanExecutor(PlanExecutor):
    """Two sets of inputs, samplers and marks, so that one step can be prepared while one is under way."""

    TURNS = 2

    def __init__(
        self,
        device: Device,
        plan: Mapping[str, Any],
        manifest: Mapping[str, Any],
        weights: Mapping[str, Address],
        num_pages: int,
        sampling: Callable[[Device, int, int], DeviceSampling],
        stream: LayerStream | None = None,
        adapted: Mapping[str, Any] | None = None,
    ) -> None:
        """sampling(device, vocabulary's size, most rows)"""
        super().__init__(device, plan, manifest, weights, num_pages, stream, adapted)
        rows = max(self.max_batch, MAX_ROWS)  # drafts have rows of their own
        self._samplers = [sampling(device, self.vocab_size, rows) for _ in range(self.TURNS)]
        self._started: deque[int] = deque()  # turns under way

    def looks_ahead(self, samplers: Sequence[Sampler]) -> bool:
        """See SamplingExecutor.looks_ahead."""
        return self._samplers[0].looks_ahead(samplers)

    def start(self, batch: StepInput, samplers: Sequence[Sampler], sampled_rows: Int32 | None = None) -> None:
        """See SamplingExecutor.start."""
        step = self.launched(batch, sampled_rows=sampled_rows)
        self._samplers[step.turn].start(self.logits_address(step), samplers)
        self.device.mark(step.turn)
        self._started.append(step.turn)

    def finish(self) -> Sampled:
        """See SamplingExecutor.finish."""
        turn = self._started.popleft()
        self.device.wait(turn)
        return self._samplers[turn].finish()

    def more_inputs(self, symbols: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """See PlanExecutor.more_inputs."""
        return {"sampled_rows": (symbols["n"],)}

    def begin(self, step: Step) -> None:
        """Tokens that the step before chose into the inputs, from where they are on the device.

        The step's first kernel. It does not overlap, so the step before has ended when others start, and these may read
        the inputs, and what that one left in the cache, before they wait (attention_decode.cuh).
        """
        n = step.symbols["n"]
        addresses = (step.address("input_ids"), step.address("sampled_rows"), self._samplers[1 - step.turn].token_ids)
        args = [*map(ctypes.c_uint64, addresses), ctypes.c_int32(n)]
        self.device.launch(TAKE_TOKENS, (-(-n // 256), 1, 1), 256, 0, args)
