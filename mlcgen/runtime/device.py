"""What executors of launch plans ask of a device."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

Address = int


class Device(Protocol):
    """One device with its memory. What is started runs in order; `synchronize` waits for it."""

    symbols: Mapping[str, int]  # what the plan's sizes may ask of the device, such as has_f16
    largest_binding: int  # bytes of a tensor that a kernel can be given

    @property
    def name(self) -> str: ...

    def memory(self) -> tuple[int, int] | None:
        """(free, total) bytes; None where the device does not tell."""
        ...

    def allocate(self, num_bytes: int, purpose: str) -> Address:
        """Zeroed memory. Raises DeviceError that names the purpose where there is not enough."""
        ...

    def free(self, address: Address) -> None: ...

    def pinned(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Host memory from which copies are as fast as they can be."""
        ...

    def upload(self, to: Address, array: npt.NDArray[Any]) -> None:
        """Start copying; the array must stay as it is until `synchronize`."""
        ...

    def download(self, to: npt.NDArray[Any], source: Address) -> None:
        """Start copying; the array is valid after `synchronize`."""
        ...

    def copy(self, to: Address, source: Address, num_bytes: int) -> None:
        """Start copying within the device's memory."""
        ...

    def mark(self, which: int) -> None:
        """Remember what has been started so far as mark 0 or 1, for `wait`."""
        ...

    def wait(self, which: int) -> None: ...

    def synchronize(self) -> None:
        """Wait for all that was started. Raises DeviceError for what failed in it."""
        ...

    def load(self, module: bytes, names: Sequence[str], prefix: str = "") -> None:
        """A plan's module, with the functions of these names, which are launched by them behind the prefix."""
        ...

    def launch(
        self, name: str, grid: Sequence[int], block: int, shared: int, args: Sequence[Any], overlaps: bool = False
    ) -> None:
        """Start a kernel. args: ctypes values, of addresses c_uint64."""
        ...

    def capture(self) -> AbstractContextManager[Any]:
        """A graph of what is started inside, which is recorded and not run."""
        ...

    def launch_graph(self, graph: Any) -> None: ...


@runtime_checkable
class StridedDevice(Device, Protocol):
    """A device that copies layers which lie apart as one.

    The host's array is (layers, pages, bytes), each layer's pages one after the other; on the device a layer begins
    `stride` bytes after the one before, a multiple of a page's.
    """

    def upload_layers(self, to: Address, stride: int, array: npt.NDArray[np.uint8]) -> None:
        """Start copying; the array must stay as it is until `synchronize`."""
        ...

    def download_layers(self, to: npt.NDArray[np.uint8], source: Address, stride: int) -> None:
        """Start copying; the array is valid after `synchronize`."""
        ...


@runtime_checkable
class StreamingDevice(Device, Protocol):
    """A device that copies beside its kernels. A fence is passed when all is done that was started before it.

    Each may be reached again; who waits, waits for the last time. One that was never reached is passed.
    """

    def fence(self) -> Any: ...

    def reach(self, fence: Any) -> None:
        """The fence is passed when all kernels and copies are done that were started so far, but for prefetches."""
        ...

    def hold(self, fence: Any) -> None:
        """What is started from now on begins when the fence is passed."""
        ...

    def wait_for(self, fence: Any) -> None:
        """Until the fence is passed. Raises DeviceError for what failed before it."""
        ...

    def prefetch(self, to: Address, array: npt.NDArray[Any], after: Any, done: Any) -> None:
        """Start copying pinned memory, beside kernels, when the fence `after` is passed; `done` is reached then."""
        ...
