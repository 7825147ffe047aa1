"""Weights into the memory of a device, and random ones made there, with a driver that needs no GPU."""

import ctypes
import gc
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcgen.errors import DeviceError
from mlcgen.runtime import device_weights
from mlcgen.runtime.cuda import CudaDevice
from mlcgen.runtime.device_weights import make_random_weights, upload_weights

from .fake_driver import FakeDriver, install_cuda


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeDriver:
    return install_cuda(monkeypatch, tmp_path)


def untile(grid: tuple[int, int, int], block: int, args: bytes) -> None:
    """For elements of two bytes."""
    source, to, columns = struct.unpack("<QQi", args)
    assert block == 256
    assert grid[0] == -(-columns // 64)
    tiles = np.frombuffer(ctypes.string_at(source, grid[1] * columns * 32), np.uint16).reshape(grid[1], columns, 16)
    ctypes.memmove(to, tiles.transpose(0, 2, 1).tobytes(), tiles.nbytes)


def spec(shape: list[int], dtype: str, is_tiled: bool = False) -> dict[str, Any]:
    return {"shape": shape, "dtype": dtype, "is_tiled": is_tiled}


SPECS = {
    "norm": spec([37], "float32"),
    "wide": spec([2, 70, 16], "float16", True),
    "codes": spec([5, 13], "uint8"),
    "narrow": spec([1, 3, 16], "uint16", True),
    "scales": spec([9, 4], "float16"),
}
WEIGHTS_MODULE = b"untile_2(8,8,4) untile_4(8,8,4) " + b" ".join(
    name.encode() + b"(8,8,4,4,4)" for name in device_weights.FUNCTIONS if name.startswith("random")
)


@pytest.mark.parametrize("chunk", [64, 1 << 20])
def test_upload_weights(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(device_weights, "CHUNK", chunk)
    driver.kernels["untile_2"] = untile
    device = CudaDevice()
    device.load(WEIGHTS_MODULE, device_weights.FUNCTIONS)
    random = np.random.default_rng(0)
    weights = {
        name: random.integers(0, 255, np.prod(held["shape"]) * device_weights.ITEM_BYTES[held["dtype"]], np.uint8)
        .view(held["dtype"])
        .reshape(held["shape"])
        for name, held in SPECS.items()
    }
    addresses = upload_weights(device, SPECS, weights)
    assert list(addresses) == list(SPECS)
    assert driver.pending == 0
    for name, array in weights.items():
        is_tiled = SPECS[name]["is_tiled"]
        expected = array.transpose(0, 2, 1).tobytes() if is_tiled else array.tobytes()
        found = np.zeros(array.nbytes, np.uint8)
        device.download(found, addresses[name])
        assert found.tobytes() == expected, name
    assert driver.live()["memory"] == len(SPECS)  # the place for tiles was given back
    del device
    gc.collect()
    assert driver.live() == {}


def test_weights_beyond_memory(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_weights, "CHUNK", 4096)
    driver.set(memory=4096)
    device = CudaDevice()
    with pytest.raises(DeviceError, match="no room for the weights"):
        upload_weights(device, {"w": spec([5000], "uint8")}, {"w": np.zeros(5000, np.uint8)})
    del device
    gc.collect()
    assert driver.live() == {}


def test_random_weights(driver: FakeDriver) -> None:
    given: dict[str, tuple[Any, ...]] = {}

    def kernel(name: str) -> Callable[..., None]:
        return lambda grid, block, args: given.update({name: struct.unpack("<QqffI", args)})

    driver.kernels |= {name: kernel(name) for name in device_weights.FUNCTIONS}
    device = CudaDevice()
    device.load(WEIGHTS_MODULE, device_weights.FUNCTIONS)
    specs = {"norm": spec([37], "float32"), "codes": spec([5, 13], "uint8"), "w.scale": spec([9, 4], "float16")}
    found = make_random_weights(device, specs)
    assert given["random_float32"] == (found["norm"], 37, 1.0, 0.0, 0)
    assert given["random_uint8"] == (found["codes"], 65, 0.0, np.float32(0.02), 1)
    assert given["random_float16"] == (found["w.scale"], 36, np.float32(0.004), np.float32(0.0005), 2)
