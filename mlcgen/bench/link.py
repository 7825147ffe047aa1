"""The link that streamed weights come over: copies from the host's pinned memory to a GPU, or reads of the file."""

import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

from mlcgen.errors import BenchError
from mlcgen.runtime.load_plan import open_device

__all__ = ["copy_rate", "file_rate", "open_link_probe"]

BLOCK, PIECE = 4 << 20, 16 << 20  # bytes of a read, and of what is mapped at a time
POPULATE = 22  # Linux's advice to read pages and enter them in the page table
COPY, COPIES = 256 << 20, 16  # bytes of one to the GPU, and how many in a row


def open_link_probe(kind: str, file: str = "") -> Callable[[], float]:
    """What measures the link of a kind of target, in bytes per second. file: of the weights; random ones have none.

    Raises BenchError where there is no link: a CPU reads the file.
    """
    if kind == "cpu" and not file:
        raise BenchError("random weights have no file to stream from; leave --weight-memory out")
    return (lambda: file_rate(Path(file))) if kind == "cpu" else (lambda: copy_rate(kind))


def file_rate(file: Path) -> float:
    """Bytes per second of reading all of a file that is not in memory, the faster of two ways.

    Raises BenchError where the system does not let go of what it has read.
    """
    if not hasattr(os, "posix_fadvise"):
        raise BenchError("the rate of a file can be measured on Linux only; leave --weight-memory out")
    rates = []
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        for read in (_read_blocks, _map_pieces):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            begun = time.perf_counter()
            read(stream.fileno(), size)
            rates.append(size / (time.perf_counter() - begun))
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return max(rates)


def _read_blocks(descriptor: int, size: int) -> None:
    buffer = bytearray(BLOCK)
    while os.readv(descriptor, [buffer]):
        pass


def _map_pieces(descriptor: int, size: int) -> None:
    with mmap.mmap(descriptor, size, prot=mmap.PROT_READ) as mapped:
        for start in range(0, size, PIECE):
            mapped.madvise(POPULATE, start, min(PIECE, size - start))
            mapped.madvise(mmap.MADV_DONTNEED, start, min(PIECE, size - start))


def copy_rate(kind: str) -> float:
    """Bytes per second from pinned memory to a GPU: the best of three rows of copies."""
    device = open_device(kind)
    to, held = device.allocate(COPY, "the probe"), device.pinned(COPY)
    held[:] = 1
    rates = []
    for _ in range(3):
        device.synchronize()
        begun = time.perf_counter()
        for _ in range(COPIES):
            device.upload(to, held)
        device.synchronize()
        rates.append(COPY * COPIES / (time.perf_counter() - begun))
    return max(rates)
