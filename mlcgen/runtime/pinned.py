"""Host memory for what is copied to a device and back, growing with what is asked of it."""

from mlcgen.runtime.device import Device
from mlcgen.runtime.executor import Float32


class Mirrored:
    """Memory of the device with pinned memory of the host for its contents."""

    def __init__(self, device: Device, num_bytes: int, purpose: str) -> None:
        self._device, self._purpose = device, purpose
        self._allocate(num_bytes)

    def reserve(self, num_bytes: int) -> None:
        """Room for this much; the contents may be lost."""
        if num_bytes > len(self.host):
            self._device.free(self.address)
            self._allocate(power_of_two(num_bytes))

    def upload(self, num_bytes: int) -> None:
        self._device.upload(self.address, self.host[:num_bytes])

    def download(self, num_bytes: int) -> None:
        self._device.download(self.host[:num_bytes], self.address)

    def _allocate(self, num_bytes: int) -> None:
        num_bytes = -(-num_bytes // 16) * 16
        self.address = self._device.allocate(num_bytes, self._purpose)
        self.host = self._device.pinned(num_bytes)


class PinnedRows:
    """Host memory for rows of floats, as many as were ever asked for."""

    def __init__(self, device: Device, width: int) -> None:
        self._device, self._width = device, width
        self._held = device.pinned(0)[:0].view("float32").reshape(0, width)

    def rows(self, count: int) -> Float32:
        if count > len(self._held):
            num_bytes = power_of_two(count) * self._width * 4
            self._held = self._device.pinned(num_bytes)[:num_bytes].view("float32").reshape(-1, self._width)
        return self._held[:count]


def power_of_two(value: int) -> int:
    """The smallest one that is not smaller."""
    return 1 << max(value - 1, 0).bit_length()
