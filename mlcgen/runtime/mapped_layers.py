"""Layers of weights that a CPU reads from a mapped file, each in memory only while it is needed.

A thread reads the next layer while one computes, and lets go of those behind. Without it nothing would go wrong but
time and memory: pages that are not there are read when a kernel touches them.

What is let go of is whole blocks, the largest pieces in which Linux keeps files: if a part of one stays, it is split
into small pages, the next reads go around those, and take twice as long.
"""

import ctypes
import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy.typing as npt

from mlcgen import safetensors
from mlcgen.errors import TargetError

__all__ = ["MappedLayers"]

Part = tuple[int, int]  # byte of the file, bytes

BLOCK = 2 << 20  # bytes
# Of Linux's madvise: let go of it; read in large pages where the file system has them; read it and enter it in the page
# table (5.14 and later). What MADV_WILLNEED reads comes in small pages, which costs twice the time.
_DONT_NEED, _LARGE_PAGES, _POPULATE = 4, 14, 22


class MappedLayers:
    """The layers that do not stay in memory. Call `enter` before a kernel that reads one."""

    def __init__(self, file: Path, weights: Mapping[str, npt.NDArray[Any]], layers: Sequence[Sequence[str]]) -> None:
        """weights: arrays in a mapping of the file. Raises TargetError where the system takes no such advice."""
        if not hasattr(os, "posix_fadvise"):
            raise TargetError("weight_memory on a CPU needs Linux; leave it away, or quantize further (-q)")
        entries = safetensors.read_entries(file)
        self._file, self._size = file.open("rb"), file.stat().st_size
        name = layers[0][0]
        self._base = weights[name].ctypes.data - entries[name].offset  # where the mapping begins
        parts = {name: (entries[name].offset, entries[name].num_bytes) for name in weights}
        places = [[parts[name] for name in names] for names in layers]
        moving = {name for names in layers for name in names}
        others = [part for name, part in parts.items() if name not in moving]
        self._stays, self._read_by, self._dropped_by = _share_blocks(places, others)
        self.layer_at = {weights[name].ctypes.data: i for i, names in enumerate(layers) for name in names}
        self.bytes_loaded = 0  # since the beginning, without what stays between layers
        self._current: int | None = None
        self._there: set[int] = set()  # layers that are in memory, or on their way
        self._ahead: tuple[int, Future[None]] | None = None
        self._reader = ThreadPoolExecutor(1)
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # what the check of the file's hash left
        self._advise([(0, self._size)], _LARGE_PAGES)
        self._reader.submit(self._advise, self._stays, _POPULATE)  # before kernels would read it in small pages

    def enter(self, layer: int) -> None:
        """A kernel is going to read this layer: wait until it is there, and begin to read the next one."""
        if layer == self._current:
            return
        self._current, ahead, self._ahead = layer, self._ahead, None
        if ahead is not None and ahead[0] == layer:
            ahead[1].result()
        else:  # the first, or out of order
            self._reader.submit(self._read, layer).result()
        following = (layer + 1) % len(self._read_by)
        behind, self._there = self._there - {layer, following}, {layer, following}
        self._ahead = following, self._reader.submit(self._advance, behind, following)

    def _advance(self, behind: set[int], following: int) -> None:
        for layer in behind:
            self._drop(layer)
        self._read(following)

    def _read(self, layer: int) -> None:
        self._advise(self._read_by[layer], _POPULATE)
        self.bytes_loaded += sum(num_bytes for _, num_bytes in self._dropped_by[layer])

    def _advise(self, parts: Sequence[Part], advice: int) -> None:
        for offset, num_bytes in parts:
            _madvise()(self._base + offset, min(num_bytes, self._size - offset), advice)

    def _drop(self, layer: int) -> None:
        """From the page table first: the system keeps what is mapped."""
        for offset, num_bytes in self._dropped_by[layer]:
            _madvise()(self._base + offset, min(num_bytes, self._size - offset), _DONT_NEED)
            os.posix_fadvise(self._file.fileno(), offset, num_bytes, os.POSIX_FADV_DONTNEED)


def _share_blocks(
    layers: Sequence[Sequence[Part]], others: Sequence[Part]
) -> tuple[list[Part], list[list[Part]], list[list[Part]]]:
    """Stretches of blocks: that stay, that each layer reads, and that go with it, as it is the last of their users."""
    stay = set(_blocks(others))
    read = [[block for block in _blocks(parts) if block not in stay] for parts in layers]
    owner = {block: layer for layer, blocks in enumerate(read) for block in blocks}
    dropped = [[block for block in dict.fromkeys(blocks) if owner[block] == i] for i, blocks in enumerate(read)]
    return _stretches(stay), [_stretches(blocks) for blocks in read], [_stretches(blocks) for blocks in dropped]


def _blocks(parts: Sequence[Part]) -> Iterator[int]:
    for offset, num_bytes in parts:
        yield from range(offset // BLOCK, -(-(offset + num_bytes) // BLOCK))


def _stretches(blocks: Iterable[int]) -> list[Part]:
    found: list[Part] = []
    for block in sorted(set(blocks)):
        if found and sum(found[-1]) == block * BLOCK:
            found[-1] = found[-1][0], found[-1][1] + BLOCK
        else:
            found.append((block * BLOCK, BLOCK))
    return found


@functools.cache
def _madvise() -> Any:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
