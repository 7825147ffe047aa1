"""From a launch plan to its executor: what does not fit the device's memory."""

import base64
import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcgen.errors import DeviceError, TargetError
from mlcgen.runtime import load_plan as loading
from mlcgen.runtime.cuda import CudaDevice
from mlcgen.runtime.load_plan import load_plan

from .fake_driver import FakeDriver, install_cuda

WEIGHT = {"shape": [1 << 20], "dtype": "uint8", "is_tiled": False}


def manifest_of(plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Of an artifact with this plan, which is not checked."""
    plan |= {
        "module": base64.b64encode(b"*").decode(),
        **{"kernels": {}, "storages": [1 << 20], "scratch": 0, "pages": {"layers": 2}, "output": 0},
    }
    monkeypatch.setattr("mlcgen.runtime.load_plan.read_plan", lambda file: plan)
    monkeypatch.setattr("mlcgen.runtime.load_plan.check_fit", lambda *checked: None)
    return {"kv": {"num_layers": 2, "num_kv_heads": 2, "page_size": 16, "head_dim": 64, "dtype": "float16"}}


def test_no_room_for_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = install_cuda(monkeypatch, tmp_path)
    manifest = manifest_of({"weights": {"w": WEIGHT}, "tensors": [{"storage": 0}], "steps": []}, monkeypatch)
    driver.set(memory=2 << 20)
    with pytest.raises(DeviceError, match=r"90% of the GPU's 0\.0 GiB leave no room for KV pages"):
        load_plan("cuda", tmp_path / "plan.json", manifest, None, None, 1, 0.9)
    gc.collect()
    assert driver.live() == {}


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    return install_cuda(monkeypatch, tmp_path)


def layered(num_layers: int) -> dict[str, Any]:
    """A plan of an embedding and layers of one weight each."""
    names = ["embed", *(f"layers.{i}.w" for i in range(num_layers))]
    tensors = [{"kind": "weights", "name": name} for name in names]
    steps = [["k", [i], {}] for i in range(len(names))]
    return {"weights": dict.fromkeys(names, WEIGHT), "tensors": tensors, "steps": steps}


@pytest.mark.parametrize("has_weights", [True, False])
def test_memory_for_weights_is_a_budget(driver: FakeDriver, has_weights: bool) -> None:
    plan = layered(6)
    weights = {name: np.full(1 << 20, i, np.uint8) for i, name in enumerate(plan["weights"])} if has_weights else None
    device = CudaDevice()
    device.load(b"*", ["random_uint8"])
    before = device.memory()[0]
    addresses, stream = loading._weights(device, [plan], weights, 5 << 20, makes_random=True)
    assert sorted(addresses) == sorted(plan["weights"])
    assert before - device.memory()[0] <= (5 << 20) + 16
    assert stream is not None
    assert len(stream.visits) == 4
    if weights:
        device.synchronize()
        found = np.zeros(1, np.uint8)
        for visit in (1, 2):
            stream.reach(stream.visits[visit - 1].first)
            name = f"layers.{stream.visits[visit - 1].first - 1}.w"
            device.download(found, addresses[name])
            assert found[0] == stream.visits[visit - 1].first, name


def test_a_budget_that_is_enough_changes_nothing(driver: FakeDriver) -> None:
    plan = layered(6)
    device = CudaDevice()
    device.load(b"*", ["random_uint8"])
    assert loading._weights(device, [plan], None, 7 << 20, makes_random=True)[1] is None


def test_devices_that_cannot_stream(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    device = CudaDevice()
    monkeypatch.setattr(loading, "StreamingDevice", type(None))
    with pytest.raises(TargetError, match=r"Fake GPU 90 cannot stream weights \(weight_memory\)"):
        loading._stream(device, [layered(3)], {}, [["layers.0.w"]])
