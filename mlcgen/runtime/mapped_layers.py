"""Layers of weights that a CPU reads from a mapped file, each in memory only while it is needed.

A thread reads the next layer while one computes, and lets go of those behind. Without it nothing would go wrong but
time and memory: pages that are not there are read when a kernel touches them.
"""

import ctypes
import functools
import mmap
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy.typing as npt

from mlcgen import safetensors
from mlcgen.errors import TargetError

__all__ = ["MappedLayers"]

# Of Linux's madvise: start reading all of it; let go of it; read it and enter it in the page table (5.14 and later).
_WILL_NEED, _DONT_NEED, _POPULATE = 3, 4, 22


class MappedLayers:
    """The layers that do not stay in memory. Call `enter` before a kernel that reads one."""

    def __init__(self, file: Path, weights: Mapping[str, npt.NDArray[Any]], layers: Sequence[Sequence[str]]) -> None:
        """weights: arrays in a mapping of the file. Raises TargetError where the system takes no such advice."""
        if not hasattr(os, "posix_fadvise"):
            raise TargetError("weight_memory on a CPU needs Linux; leave it away, or quantize further (-q)")
        entries = safetensors.read_entries(file)
        self._file = file.open("rb")
        self._parts = [
            [(weights[n].ctypes.data, entries[n].offset, weights[n].nbytes) for n in each] for each in layers
        ]
        self._parts = [_joined(parts) for parts in self._parts]
        self.layer_at = {weights[name].ctypes.data: i for i, names in enumerate(layers) for name in names}
        self.bytes_loaded = 0  # since the beginning
        self._current: int | None = None
        self._there: set[int] = set()  # layers that are in memory, or on their way
        self._ahead: tuple[int, Future[None]] | None = None
        self._reader = ThreadPoolExecutor(1)
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # what the check of the file's hash left

    def enter(self, layer: int) -> None:
        """A kernel is going to read this layer: wait until it is there, and begin to read the next one."""
        if layer == self._current:
            return
        self._current, ahead, self._ahead = layer, self._ahead, None
        if ahead is not None and ahead[0] == layer:
            ahead[1].result()
        else:  # the first, or out of order
            self._reader.submit(self._read, layer).result()
        following = (layer + 1) % len(self._parts)
        behind, self._there = self._there - {layer, following}, {layer, following}
        self._ahead = following, self._reader.submit(self._advance, behind, following)

    def _advance(self, behind: set[int], following: int) -> None:
        self._advise(following, _WILL_NEED)  # the disk works while others are let go of
        for layer in behind:
            self._drop(layer)
        self._read(following)

    def _read(self, layer: int) -> None:
        self._advise(layer, _POPULATE)
        self.bytes_loaded += sum(num_bytes for _, _, num_bytes in self._parts[layer])

    def _advise(self, layer: int, advice: int) -> None:
        for address, _, num_bytes in self._parts[layer]:
            start = address // mmap.PAGESIZE * mmap.PAGESIZE
            _madvise()(start, address + num_bytes - start, advice)

    def _drop(self, layer: int) -> None:
        """From the page table first: the system keeps what is mapped. Pages that other weights share stay."""
        for address, offset, num_bytes in self._parts[layer]:
            margin = -address % mmap.PAGESIZE
            whole = (num_bytes - margin) // mmap.PAGESIZE * mmap.PAGESIZE
            if whole > 0:
                _madvise()(address + margin, whole, _DONT_NEED)
                os.posix_fadvise(self._file.fileno(), offset + margin, whole, os.POSIX_FADV_DONTNEED)


def _joined(parts: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """(address, byte of the file, bytes) of stretches, of those of weights that may follow each other."""
    found: list[tuple[int, int, int]] = []
    for address, offset, num_bytes in sorted(parts):
        if found and address - sum(found[-1][::2]) < safetensors.ALIGNMENT:
            first, begin, _ = found.pop()
            address, offset, num_bytes = first, begin, address + num_bytes - first
        found.append((address, offset, num_bytes))
    return found


@functools.cache
def _madvise() -> Any:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
