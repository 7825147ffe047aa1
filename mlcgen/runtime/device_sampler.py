"""Tokens from logits that stay on the device: one upload, one kernel, one download of ids (kernels: sample.cuh)."""

import ctypes
import math
import struct
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from mlcgen.runtime.device import Address, Device
from mlcgen.runtime.executor import Float32, Int32
from mlcgen.runtime.pinned import Mirrored, PinnedRows
from mlcgen.runtime.sampler import Sampled, Sampler, SamplingParams

__all__ = ["FUNCTIONS", "DeviceSampler"]

FUNCTIONS = ("argmax_rows_by_parts", "sample_rows")
THREADS = 1024
MAX_LOGPROBS = 32
"""Rows that want more log-probabilities than this are sampled on the host."""

_ROW = struct.Struct("<4d3f7i")  # sampling::Row of sample.cuh
_WORD = 4  # bytes
_PART, _MAX_PARTS = 8192, 16  # logits that one block takes, and blocks of a row, when only the largest is sought
_TINY, _LARGEST = 1e-37, 3e38  # an inverse temperature of 0 would mean greedy; what float32 can hold

Mask = npt.NDArray[np.uint32]


class DeviceSampler:
    """Chooses a token for each row as Sampler.sample does, without the logits leaving the device.

    `start` only starts work; `finish` takes its results once the device has been synchronized.
    """

    def __init__(self, device: Device, vocab_size: int, max_rows: int) -> None:
        self._device, self._vocab, self._max_rows = device, vocab_size, max_rows
        self._mask_words = -(-vocab_size // 32)
        self._inputs = Mirrored(device, max_rows * (_ROW.size + 64 * _WORD), "sampling")
        self._results = Mirrored(device, max_rows * (3 + 2 * MAX_LOGPROBS) * _WORD, "sampling")
        self._num_parts = min(-(-vocab_size // _PART), _MAX_PARTS)
        self._parts = device.allocate(max_rows * self._num_parts * 2 * _WORD, "sampling")
        self._counters = device.allocate(max_rows * _WORD, "sampling")
        self._host_logits = PinnedRows(device, vocab_size)
        self._samplers: Sequence[Sampler] = ()  # of the step that has been started
        self._host_rows: list[int] = []

    @property
    def token_ids(self) -> Address:
        """See DeviceSampling.token_ids; those of host rows are not among them."""
        return self._results.address

    def looks_ahead(self, samplers: Sequence[Sampler]) -> bool:
        """See DeviceSampling.looks_ahead."""
        return not any(sampler.has_history or _needs_host(sampler.params) for sampler in samplers)

    def start(self, logits: Address, samplers: Sequence[Sampler], masks: Mapping[int, Mask] | None = None) -> None:
        """Start sampling from logits (rows, vocab) float32 on the device, which are the same again afterwards.

        masks: for some rows, the tokens allowed there, (ceil(vocab / 32),) with token t at bit t % 32 of word t // 32.
        """
        assert not self._samplers, "finish the step before"
        assert len(samplers) <= self._max_rows
        self._samplers = samplers
        self._host_rows = [row for row, sampler in enumerate(samplers) if _needs_host(sampler.params)]
        masks = masks or self._masks()
        assert not any(row in masks for row in self._host_rows), "the host applies no masks"
        if not samplers:
            return
        wants_logprobs = any(sampler.params.logprobs is not None for sampler in samplers)
        if masks or wants_logprobs or not all(sampler.is_argmax for sampler in samplers):
            self._start_sampling(logits, masks)
        else:
            self._start_argmax(logits)
        words = (3 + 2 * MAX_LOGPROBS if wants_logprobs else 2) * len(samplers)
        self._results.download(words * _WORD)
        self._download_host_rows(logits)

    def _masks(self) -> dict[int, Mask]:
        """Of the rows' grammars; the host applies its own."""
        found = {row: sampler.mask() for row, sampler in enumerate(self._samplers) if row not in self._host_rows}
        return {row: mask for row, mask in found.items() if mask is not None}

    def finish(self) -> Sampled:
        """What `start` started, after device.synchronize(). Each sampler has recorded its token."""
        samplers, self._samplers = self._samplers, ()
        rows = len(samplers)
        ids, values = self._results.host.view(np.int32), self._results.host.view(np.float32)
        sampled = Sampled(ids[:rows].tolist(), values[rows : 2 * rows].tolist(), [None] * rows)
        for row, sampler in enumerate(samplers):
            if row in self._host_rows or not math.isfinite(sampled.maxima[row]):
                continue
            sampler.record(sampled.tokens[row])
            if sampler.params.logprobs is not None:
                sampled.logprobs[row] = self._logprobs(row, rows, sampler.params.logprobs, sampled.tokens[row])
        for logits, row in zip(self._host_logits.rows(len(self._host_rows)), self._host_rows, strict=True):
            _sample_on_host(samplers[row], logits, sampled, row)
        return sampled

    def _start_argmax(self, logits: Address) -> None:
        rows, results = len(self._samplers), self._results.address
        addresses = (logits, self._parts, self._counters, results, results + rows * _WORD)
        args = [*map(ctypes.c_uint64, addresses), ctypes.c_int32(self._vocab)]
        self._device.launch("argmax_rows_by_parts", (self._num_parts, rows, 1), THREADS, 0, args)

    def _start_sampling(self, logits: Address, masks: Mapping[int, Mask]) -> None:
        masks_at, changes_at, end = self._pack(masks)
        self._inputs.upload(end)
        rows = self._inputs.address
        addresses = (logits, rows, rows + changes_at, rows + masks_at, self._results.address)
        args = [*map(ctypes.c_uint64, addresses), ctypes.c_int32(self._vocab)]
        self._device.launch("sample_rows", (len(self._samplers), 1, 1), THREADS, 0, args)

    def _pack(self, masks: Mapping[int, Mask]) -> tuple[int, int, int]:
        """Fill the inputs: rows, masks, changes. Returns where masks and changes begin, and the end."""
        changes = [_Changes(sampler) for sampler in self._samplers]
        num_changes = sum(change.count for change in changes)
        masks_at = len(changes) * _ROW.size
        changes_at = masks_at + -(-len(masks) * self._mask_words // 2) * 2 * _WORD
        end = changes_at + num_changes * 2 * _WORD
        self._inputs.reserve(end + 1)  # so that where changes begin is inside, even if there are none
        host = self._inputs.host
        held_masks = host[masks_at:changes_at].view(np.uint32)[: len(masks) * self._mask_words]
        for held, mask in zip(held_masks.reshape(-1, self._mask_words), masks.values(), strict=True):
            held[:] = mask
        held_changes = host[changes_at:end].view(np.int32).reshape(-1, 2)
        mask_of_row = {row: i for i, row in enumerate(masks)}
        begin = 0
        for row, (sampler, change) in enumerate(zip(self._samplers, changes, strict=True)):
            values = _row_values(sampler, self._vocab, on_host=row in self._host_rows)
            spans = change.write(held_changes, begin)
            _ROW.pack_into(host.data, row * _ROW.size, *values, mask_of_row.get(row, -1), *spans)
            begin = spans[-1]
        return masks_at, changes_at, end

    def _download_host_rows(self, logits: Address) -> None:
        for held, row in zip(self._host_logits.rows(len(self._host_rows)), self._host_rows, strict=True):
            self._device.download(held, logits + row * self._vocab * _WORD)

    def _logprobs(self, row: int, rows: int, count: int, token: int) -> dict[int, float]:
        """Of the results, as sample.cuh lays them out."""
        ids, values = self._results.host.view(np.int32), self._results.host.view(np.float32)
        best_ids = 3 * rows + row * MAX_LOGPROBS
        best_values = best_ids + rows * MAX_LOGPROBS
        count = min(count, self._vocab)
        found = zip(
            ids[best_ids : best_ids + count].tolist(), values[best_values : best_values + count].tolist(), strict=True
        )
        logprobs: dict[int, float] = dict(found)
        logprobs.setdefault(token, float(values[2 * rows + row]))
        return logprobs


class _Changes:
    """The changes of one row's logits: biases, penalties and bans, each a (token, value) pair of int32."""

    def __init__(self, sampler: Sampler) -> None:
        (self._biased, self._biases), (self._seen, self._counts) = sampler.bias, sampler.seen
        self._banned = sampler.banned
        self.count = len(self._biased) + len(self._seen) + len(self._banned)

    def write(self, to: Int32, start: int) -> tuple[int, int, int, int]:
        """Write them to rows start .. of (changes, 2); returns where biases, penalties and bans begin, and the end."""
        if not self.count:
            return start, start, start, start
        seen = start + len(self._biased)
        banned = seen + len(self._seen)
        end = banned + len(self._banned)
        to[start:seen, 0], to[start:seen, 1] = self._biased, self._biases.view(np.int32)
        to[seen:banned, 0], to[seen:banned, 1] = self._seen, self._counts
        to[banned:end, 0] = self._banned
        return start, seen, banned, end


def _needs_host(params: SamplingParams) -> bool:
    """Whether a row's token is chosen on the host."""
    return params.logprobs is not None and not 0 <= params.logprobs <= MAX_LOGPROBS


def _row_values(sampler: Sampler, vocab_size: int, on_host: bool) -> tuple[float, ...]:
    """The fields of sampling::Row up to num_logprobs. A host row's random number is left to the host."""
    params = sampler.params
    is_greedy = params.is_greedy or on_host
    return (
        0.0 if is_greedy else sampler.next_uniform(),
        float(params.top_p),
        float(params.presence_penalty),
        float(params.frequency_penalty),
        0.0 if is_greedy else max(1 / params.temperature, _TINY),
        float(params.min_p),
        min(float(params.repetition_penalty), _LARGEST),
        max(int(params.top_k), 0),
        -1 if params.logprobs is None or on_host else min(params.logprobs, vocab_size),
    )


def _sample_on_host(sampler: Sampler, logits: Float32, sampled: Sampled, row: int) -> None:
    if math.isfinite(sampled.maxima[row]):
        best = int(logits.argmax())
        token = sampled.tokens[row] = sampler.sample(logits, best)
        sampled.logprobs[row] = sampler.logprobs(logits, best, token)
