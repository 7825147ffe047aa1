"""Layers of weights on their way through a ring of buffers on the device, each before the kernels that read it.

Copies run beside kernels, in the order in which a step reads the layers; the last of a step are followed by the first
of the next. A layer has one buffer for good, so its addresses do not change. Two fences per buffer keep the order: what
reads waits until it is loaded, and what overwrites until all who read have ended.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlcgen.errors import ArtifactError
from mlcgen.runtime.device import Address, StreamingDevice
from mlcgen.runtime.host_layers import HostLayers
from mlcgen.runtime.offload import SLOTS

__all__ = ["LayerStream", "Visit", "find_visits"]


@dataclass(frozen=True)
class Visit:
    """A stretch of a plan's steps, [first, end), in which one streamed layer is read and no other."""

    layer: int
    first: int
    end: int


def find_visits(plan: Mapping[str, Any], layers: Sequence[Sequence[str]]) -> list[Visit]:
    """In order. layers: names of each one's weights. Raises ArtifactError where a kernel reads two of them at once."""
    owner = {name: layer for layer, names in enumerate(layers) for name in names}
    visits: list[Visit] = []
    for index, (kernel, tensors, _) in enumerate(plan["steps"]):
        read = {owner.get(plan["tensors"][tensor].get("name")) for tensor in tensors} - {None}
        if len(read) > 1:
            raise ArtifactError(f"{kernel[:80]} reads weights of several layers, which cannot be streamed")
        for layer in read:
            assert layer is not None
            if visits and visits[-1].layer == layer:
                visits[-1] = Visit(layer, visits[-1].first, index + 1)
            else:
                visits.append(Visit(layer, index, index + 1))
    return visits


class _Slot:
    """A buffer, and the layer that is in it or on its way."""

    def __init__(self, device: StreamingDevice, num_bytes: int) -> None:
        self.address: Address = device.allocate(num_bytes, "weights that are streamed")
        self.loaded, self.released = device.fence(), device.fence()
        self.layer: int | None = None


class LayerStream:
    """The layers that do not stay on the device. Call `reach` before each of a step's kernels, and after the last."""

    def __init__(
        self, device: StreamingDevice, visits: Sequence[Visit], source: HostLayers, adapted: Sequence[Visit] = ()
    ) -> None:
        """adapted: of the plan with the path of adapters, to the same layers in the same order."""
        if adapted and [visit.layer for visit in adapted] != [visit.layer for visit in visits]:
            raise ArtifactError("the launch plan for adapters reads layers in another order; compile the model again")
        self.visits = tuple(visits)
        self._device, self._source = device, source
        self._slots = [_Slot(device, source.slot_bytes) for _ in range(SLOTS)]
        self._entered = [{visit.first: visit.layer for visit in each} for each in (visits, adapted)]
        self._left = [{visit.end: i for i, visit in enumerate(each)} for each in (visits, adapted)]
        self._next = [self._next_in_slot(i) for i in range(len(visits))]
        self.bytes_loaded = 0  # since the beginning
        for layer in [v.layer for v in visits[:SLOTS]]:
            self._load(layer)

    def addresses(self) -> dict[str, Address]:
        """Where each weight is while its layer is read."""
        found: dict[str, Address] = {}
        for layer in range(self._source.num_layers):
            start = self._slot(layer).address
            found |= {name: start + offset for name, offset in self._source.offsets(layer).items()}
        return found

    def reach(self, index: int, is_adapted: bool = False) -> bool:
        """A step's kernel of this number comes next. True: it has to wait for the end of what came before it."""
        left, entered = self._left[is_adapted].get(index), self._entered[is_adapted].get(index)
        if left is not None:
            self._leave(left)
        if entered is not None:
            if self._slot(entered).layer != entered:  # as after a step that failed
                self._load(entered)
            self._device.hold(self._slot(entered).loaded)
        return left is not None or entered is not None

    def _leave(self, visit: int) -> None:
        """The next layer that wants the buffer is copied as soon as the kernels so far have ended."""
        if self._next[visit] != self.visits[visit].layer:
            self._load(self._next[visit])

    def _load(self, layer: int) -> None:
        slot = self._slot(layer)
        slot.layer = None  # until nothing can fail any more
        self._device.reach(slot.released)
        block = self._source.take(layer, slot.loaded)
        self._device.prefetch(slot.address, block, slot.released, slot.loaded)
        slot.layer = layer
        self.bytes_loaded += block.nbytes

    def _slot(self, layer: int) -> _Slot:
        return self._slots[layer % SLOTS]

    def _next_in_slot(self, i: int) -> int:
        following = [*self.visits[i + 1 :], *self.visits[: i + 1]]
        return next(visit.layer for visit in following if visit.layer % SLOTS == self.visits[i].layer % SLOTS)
