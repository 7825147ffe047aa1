"""From a launch plan to its executor: what does not fit the device's memory."""

import base64
import gc
from pathlib import Path

import pytest

from mlcgen.errors import DeviceError
from mlcgen.runtime.load_plan import load_plan

from .fake_driver import install_cuda


def test_no_room_for_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = install_cuda(monkeypatch, tmp_path)
    weight = {"shape": [1 << 20], "dtype": "uint8", "is_tiled": False}
    plan = {
        "module": base64.b64encode(b"*").decode(),
        **{"kernels": {}, "weights": {"w": weight}, "storages": [1 << 20], "scratch": 0},
        **{"pages": {"layers": 2}, "tensors": [{"storage": 0}], "output": 0, "steps": []},
    }
    monkeypatch.setattr("mlcgen.runtime.plan.read_plan", lambda file: plan)
    monkeypatch.setattr("mlcgen.runtime.plan.check_fit", lambda *checked: None)
    manifest = {"kv": {"num_layers": 2, "num_kv_heads": 2, "page_size": 16, "head_dim": 64, "dtype": "float16"}}
    driver.set(memory=2 << 20)
    with pytest.raises(DeviceError, match=r"90% of the GPU's 0\.0 GiB leave no room for KV pages"):
        load_plan("cuda", tmp_path / "plan.json", manifest, None, None, 1, 0.9)
    gc.collect()
    assert driver.live() == {}
