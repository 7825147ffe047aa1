"""Layers of a mapped file, read ahead and let go of."""

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mlcgen import artifact, safetensors
from mlcgen.errors import TargetError
from mlcgen.runtime import mapped_layers
from mlcgen.runtime.mapped_layers import MappedLayers

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no such advice")

SIZES = {"embed": 3000} | {
    f"layers.{i}.{part}": size for i in range(4) for part, size in (("norm", 100), ("matrix", 5000), ("bias", 7))
}
LAYERS = [[name for name in SIZES if name.startswith(f"layers.{i}.")] for i in range(4)]
PAGE = mmap.PAGESIZE
READ, DROP = "read", "drop"


class Advice:
    """Instead of the system's: what was asked for, in pages of the file, which are the blocks here."""

    def __init__(self) -> None:
        self.start, self.given = 0, list[tuple[str, int, int]]()

    def __call__(self, address: int, num_bytes: int, advice: int) -> int:
        assert address % PAGE == 0
        if advice in KINDS:
            first = (address - self.start) // PAGE
            self.given.append((KINDS[advice], first, first - (-num_bytes // PAGE)))
        return 0


KINDS = {mapped_layers._POPULATE: READ, mapped_layers._DONT_NEED: DROP}


@pytest.fixture
def advice(monkeypatch: pytest.MonkeyPatch) -> Advice:
    advice = Advice()
    monkeypatch.setattr(mapped_layers, "_madvise", lambda: advice)
    monkeypatch.setattr(mapped_layers, "BLOCK", PAGE)
    return advice


def stored(folder: Path) -> tuple[Path, dict[str, npt.NDArray[Any]]]:
    file = folder / "model.safetensors"
    writer = artifact.WeightWriter(file, {name: ((size,), "float32") for name, size in SIZES.items()})
    for i, (name, size) in enumerate(SIZES.items()):
        writer.write(name, np.full(size, i, np.float32))
    writer.close()
    return file, artifact.map_weights(file)


def pages(file: Path, names: list[str]) -> set[int]:
    """Pages of the file in which something of these weights is."""
    entries = safetensors.read_entries(file)
    places = [(entries[name].offset, entries[name].offset + entries[name].num_bytes) for name in names]
    return {page for start, end in places for page in range(start // PAGE, -(-end // PAGE))}


def followed(advice: Advice, layers: MappedLayers) -> list[tuple[str, set[int], set[int]]]:
    """(what was done, to which pages, which are in memory then), when the thread has ended."""
    layers._reader.shutdown()
    found, there = [], set[int]()
    for kind, start, end in advice.given:
        some = set(range(start, end))
        there = there | some if kind == READ else there - some
        found.append((kind, some, there))
    return found


def opened(advice: Advice, folder: Path) -> tuple[MappedLayers, Path]:
    file, weights = stored(folder)
    advice.start = weights["embed"].ctypes.data - safetensors.read_entries(file)["embed"].offset
    return MappedLayers(file, weights, LAYERS), file


def test_one_layer_ahead(advice: Advice, tmp_path: Path) -> None:
    layers, file = opened(advice, tmp_path)
    of = [pages(file, names) for names in LAYERS]
    others = pages(file, ["embed"])
    for layer in (0, 0, 1, 2, 3, 0):
        layers.enter(layer)
    done = followed(advice, layers)
    assert done[0][1] >= others  # what stays, once
    reads = [some for kind, some, _ in done[1:] if kind == READ]
    assert reads == [of[i] - others for i in (0, 1, 2, 3, 0, 1)]
    after = [there for kind, _, there in done[1:] if kind == READ]
    for i, there in enumerate(after[1:]):
        assert there >= of[i % 4] | of[(i + 1) % 4] | others
        assert len(there) <= len(of[i % 4] | of[(i + 1) % 4] | done[0][1]) + 1  # a page that the next one has, too
    assert layers.bytes_loaded == PAGE * sum(len(some) for kind, some, _ in done if kind == DROP) + PAGE * len(
        set().union(*(of[i] for i in (0, 1))) - others - of[2]
    )


def test_a_page_of_two_layers_goes_with_the_last(advice: Advice, tmp_path: Path) -> None:
    layers, file = opened(advice, tmp_path)
    of = [pages(file, names) for names in LAYERS]
    assert of[0] & of[1]
    for layer in (0, 1, 2):
        layers.enter(layer)
    dropped = [some for kind, some, _ in followed(advice, layers) if kind == DROP]
    assert dropped == [of[0] - of[1] - pages(file, ["embed"]), of[1] - of[2]]


def test_out_of_order(advice: Advice, tmp_path: Path) -> None:
    """No more than three layers are there at a time, one of them read ahead in vain."""
    layers, file = opened(advice, tmp_path)
    for layer in (2, 0, 3, 1, 1, 3):
        layers.enter(layer)
    done = followed(advice, layers)
    assert all(len(there - done[0][1]) <= 3 * 6 for _, _, there in done)
    assert done[-1][2] >= pages(file, LAYERS[3])


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
    size = mapped_layers.BLOCK
    assert mapped_layers._stretches([7, 3, 4, 4, 9]) == [(3 * size, 2 * size), (7 * size, size), (9 * size, size)]
    assert mapped_layers._stretches([]) == []
