"""The most likely tokens, chosen on devices whose kernels are WGSL (kernels: argmax.wgsl); all others on the host."""

import ctypes
from collections.abc import Sequence

import numpy as np

from mlcgen.runtime.device import Address, Device
from mlcgen.runtime.draft import Draft
from mlcgen.runtime.host_sampling import sample_rows
from mlcgen.runtime.pinned import Mirrored, PinnedRows
from mlcgen.runtime.sampler import Sampled, Sampler

__all__ = ["FUNCTIONS", "PARTS", "THREADS", "ArgmaxSampler"]

FUNCTIONS = ("argmax_of_parts", "argmax_of_rows")
PARTS, THREADS = 32, 256  # of a row, each taken by one workgroup; invocations of a workgroup
_WORD = 4  # bytes


class ArgmaxSampler:
    """See sampling_executor.DeviceSampling. A step with a row that is not greedy has all its logits copied."""

    def __init__(self, device: Device, vocab_size: int, max_rows: int) -> None:
        self._device, self._vocab = device, vocab_size
        self._parts = device.allocate(max_rows * PARTS * 2 * _WORD, "sampling")
        self._results = Mirrored(device, max_rows * 2 * _WORD, "sampling")  # ids, then logits
        self._logits = PinnedRows(device, vocab_size)
        self._samplers: Sequence[Sampler] = ()  # of the step that has been started

    @property
    def token_ids(self) -> Address:
        """See DeviceSampling.token_ids."""
        return self._results.address

    def looks_ahead(self, samplers: Sequence[Sampler]) -> bool:
        """See DeviceSampling.looks_ahead."""
        return all(sampler.is_argmax and sampler.params.logprobs is None for sampler in samplers)

    def start(self, logits: Address, samplers: Sequence[Sampler]) -> None:
        """See DeviceSampling.start."""
        self._samplers = samplers
        rows = len(samplers)
        if self.looks_ahead(samplers):
            if rows:
                self._launch(logits, rows)
                self._results.download(2 * rows * _WORD)
        else:
            self._device.download(self._logits.rows(rows), logits)

    def finish(self) -> Sampled:
        """See DeviceSampling.finish."""
        samplers, self._samplers = self._samplers, ()
        rows = len(samplers)
        if not self.looks_ahead(samplers):
            return sample_rows(self._logits.rows(rows), samplers, [Draft()] * rows)
        ids, values = self._results.host.view(np.int32), self._results.host.view(np.float32)
        return Sampled(ids[:rows].tolist(), values[rows : 2 * rows].tolist(), [None] * rows)

    def _launch(self, logits: Address, rows: int) -> None:
        vocab, ids = ctypes.c_int32(self._vocab), self._results.address
        of_parts, of_rows = FUNCTIONS
        args = [*map(ctypes.c_uint64, (logits, self._parts)), vocab]
        self._device.launch(of_parts, (PARTS, rows, 1), THREADS, 0, args)
        args = [*map(ctypes.c_uint64, (self._parts, ids)), ctypes.c_int32(rows)]
        self._device.launch(of_rows, (1, rows, 1), THREADS, 0, args)
