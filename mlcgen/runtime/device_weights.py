"""An artifact's weights into a device's memory, through pinned memory, put in the order that kernels read them in."""

import ctypes
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcgen.errors import ArtifactError
from mlcgen.runtime.cpu import usable_cores
from mlcgen.runtime.device import Address, Device
from mlcgen.runtime.plan import ITEM_BYTES

CHUNK = 64 << 20  # bytes of one copy; two are under way
PIECE = 4 << 20  # bytes that a thread reads from the file at a time
FUNCTIONS = ("untile_2", "untile_4", "random_uint8", "random_float16", "random_uint16", "random_float32")


def upload_weights(
    device: Device, specs: Mapping[str, Mapping[str, Any]], weights: Mapping[str, npt.NDArray[Any]]
) -> dict[str, Address]:
    """name -> where it lies on the device. specs: the plan's `weights`."""
    staging = _Staging(device)
    largest = max((_num_bytes(spec) for spec in specs.values() if spec["is_tiled"]), default=0)
    tiled = device.allocate(largest, "weights in the file's order")
    found = {}
    for name, spec in specs.items():
        if weights[name].nbytes != _num_bytes(spec):
            sizes = f"{weights[name].nbytes} bytes, the plan wants {_num_bytes(spec)}"
            raise ArtifactError(f"tensor {name[:80]!r} has {sizes}; compile the model again")
        found[name] = device.allocate(_num_bytes(spec), "weights")
        staging.copy(tiled if spec["is_tiled"] else found[name], weights[name])
        if spec["is_tiled"]:
            _untile(device, spec, tiled, found[name])
    device.synchronize()
    device.free(tiled)
    return found


def make_random_weights(device: Device, specs: Mapping[str, Mapping[str, Any]]) -> dict[str, Address]:
    """Weights for measuring, made on the device: N(0, 0.02) where the order of values does not matter, norms of one."""
    found = {}
    for seed, (name, spec) in enumerate(specs.items()):
        found[name] = device.allocate(_num_bytes(spec), "weights")
        is_norm = len(spec["shape"]) == 1
        mean, deviation = (float("norm" in name), 0.0) if is_norm else _distribution(name)
        args = [
            ctypes.c_uint64(found[name]),
            ctypes.c_int64(prod(spec["shape"])),
            ctypes.c_float(mean),
            ctypes.c_float(deviation),
            ctypes.c_int32(seed),
        ]
        device.launch(f"random_{spec['dtype']}", (1024, 1, 1), 256, 0, args)
    device.synchronize()
    return found


class Random(Mapping[str, npt.NDArray[Any]]):
    """Weights for measuring on devices that make none: the same small block again and again, norms of one."""

    BLOCK = 1 << 20  # values

    def __init__(self, specs: Mapping[str, Mapping[str, Any]]) -> None:
        self._specs = specs
        self._floats = np.random.default_rng(0).standard_normal(self.BLOCK).astype(np.float32)

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        shape, dtype = tuple(self._specs[name]["shape"]), str(self._specs[name]["dtype"])
        if len(shape) == 1:
            return np.full(shape, float("norm" in name), dtype)
        if dtype == "uint8":
            block = self._floats.view(np.uint8)
        else:
            mean, deviation = _distribution(name)
            floats = self._floats * np.float32(deviation) + np.float32(mean)
            block = (floats.view(np.uint32) >> 16).astype(np.uint16) if dtype == "uint16" else floats.astype(dtype)
        return np.resize(block, shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)


def _distribution(name: str) -> tuple[float, float]:
    """(mean, deviation) of a matrix's values, or of its groups' scales and minima."""
    if name.endswith(".scale"):
        return 0.004, 0.0005
    return (-0.03, 0.0005) if name.endswith(".minimum") else (0.0, 0.02)


def _untile(device: Device, spec: Mapping[str, Any], tiled: Address, to: Address) -> None:
    tiles, columns, _ = spec["shape"]
    args = [ctypes.c_uint64(tiled), ctypes.c_uint64(to), ctypes.c_int32(columns)]
    device.launch(f"untile_{ITEM_BYTES[spec['dtype']]}", (-(-columns // 64), tiles, 1), 256, 0, args)


def _num_bytes(spec: Mapping[str, Any]) -> int:
    return prod(spec["shape"]) * ITEM_BYTES[spec["dtype"]]


class _Staging:
    """Two pinned buffers: while one is copied to the device, the other is filled from the file by several threads."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._threads = ThreadPoolExecutor(usable_cores())
        self._buffers = [device.pinned(CHUNK) for _ in range(2)]
        self._turn = 0

    def copy(self, to: Address, array: npt.NDArray[Any]) -> None:
        raw = array.reshape(-1).view(np.uint8)
        for start in range(0, raw.nbytes, CHUNK):
            part = raw[start : start + CHUNK]
            buffer = self._buffers[self._turn][: part.nbytes]
            self._device.wait(self._turn)
            pieces = ((buffer[at : at + PIECE], part[at : at + PIECE]) for at in range(0, part.nbytes, PIECE))
            deque(self._threads.map(lambda piece: np.copyto(*piece), pieces), maxlen=0)
            self._device.upload(to + start, buffer)
            self._device.mark(self._turn)
            self._turn = 1 - self._turn
