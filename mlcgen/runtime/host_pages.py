"""Pages that wait on the host, or in a file, for their sequence to go on."""

import mmap
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlcgen.errors import DeviceError

__all__ = ["HostPages"]


class HostPages:
    """Room for pages by number, each (layers, bytes of a layer) uint8. Memory is used only once it is written to."""

    def __init__(self, num_pages: int, layers: int, layer_bytes: int, file: Path | None = None) -> None:
        """Raises DeviceError if the file cannot be made."""
        size = max(num_pages * layers * layer_bytes, 1)
        self._memory = mmap.mmap(-1, size) if file is None else _mapped_file(file, size)
        self._pages = np.frombuffer(self._memory, np.uint8)[: num_pages * layers * layer_bytes]
        self._pages = self._pages.reshape(num_pages, layers, layer_bytes)

    def __len__(self) -> int:
        return len(self._pages)

    def __getitem__(self, page: int) -> npt.NDArray[np.uint8]:
        """(layers, layer_bytes), to be read or written."""
        found: npt.NDArray[np.uint8] = self._pages[page]
        return found


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
