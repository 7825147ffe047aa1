"""CudaDevice with a driver that needs no GPU: what NVIDIA's has of its own. test_driver_device.py tests the rest."""

import ctypes
import os
import re
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcgen.errors import DeviceError, TargetError
from mlcgen.runtime import cuda
from mlcgen.runtime.cuda import CudaDevice

from .fake_driver import MODULE, FakeDriver, install_cuda, replace_loader


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeDriver:
    return install_cuda(monkeypatch, tmp_path)


@pytest.fixture
def device(driver: FakeDriver) -> CudaDevice:
    return CudaDevice()


def test_what_the_device_is(driver: FakeDriver) -> None:
    driver.set(arch=120, memory=1 << 40)
    device = CudaDevice()
    assert device.name == "Fake GPU 120"
    assert device.memory() == (1 << 40, 1 << 40)
    assert cuda.compute_capability() == "sm_120"
    assert cuda.missing() is None


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_loader(monkeypatch, cuda, {})
    assert cuda.compute_capability() is None
    assert cuda.missing() == "no NVIDIA driver (libcuda.so.1) is installed"
    with pytest.raises(TargetError, match=r"no NVIDIA driver \(libcuda.so.1\) is installed; run on another target"):
        CudaDevice()


def test_no_gpu(driver: FakeDriver) -> None:
    driver.set(devices=0)
    assert cuda.compute_capability() is None
    with pytest.raises(TargetError, match="the NVIDIA driver finds no GPU; run on another target"):
        CudaDevice()


def test_a_driver_that_does_not_start(driver: FakeDriver) -> None:
    driver.fail("cuInit", 803)
    assert cuda.compute_capability() is None
    driver.fail("cuInit", 803)
    assert "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH (803)" in str(cuda.missing())


def test_a_driver_that_is_too_old(driver: FakeDriver) -> None:
    driver.set(version=12080)
    assert cuda.missing() == "the NVIDIA driver is for CUDA 12.8; install 580 or later"
    with pytest.raises(TargetError, match=r"for CUDA 12\.8; install 580 or later"):
        CudaDevice()


def test_no_such_gpu(driver: FakeDriver) -> None:
    with pytest.raises((TargetError, DeviceError), match="cuDeviceGet failed with CUDA_ERROR_INVALID_DEVICE"):
        CudaDevice(1)


@pytest.mark.parametrize(("arch", "most"), [(80, 163 << 10), (89, 99 << 10), (90, 227 << 10)])
def test_each_function_may_have_all_shared_memory(driver: FakeDriver, arch: int, most: int) -> None:
    driver.set(arch=arch)
    device = CudaDevice()
    device.load(MODULE, ["small", "plain"])
    assert driver.logged("cuFuncSetAttribute") == [f"cuFuncSetAttribute 8 {size}" for size in (most - 1024, most)]
    device.launch("plain", (1, 1, 1), 32, most, [])
    device.launch("small", (1, 1, 1), 32, most - 1024, [ctypes.c_uint64(0)])
    with pytest.raises(DeviceError, match=f"launch of small .* {most - 1023} bytes"):
        device.launch("small", (1, 1, 1), 32, most - 1023, [ctypes.c_uint64(0)])


def test_another_thread_is_told(device: CudaDevice) -> None:
    """A thread has to make the context its own."""
    caught: list[str] = []

    def use() -> None:
        try:
            device.synchronize()
        except DeviceError as error:
            caught.append(str(error))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert caught == ["CUDA: cuStreamSynchronize failed with CUDA_ERROR_INVALID_CONTEXT (201)"]


AT_EXIT = """
import atexit
atexit.register(lambda: print(driver.fake_live(b"context"), driver.fake_live(b"pinned")))  # after all later ones
from mlcgen.runtime import cuda
driver, device = cuda._library(), cuda.CudaDevice()
held = device.pinned(100)
"""


def test_a_device_is_there_until_the_process_ends(driver: FakeDriver, tmp_path: Path) -> None:
    """AsyncEngine's thread may still be in a step, which would crash."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", AT_EXIT], env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("1 1\n", "")


# Tensor maps


def test_layers_that_lie_apart_are_one_copy(driver: FakeDriver, device: CudaDevice) -> None:
    """Two of three pages in each of four layers, on the host between others too."""
    address = device.allocate(4 * 3 * 100, "pages")
    held, sent = (
        device.pinned(4 * 5 * 100).reshape(4, 5, 100),
        np.arange(4 * 2 * 100, dtype=np.uint8).reshape(4, 2, 100),
    )
    held[:] = 7
    held[:, 2:4] = sent
    device.upload_layers(address + 100, 300, held[:, 2:4])
    device.synchronize()
    held[:] = 7
    device.download_layers(held[:, :2], address + 100, 300)
    whole = device.pinned(1200)
    device.download(whole, address)
    device.synchronize()
    assert driver.logged("cuMemcpy3DAsync_v2") == ["cuMemcpy3DAsync_v2 100 2 4"] * 2
    np.testing.assert_array_equal(held[:, :2], sent)
    assert (held[:, 2:] == 7).all()
    pages = whole.reshape(4, 3, 100)
    np.testing.assert_array_equal(pages[:, 1:], sent)
    assert not pages[:, 0].any()


def test_layers_beyond_what_was_allocated(device: CudaDevice) -> None:
    address, held = device.allocate(1200, "pages"), device.pinned(800).reshape(4, 2, 100)
    with pytest.raises(DeviceError, match=r"cuMemcpy3DAsync failed with CUDA_ERROR_INVALID_VALUE"):
        device.download_layers(held, address + 200, 300)


def test_tensor_map(driver: FakeDriver, device: CudaDevice) -> None:
    given: list[bytes] = []
    driver.kernels["mapped"] = lambda grid, block, args: given.append(args)
    device.load(MODULE, ["mapped"])
    address = device.allocate(1 << 16, "weights")
    made = device.tensor_map(address + 16, "float16", (64, 70, 3), (256, 20480), (32, 40, 1), 2)
    assert ctypes.sizeof(made) == 128
    assert device.tensor_map(address + 16, "float16", (64, 70, 3), (256, 20480), (32, 40, 1), 2) is made
    other = device.tensor_map(address, "float16", (64, 70, 3), (256, 20480), (32, 40, 1), 2)
    assert other is not made
    assert len(driver.logged("map")) == 2
    device.launch("mapped", (1, 1, 1), 32, 0, [made, ctypes.c_uint64(5)])
    device.synchronize()
    told = struct.unpack("<16Q", given[0][:128])
    assert told[:5] == (address + 16, 6, 3, 2, 2)  # float16, rank, 64 bytes, promotion to 128
    assert told[5:8] == (64, 70, 3)
    assert told[10:13] == (32, 40, 1)
    assert told[15] == 20480
    assert given[0][128:] == struct.pack("<Q", 5)


@pytest.mark.parametrize(("dtype", "number", "box"), [("uint32", 2, 8), ("float16", 6, 16), ("bfloat16", 9, 64)])
def test_types_of_tensor_maps(driver: FakeDriver, device: CudaDevice, dtype: str, number: int, box: int) -> None:
    device.tensor_map(device.allocate(4096, "one"), dtype, (128,), (), (box,), 0)
    device.tensor_map(device.allocate(4096, "two"), dtype, (128, 8, 1, 1, 1), (512,) * 4, (box, 1, 1, 1, 1), 0)
    assert driver.logged("map") == [f"map {number} rank {rank} dims 128.. box {box}.. swizzle 0" for rank in (1, 5)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"address": 8},
        {"strides": (24,)},
        {"box": (257, 1)},
        {"box": (0, 1)},
        {"box": (64, 1), "swizzle": 1},
        {"dims": (0, 8)},
        {"dims": (64,) * 6, "strides": (128,) * 5, "box": (8,) * 6},
    ],
    ids=str,
)
def test_tensor_maps_that_cannot_be(device: CudaDevice, wrong: dict[str, Any]) -> None:
    right: dict[str, Any] = {"address": 0, "dims": (64, 8), "strides": (128,), "box": (16, 4), "swizzle": 0}
    given = right | wrong
    given["address"] += device.allocate(4096, "weights")
    device.tensor_map(**(given | right | {"address": device.allocate(4096, "weights")}), dtype="float16")
    says = re.escape(f"cuTensorMapEncodeTiled of float16 {given['dims']} in boxes of {given['box']}")
    with pytest.raises(DeviceError, match=f"{says} failed with CUDA_ERROR_INVALID_VALUE"):
        device.tensor_map(**given, dtype="float16")


def test_not_all_tensor_maps_are_kept(device: CudaDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_MAX_MAPS", 4)
    address = device.allocate(4096, "weights")
    for length in range(1, 20):
        device.tensor_map(address, "float16", (64, length), (128,), (16, 1), 0)
        assert len(device._maps) <= 5
