"""Layers through a ring of buffers, on a driver that runs copies as late, or as early, as their waits allow."""

import ctypes
import gc
import re
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mlcgen.errors import ArtifactError, DeviceError
from mlcgen.runtime import host_layers
from mlcgen.runtime.driver_device import DriverDevice
from mlcgen.runtime.host_layers import HostLayers, LayersInFile, LayersInMemory
from mlcgen.runtime.layer_stream import LayerStream, Visit, find_visits

from .fake_driver import Cuda, FakeDriver, Hip, Kernel, numbers

NORM = {"shape": [3], "dtype": "float32", "is_tiled": False}
CODES = {"shape": [2, 2, 16], "dtype": "float32", "is_tiled": True}


@pytest.fixture(params=["CUDA", "HIP"])
def api(request: pytest.FixtureRequest) -> Cuda:
    return {"CUDA": Cuda(), "HIP": Hip()}[request.param]


@pytest.fixture(params=[0, 1], ids=["late", "early"])
def driver(request: pytest.FixtureRequest, api: Cuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeDriver:
    driver = api.install(monkeypatch, tmp_path)
    driver.set(ahead=request.param)
    return driver


def names(layer: int) -> tuple[str, str]:
    return f"{layer}.norm", f"{layer}.codes"


class Model:
    """A plan of layers, each read by two kernels, with a kernel between some that reads what stays."""

    def __init__(self, device: DriverDevice, num_layers: int, kind: type[HostLayers]) -> None:
        self.device, self.seen = device, list[tuple[int, float]]()
        layers = [names(i) for i in range(num_layers)]
        specs = {name: spec for layer in layers for name, spec in zip(layer, (NORM, CODES), strict=True)}
        self.weights = {name: self._array(spec, i) for i, (name, spec) in enumerate(specs.items())}
        self.plan = {
            "tensors": [{"kind": "input"}, *({"kind": "weights", "name": name} for name in specs)],
            "steps": [step for i in range(num_layers) for step in self._steps(i)],
        }
        device.load(b"look(8,8,4)", ["look"])
        self.visits = find_visits(self.plan, layers)
        self.stream = LayerStream(device, self.visits, kind(device, specs, self.weights, layers))
        self.addresses = self.stream.addresses()

    @staticmethod
    def _array(spec: dict[str, Any], seed: int) -> npt.NDArray[np.float32]:
        return np.random.default_rng(seed).random(spec["shape"], np.float32)

    @staticmethod
    def _steps(layer: int) -> list[list[Any]]:
        norm, codes = 1 + 2 * layer, 2 + 2 * layer
        resident = [["plain", [0], {}]] if layer % 2 else []
        return [["look", [0, norm], {}], *resident, ["look", [codes], {}], *resident]

    def run(self, until: int | None = None) -> list[bool]:
        """A step, or its beginning. Returns which kernels waited."""
        waits = []
        for index, (kernel, tensors, _) in enumerate(self.plan["steps"][:until]):
            waits.append(self.stream.reach(index))
            if kernel == "look":
                name = self.plan["tensors"][tensors[-1]]["name"]
                at = int(name.split(".")[0]), int(name.endswith("codes"))
                self.device.launch("look", (1, 1, 1), 32, 0, numbers(self.addresses[name], at[0] * 2 + at[1], 0))
        if until is None:
            self.stream.reach(len(self.plan["steps"]))
        return waits


def look(weights: dict[str, npt.NDArray[Any]], seen: list[tuple[int, float]]) -> Kernel:
    """The kernel: are the weights there that it is to read, in its order?"""

    def run(grid: tuple[int, int, int], block: int, args: bytes) -> None:
        address, which, _ = struct.unpack("<QQi", args)
        array = weights[names(which // 2)[which % 2]]
        expected = array.transpose(0, 2, 1) if which % 2 else array
        found = np.frombuffer(ctypes.string_at(address, array.nbytes), np.float32)
        seen.append((which, float(np.abs(found - expected.reshape(-1)).max())))

    return run


def model(driver: FakeDriver, api: Cuda, num_layers: int, kind: type[HostLayers]) -> Model:
    made = Model(api.open(), num_layers, kind)
    driver.kernels["look"] = look(made.weights, made.seen)
    return made


KINDS = pytest.mark.parametrize("kind", [LayersInMemory, LayersInFile])


@KINDS
@pytest.mark.parametrize("num_layers", [3, 4, 5])
def test_kernels_find_their_weights(driver: FakeDriver, api: Cuda, num_layers: int, kind: type[HostLayers]) -> None:
    made = model(driver, api, num_layers, kind)
    for _ in range(3):
        made.run()
    made.device.synchronize()
    assert made.seen == [(which, 0.0) for _ in range(3) for which in range(2 * num_layers)]
    moving = num_layers if num_layers > 3 else 2  # of three, one has a buffer for itself
    assert made.stream.bytes_loaded == 512 * (3 * moving + 2)


def test_one_copy_for_a_layer_of_a_step(driver: FakeDriver, api: Cuda) -> None:
    made = model(driver, api, 4, LayersInMemory)
    copies = len(driver.logged("cuMemcpyHtoDAsync_v2"))
    made.run()
    assert driver.logged("cuMemcpyHtoDAsync_v2")[copies:] == ["cuMemcpyHtoDAsync_v2 512"] * 4


def test_only_kernels_at_a_border_wait(driver: FakeDriver, api: Cuda) -> None:
    """Layer 1: its first kernel, and the one after its last."""
    made = model(driver, api, 3, LayersInMemory)
    assert made.run() == [True, False, True, False, False, True, True, False]


def unordered(self: DriverDevice, to: int, array: npt.NDArray[Any], after: object, done: Any) -> None:
    PREFETCH(self, to, array, self.fence(), done)


PREFETCH = DriverDevice.prefetch


@pytest.mark.parametrize(
    ("missing", "instead", "kind", "when"),
    [
        ("hold", lambda *_: None, LayersInMemory, "late"),
        ("prefetch", unordered, LayersInMemory, "early"),
        ("wait_for", lambda *_: None, LayersInFile, "late"),
    ],
)
def test_a_missing_wait_shows(
    api: Cuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str, instead: Any, kind: Any, when: str
) -> None:
    """The fake driver finds each race in one of its orders."""
    driver = api.install(monkeypatch, tmp_path)
    driver.set(ahead=int(when == "early"))
    monkeypatch.setattr(DriverDevice, missing, instead)
    made = model(driver, api, 5, kind)
    for _ in range(2):
        made.run()
    made.device.synchronize()
    assert any(error for _, error in made.seen)


@KINDS
def test_a_step_that_fails(driver: FakeDriver, api: Cuda, kind: type[HostLayers]) -> None:
    """The next one begins anew, whatever is in the buffers."""
    made = model(driver, api, 5, kind)
    for until in (1, 4, 9):
        made.run(until)
    driver.fail(api.symbol("cuMemcpyHtoDAsync_v2"))
    with pytest.raises(DeviceError):
        made.run()
    made.device.synchronize()
    made.seen.clear()
    made.run()
    made.device.synchronize()
    assert made.seen == [(which, 0.0) for which in range(10)]


@KINDS
def test_all_is_given_back(driver: FakeDriver, api: Cuda, kind: type[HostLayers]) -> None:
    made = model(driver, api, 3, kind)
    made.run()
    del made
    for _ in range(500):  # the thread that reads ahead may be about to let go
        gc.collect()
        if not driver.live():
            break
        time.sleep(0.01)
    assert driver.live() == {}


def test_pinned_memory_is_bounded(driver: FakeDriver, api: Cuda) -> None:
    device = api.open()
    specs = {name: spec for i in range(4) for name, spec in zip(names(i), (NORM, CODES), strict=True)}
    weights = {name: Model._array(spec, 0) for name, spec in specs.items()}
    layers = [names(i) for i in range(4)]
    for memory, kind, blocks in ((4 * 512, LayersInMemory, 4), (4 * 512 - 1, LayersInFile, 2)):
        before = driver.live().get("pinned", 0)
        made = host_layers.host_layers(device, specs, weights, layers, memory)
        assert type(made) is kind
        assert driver.live()["pinned"] - before == blocks


def plan_of(*steps: list[str]) -> dict[str, Any]:
    """Kernels that read weights of these names."""
    tensors = sorted({name for step in steps for name in step})
    indices = [[tensors.index(name) for name in step] for step in steps]
    return {"tensors": [{"kind": "weights", "name": n} for n in tensors], "steps": [["k", i, {}] for i in indices]}


def test_visits() -> None:
    plan = plan_of(["x"], ["a"], ["a", "b"], ["x"], ["c"], ["a"], ["x"])
    assert find_visits(plan, [["a", "b"], ["c"]]) == [Visit(0, 1, 3), Visit(1, 4, 5), Visit(0, 5, 6)]
    with pytest.raises(ArtifactError, match=re.escape("k reads weights of several layers")):
        find_visits(plan_of(["a", "c"]), [["a"], ["c"]])


def test_layers_in_another_order_than_theirs(driver: FakeDriver, api: Cuda) -> None:
    """A layer that is read twice in a step, and its buffer's other layer in between."""
    device = api.open()
    specs = {f"{i}.w": NORM for i in range(3)}
    weights = {name: np.full(3, i, np.float32) for i, name in enumerate(specs)}
    plan = plan_of(["2.w"], ["0.w"], ["2.w"], ["1.w"])
    layers = [[name] for name in specs]
    for kind in (LayersInMemory, LayersInFile):
        stream = LayerStream(device, find_visits(plan, layers), kind(device, specs, weights, layers))
        found = [device.pinned(12).view(np.float32) for _ in range(8)]
        for index in range(8):
            stream.reach(index % 4)
            device.download(found[index], stream.addresses()[plan["tensors"][plan["steps"][index % 4][1][0]]["name"]])
            if index == 3:
                stream.reach(4)
        device.synchronize()
        assert [float(array[0]) for array in found] == [2, 0, 2, 1] * 2


def test_two_plans_have_the_same_layers_on_their_way(driver: FakeDriver, api: Cuda) -> None:
    """A step of either may follow one of the other, whose kernels are at other places."""
    device = api.open()
    specs = {f"{i}.w": NORM for i in range(3)}
    weights = {name: np.full(3, i, np.float32) for i, name in enumerate(specs)}
    layers = [[name] for name in specs]
    plans = plan_of(["0.w"], ["1.w"], ["2.w"]), plan_of(["x"], ["0.w"], ["x"], ["1.w"], ["2.w"], ["x"])
    visits = [find_visits(plan, layers) for plan in plans]
    source = LayersInMemory(device, specs, weights, layers)
    stream = LayerStream(device, visits[0], source, visits[1])
    for which in (0, 1, 1, 0, 0, 1):
        found = []
        for index, (_, tensors, _) in enumerate(plans[which]["steps"]):
            stream.reach(index, bool(which))
            name = plans[which]["tensors"][tensors[0]]["name"]
            if name in specs:
                found.append(device.pinned(12).view(np.float32))
                device.download(found[-1], stream.addresses()[name])
        stream.reach(len(plans[which]["steps"]), bool(which))
        device.synchronize()
        assert [float(array[0]) for array in found] == [0, 1, 2]
    other = find_visits(plan_of(["1.w"], ["0.w"], ["2.w"]), layers)
    with pytest.raises(ArtifactError, match="for adapters reads layers in another order; compile"):
        LayerStream(device, visits[0], source, other)
