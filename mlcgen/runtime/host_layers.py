"""Layers of weights in the host's memory, in the order of bytes that a device's kernels read."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcgen.runtime.cpu import usable_cores
from mlcgen.runtime.device import StreamingDevice
from mlcgen.runtime.executor import Uint8
from mlcgen.runtime.plan import ITEM_BYTES

__all__ = ["HostLayers", "LayersInFile", "LayersInMemory", "host_layers", "padded_bytes"]

ALIGNMENT = 256  # bytes, of each weight on the device
PIECE = 4 << 20  # bytes that a thread copies at a time
Specs = Mapping[str, Mapping[str, Any]]


def padded_bytes(spec: Mapping[str, Any]) -> int:
    """Of a weight among others on the device. spec: one of the plan's `weights`."""
    return -(-_num_bytes(spec) // ALIGNMENT) * ALIGNMENT


def host_layers(
    device: StreamingDevice,
    specs: Specs,
    weights: Mapping[str, npt.NDArray[Any]],
    layers: Sequence[Sequence[str]],
    memory: int,
) -> "HostLayers":
    """All in pinned memory where `memory` bytes hold them, else read from the file again and again."""
    needed = sum(padded_bytes(specs[name]) for names in layers for name in names)
    kind = LayersInMemory if needed <= memory else LayersInFile
    return kind(device, specs, weights, layers)


class HostLayers(ABC):
    """What both kinds have in common: how the weights of a layer lie in its block of memory."""

    def __init__(
        self,
        device: StreamingDevice,
        specs: Specs,
        weights: Mapping[str, npt.NDArray[Any]],
        layers: Sequence[Sequence[str]],
    ) -> None:
        self._device, self._specs, self._weights, self._layers = device, specs, weights, layers
        self.num_layers = len(layers)
        self._threads = ThreadPoolExecutor(usable_cores())
        self.slot_bytes = max(self._layer_bytes(layer) for layer in range(len(layers)))

    @abstractmethod
    def take(self, layer: int, done: Any) -> Uint8:
        """The layer in pinned memory, which stays as it is until the fence `done` is passed, reached after the call."""

    def offsets(self, layer: int) -> dict[str, int]:
        """Byte of the block where each weight begins."""
        found, end = {}, 0
        for name in self._layers[layer]:
            found[name], end = end, end + padded_bytes(self._specs[name])
        return found

    def _layer_bytes(self, layer: int) -> int:
        return sum(padded_bytes(self._specs[name]) for name in self._layers[layer])

    def _fill(self, layer: int, block: Uint8) -> Uint8:
        pieces = []
        for name, start in self.offsets(layer).items():
            spec = self._specs[name]
            pieces += _pieces(block[start : start + _num_bytes(spec)], self._weights[name], spec)
        deque(self._threads.map(lambda piece: np.copyto(*piece), pieces), maxlen=0)
        return block[: self._layer_bytes(layer)]


class LayersInMemory(HostLayers):
    """Pinned memory for all of them."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        device = self._device
        self._blocks = [self._fill(i, device.pinned(self._layer_bytes(i))) for i in range(self.num_layers)]

    def take(self, layer: int, done: Any) -> Uint8:
        """See HostLayers.take."""
        return self._blocks[layer]


class LayersInFile(HostLayers):
    """Two pinned blocks in turns: while one is copied to the device, a thread reads the next layer into the other."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._blocks = [self._device.pinned(self.slot_bytes) for _ in range(2)]
        self._busy: list[Any] = [None, None]  # the fence after which each may be written
        self._turn = 0
        self._reader = ThreadPoolExecutor(1)
        self._ahead: tuple[int, Future[Uint8]] | None = None

    def take(self, layer: int, done: Any) -> Uint8:
        """See HostLayers.take. Waits for the file."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == layer:
            filled = ahead[1].result()
        else:  # the first, or after a step that failed
            if ahead is not None:
                wait([ahead[1]])
            filled = self._fill(layer, self._free_block())
        self._busy[self._turn] = done
        self._turn = 1 - self._turn
        following = (layer + 1) % self.num_layers
        self._ahead = following, self._reader.submit(self._fill, following, self._free_block())
        return filled

    def _free_block(self) -> Uint8:
        if self._busy[self._turn] is not None:
            self._device.wait_for(self._busy[self._turn])
            self._busy[self._turn] = None
        return self._blocks[self._turn]


def _num_bytes(spec: Mapping[str, Any]) -> int:
    return prod(spec["shape"]) * ITEM_BYTES[spec["dtype"]]


def _pieces(to: Uint8, array: npt.NDArray[Any], spec: Mapping[str, Any]) -> list[tuple[npt.NDArray[Any], ...]]:
    """(to, from) of copies that together put an array in the kernels' order; see cuda_kernels' untile."""
    if not spec["is_tiled"]:
        raw = array.reshape(-1).view(np.uint8)
        return [(to[at : at + PIECE], raw[at : at + PIECE]) for at in range(0, raw.nbytes, PIECE)]
    tiles, columns, _ = spec["shape"]
    rows = to.view(array.dtype).reshape(tiles, 16, columns)
    step = max(1, PIECE // array[0].nbytes)
    return [(rows[i : i + step], array[i : i + step].transpose(0, 2, 1)) for i in range(0, tiles, step)]
