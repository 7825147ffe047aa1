"""Layers of a mapped file, read ahead and let go of."""

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mlcgen import artifact
from mlcgen.errors import TargetError
from mlcgen.runtime import mapped_layers
from mlcgen.runtime.mapped_layers import MappedLayers

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no such advice")

SIZES = {f"layers.{i}.{part}": size for i in range(4) for part, size in (("norm", 100), ("matrix", 5000), ("bias", 7))}
LAYERS = [[name for name in SIZES if name.startswith(f"layers.{i}.")] for i in range(4)]
READ, DROP = "read", "drop"


class Advice:
    """Instead of the system's: what was asked for, in pages of the file."""

    def __init__(self) -> None:
        self.start, self.given = 0, list[tuple[str, int, int]]()

    def __call__(self, address: int, num_bytes: int, advice: int) -> int:
        assert address % mmap.PAGESIZE == 0
        if advice != mapped_layers._WILL_NEED:
            kind = READ if advice == mapped_layers._POPULATE else DROP
            assert kind == READ or num_bytes % mmap.PAGESIZE == 0
            self.given.append((kind, address - self.start, num_bytes))
        return 0


@pytest.fixture
def advice(monkeypatch: pytest.MonkeyPatch) -> Advice:
    advice = Advice()
    monkeypatch.setattr(mapped_layers, "_madvise", lambda: advice)
    return advice


def stored(folder: Path) -> tuple[Path, dict[str, npt.NDArray[Any]]]:
    file = folder / "model.safetensors"
    writer = artifact.WeightWriter(file, {name: ((size,), "float32") for name, size in SIZES.items()})
    for i, (name, size) in enumerate(SIZES.items()):
        writer.write(name, np.full(size, i, np.float32))
    writer.close()
    return file, artifact.map_weights(file)


def test_one_layer_ahead(advice: Advice, tmp_path: Path) -> None:
    file, weights = stored(tmp_path)
    layers = MappedLayers(file, weights, LAYERS)
    advice.start = min(array.ctypes.data for array in weights.values())
    layer_bytes = [sum(weights[name].nbytes for name in names) for names in LAYERS]
    for layer in (0, 0, 1, 2, 3, 0):
        layers.enter(layer)
    layers._reader.shutdown()
    order = [(kind, round(start / layer_bytes[0])) for kind, start, _ in advice.given]
    reads = [layer for kind, layer in order if kind == READ]
    assert reads == [0, 1, 2, 3, 0, 1]
    ends = [(DROP, 0), (READ, 2), (DROP, 1), (READ, 3), (DROP, 2), (READ, 0), (DROP, 3), (READ, 1)]
    assert order == [(READ, 0), (READ, 1), *ends]
    for kind, _, num_bytes in advice.given:
        assert abs(num_bytes - layer_bytes[0]) < 2 * mmap.PAGESIZE, kind
    assert layers.bytes_loaded >= sum(layer_bytes)


def test_out_of_order(advice: Advice, tmp_path: Path) -> None:
    """No more than two layers stay."""
    file, weights = stored(tmp_path)
    layers = MappedLayers(file, weights, LAYERS)
    advice.start = min(array.ctypes.data for array in weights.values()) // mmap.PAGESIZE * mmap.PAGESIZE
    for layer in (2, 0, 3, 1, 1, 3):
        layers.enter(layer)
    layers._reader.shutdown()
    there = set[int]()
    for kind, start, _ in advice.given:
        (there.add if kind == READ else there.discard)(start // (4 * mmap.PAGESIZE))
        assert len(there) <= 3  # the one that was read ahead in vain goes when the next is read
    assert len(there) == 2


def test_contents_stay(tmp_path: Path) -> None:
    """With the system's own advice."""
    file, weights = stored(tmp_path)
    layers = MappedLayers(file, weights, LAYERS)
    for _ in range(2):
        for layer, names in enumerate(LAYERS):
            layers.enter(layer)
            assert [float(weights[name].max()) for name in names] == [float(list(SIZES).index(n)) for n in names]
    for i, name in enumerate(SIZES):
        assert (weights[name] == i).all()


def test_layers_by_address(tmp_path: Path) -> None:
    file, weights = stored(tmp_path)
    layers = MappedLayers(file, weights, LAYERS[1:3])
    assert layers.layer_at == {weights[n].ctypes.data: i for i in (0, 1) for n in LAYERS[i + 1]}


def test_a_system_without_advice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file, weights = stored(tmp_path)
    monkeypatch.delattr(os, "posix_fadvise")
    with pytest.raises(TargetError, match="weight_memory on a CPU needs Linux"):
        MappedLayers(file, weights, LAYERS)


def test_stretches() -> None:
    """Weights that follow each other with no more between them than alignment."""
    parts = [(1000, 0, 100), (1104, 104, 60), (1300, 300, 5), (1164, 164, 1)]
    assert mapped_layers._joined(parts) == [(1000, 0, 165), (1300, 300, 5)]
