"""HipDevice with a HIP runtime that needs no GPU: what AMD's has of its own. test_driver_device.py tests the rest."""

import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from mlcgen.errors import DeviceError, TargetError
from mlcgen.runtime import hip
from mlcgen.runtime.hip import HipDevice

from .fake_driver import MODULE, FakeDriver, install_hip, numbers, replace_loader


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeDriver:
    return install_hip(monkeypatch, tmp_path)


@pytest.fixture
def device(driver: FakeDriver) -> HipDevice:
    return HipDevice()


def test_what_the_device_is(driver: FakeDriver, device: HipDevice) -> None:
    driver.set(memory=1 << 40)
    assert hip.missing() is None
    assert device.name == "Fake GPU 90"
    assert device.memory() == (1 << 40, 1 << 40)
    assert device.symbols == {"has_f16": 0}
    assert device.largest_binding == 1 << 48


@pytest.mark.parametrize("options", [(), ("-DOLD",)], ids=["ROCm 6", "ROCm 5"])
@pytest.mark.parametrize("arch", ["90a", "942", "1100"])
def test_architecture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: tuple[str, ...], arch: str) -> None:
    install_hip(monkeypatch, tmp_path, *options)
    monkeypatch.setenv("FAKE_HIP_ARCH", arch)
    assert hip.architecture() == f"gfx{arch}"
    assert hip.architecture(1) is None


def test_no_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_loader(monkeypatch, hip, {})
    assert hip.architecture() is None
    assert hip.missing() == "no HIP runtime (libamdhip64) is installed"
    with pytest.raises(TargetError, match=r"no HIP runtime \(libamdhip64\) is installed; run on another target"):
        HipDevice()


def test_no_gpu(driver: FakeDriver) -> None:
    driver.set(devices=0)
    assert hip.architecture() is None
    with pytest.raises(TargetError, match="the HIP runtime finds no GPU; run on another target"):
        HipDevice()


def test_a_runtime_that_does_not_start(driver: FakeDriver) -> None:
    driver.fail("hipInit", 3)
    assert hip.missing() == "the HIP runtime does not start: hipErrorNotInitialized (3)"


def test_launches_of_too_many_threads(device: HipDevice) -> None:
    device.load(MODULE, ["add"])
    says = r"launch of add with grid \(16777216, 1, 1\), 256 threads, 0 bytes failed with hipErrorInvalidValue"
    with pytest.raises(DeviceError, match=says):
        device.launch("add", (1 << 24, 1, 1), 256, 0, numbers(0, 0, 0))


def test_kernels_of_another_gpu(driver: FakeDriver, device: HipDevice) -> None:
    driver.fail("hipModuleLoadData", 209)
    with pytest.raises(DeviceError, match=r"not for this GPU \(gfx90a\); compile the model for it"):
        device.load(MODULE, ["add"])


def test_another_thread_may_use_it(device: HipDevice) -> None:
    """AsyncEngine's does."""
    found: list[npt.NDArray[np.uint8]] = []

    def use() -> None:
        array = np.ones(64, np.uint8)
        device.download(array, device.allocate(64, "numbers"))
        device.synchronize()
        found.append(array)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert not found[0].any()
