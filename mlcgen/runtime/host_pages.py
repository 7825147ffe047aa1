"""Pages that wait on the host, or in a file, for their sequence to go on."""

import mmap
import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from mlcgen.errors import DeviceError
from mlcgen.runtime.executor import Executor, Uint8

__all__ = ["FilePages", "MemoryPages"]

BLOCK_BYTES = 32 << 20  # of host memory that is taken, and moved, at once


class MemoryPages:
    """Room for pages by number in pinned memory, which is taken block by block as it is needed.

    A block is (layers, pages, bytes of a page of one layer), as the device has them, so that neighbours are one copy.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._per_block = _pages_per_block(executor)
        self._blocks: dict[int, Uint8] = {}

    def reserve(self, places: Sequence[int]) -> None:
        """Take the memory for these pages now, which takes longer than moving them."""
        for number in {place // self._per_block for place in places} - self._blocks.keys():
            self._blocks[number] = _new_block(self._executor, self._per_block)

    def save(self, pages: Sequence[int], places: Sequence[int]) -> None:
        """Pages of the device to places here, which were reserved."""
        for block, its_pages, its_places in self._by_block(pages, places):
            self._executor.read_pages(its_pages, block, its_places)

    def load(self, places: Sequence[int], pages: Sequence[int]) -> None:
        """And back."""
        for block, its_pages, its_places in self._by_block(pages, places):
            self._executor.write_pages(its_pages, block, its_places)

    def _by_block(
        self, pages: Sequence[int], places: Sequence[int]
    ) -> Iterator[tuple[Uint8, Sequence[int], Sequence[int]]]:
        """(block, pages of the device, places in the block)"""
        pairs = zip(pages, places, strict=True)
        for number, group in groupby(pairs, key=lambda pair: pair[1] // self._per_block):
            its_pages, its_places = zip(*group, strict=True)
            yield self._blocks[number], its_pages, [place % self._per_block for place in its_places]


class FilePages:
    """Room for pages by number in a file, which they reach by way of one block of pinned memory."""

    def __init__(self, executor: Executor, num_pages: int, file: Path) -> None:
        """Raises DeviceError if the file cannot be made."""
        layers, layer_bytes = executor.page_shape
        size = num_pages * layers * layer_bytes
        raw = np.frombuffer(_mapped_file(file, max(size, 1)), np.uint8)[:size]
        self._pages = raw.reshape(num_pages, layers, layer_bytes)
        self._executor = executor
        self._per_block = _pages_per_block(executor)
        self._block = _new_block(executor, self._per_block)

    def reserve(self, places: Sequence[int]) -> None:
        """See MemoryPages.reserve. Here nothing is left to take."""

    def save(self, pages: Sequence[int], places: Sequence[int]) -> None:
        """See MemoryPages.save."""
        for part in self._parts(len(pages)):
            self._executor.read_pages(pages[part], self._block, range(len(pages[part])))
            for i, place in enumerate(places[part]):
                self._pages[place] = self._block[:, i]

    def load(self, places: Sequence[int], pages: Sequence[int]) -> None:
        """See MemoryPages.load."""
        for part in self._parts(len(pages)):
            for i, place in enumerate(places[part]):
                self._block[:, i] = self._pages[place]
            self._executor.write_pages(pages[part], self._block, range(len(pages[part])))

    def _parts(self, count: int) -> Iterator[slice]:
        return (slice(i, i + self._per_block) for i in range(0, count, self._per_block))


def _pages_per_block(executor: Executor) -> int:
    layers, layer_bytes = executor.page_shape
    return max(BLOCK_BYTES // (layers * layer_bytes), 1)


def _new_block(executor: Executor, num_pages: int) -> Uint8:
    layers, layer_bytes = executor.page_shape
    size = layers * num_pages * layer_bytes
    try:
        raw = executor.pinned(size)
    except DeviceError:  # pages move to and from any memory, only slower
        raw = np.zeros(size, np.uint8)
    return raw[:size].reshape(layers, num_pages, layer_bytes)


def _mapped_file(file: Path, size: int) -> mmap.mmap:
    """Of this size, with no name any more: the system removes it with the process, however that ends."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.unlink(file)
            os.ftruncate(descriptor, size)
            return mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DeviceError(f"cannot make the swap file {file}: {error}; choose another swap_file") from error
