"""Pages on the host are bit by bit what they were, are moved in few copies, and only moving them is measured."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlcgen.errors import DeviceError
from mlcgen.runtime import host_pages, page_mover
from mlcgen.runtime.host_pages import FilePages, MemoryPages
from mlcgen.runtime.kv_cache import stretches
from mlcgen.runtime.options import EngineOptions
from mlcgen.runtime.page_mover import PageMover
from mlcgen.runtime.plan_executor import PlanExecutor
from mlcgen.runtime.scheduler import Transfer

from .fake_driver import Cuda, Hip
from .test_plan_file import MANIFEST, PLAN

LAYERS, NUM_PAGES, LAYER_BYTES = 3, 8, 512


class Pages:
    """An executor's pages, and what was asked of it."""

    num_pages, page_shape = NUM_PAGES, (LAYERS, LAYER_BYTES)

    def __init__(self) -> None:
        self.contents = np.random.default_rng(0).integers(0, 256, (LAYERS, NUM_PAGES, LAYER_BYTES), dtype=np.uint8)
        self.seconds = 0.0  # the time, which only passes here
        self.can_pin = True

    def pinned(self, num_bytes: int) -> np.ndarray:
        self.seconds += 1000
        if not self.can_pin:
            raise DeviceError("no room")
        return np.zeros(num_bytes + 5, np.uint8)

    def copy_page(self, source: int, to: int) -> None:
        self.contents[:, to] = self.contents[:, source]

    def read_pages(self, pages: Sequence[int], host: np.ndarray, places: Sequence[int]) -> None:
        self.seconds += len(pages)
        host[:, list(places)] = self.contents[:, list(pages)]

    def write_pages(self, pages: Sequence[int], host: np.ndarray, places: Sequence[int]) -> None:
        self.seconds += len(pages)
        self.contents[:, list(pages)] = host[:, list(places)]

    def synchronize(self) -> None:
        self.seconds += 1000


def copies(api: Cuda, way: str, *counts: int) -> list[str]:
    """What a driver is asked for to move pages that are neighbours, so many each time."""
    if api.title == "CUDA":
        return [f"cuMemcpy3DAsync_v2 {LAYER_BYTES} {count} {LAYERS}" for count in counts]
    return [f"cuMemcpy{way}Async_v2 {count * LAYER_BYTES}" for count in counts for _ in range(LAYERS)]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9))))
def test_stretches(pairs: list[tuple[int, int]]) -> None:
    pages, places = [page for page, _ in pairs], [place for _, place in pairs]
    found = list(stretches(pages, places))
    assert [(page + i, place + i) for page, place, count in found for i in range(count)] == pairs
    for (page, place, count), (next_page, next_place, _) in itertools.pairwise(found):
        assert (page + count, place + count) != (next_page, next_place), "as long as they can be"


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("per_block", [1, 2, 3, 100])
def test_saved_pages_are_bit_exact(
    in_file: bool, per_block: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(host_pages, "BLOCK_BYTES", per_block * LAYERS * LAYER_BYTES)
    executor = Pages()
    before = executor.contents.copy()
    pages = FilePages(executor, 12, tmp_path / "swap") if in_file else MemoryPages(executor)  # type: ignore[arg-type]
    for chosen, places in (([1, 2, 3], [4, 5, 6]), ([0, 7, 5], [11, 3, 0])):
        pages.reserve(places)
        pages.save(chosen, places)
    executor.contents[:] = 0
    pages.load([3, 4, 0, 6, 11, 5], [7, 1, 5, 3, 0, 2])
    kept = [0, 1, 2, 3, 5, 7]
    assert (executor.contents[:, kept] == before[:, kept]).all()
    assert not executor.contents[:, [4, 6]].any()
    assert list(tmp_path.iterdir()) == [], "the file has no name while it is used"


def test_pages_without_pinned_memory() -> None:
    executor = Pages()
    executor.can_pin, before = False, executor.contents.copy()
    pages = MemoryPages(executor)  # type: ignore[arg-type]
    pages.reserve([0])
    pages.save([2], [0])
    pages.load([0], [5])
    assert (executor.contents[:, 5] == before[:, 2]).all()


def test_a_swap_file_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"cannot make the swap file .*none.*; choose another swap_file"):
        FilePages(Pages(), 1, tmp_path / "none" / "swap")  # type: ignore[arg-type]
    (taken := tmp_path / "taken").write_text("mine")
    with pytest.raises(DeviceError, match="cannot make the swap file"):
        FilePages(Pages(), 1, taken)  # type: ignore[arg-type]
    assert taken.read_text() == "mine"


@pytest.mark.parametrize("in_file", [False, True])
def test_a_mover_keeps_the_order_and_measures_what_it_moves(
    in_file: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    executor = Pages()
    monkeypatch.setattr(page_mover, "time", SimpleNamespace(perf_counter=lambda: executor.seconds))
    options = EngineOptions(swap_bytes=4 * LAYERS * LAYER_BYTES, swap_file=tmp_path / "swap" if in_file else None)
    mover = PageMover(executor, options)  # type: ignore[arg-type]
    assert mover.num_host_pages == 4
    before = executor.contents.copy()
    moves = [("save", 1, 0), ("save", 2, 1), ("copy", 3, 1), ("copy", 1, 2), ("load", 0, 3), ("save", 2, 0)]
    mover.move([Transfer(kind, source, to) for kind, source, to in [*moves, ("load", 0, 4), ("load", 1, 5)]])  # type: ignore[arg-type]
    for page, was in enumerate([0, 3, 3, 1, 3, 2, 6, 7]):
        assert (executor.contents[:, page] == before[:, was]).all()
    assert (mover.num_saved, mover.num_loaded, mover.seconds) == (3, 3, 6.0)
    for _ in range(100):
        mover.move([Transfer("save", 0, 0), Transfer("save", 1, 3)])
    assert mover.rates.page_seconds == pytest.approx(1.0), "neither pinning memory nor steps that were under way"


@pytest.mark.parametrize("api", [Cuda(), Hip()], ids=lambda api: api.title)
def test_pages_of_a_gpu_are_moved_together(api: Cuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver = api.install(monkeypatch, tmp_path)
    device = api.open()
    plan = PLAN | {"pages": PLAN["pages"] | {"layers": LAYERS}}
    executor = PlanExecutor(device, plan, MANIFEST, dict.fromkeys(PLAN["weights"], 1 << 20), NUM_PAGES)
    assert executor.page_shape == (LAYERS, LAYER_BYTES)
    contents = np.random.default_rng(1).integers(0, 256, (LAYERS, NUM_PAGES, LAYER_BYTES), dtype=np.uint8)
    host = executor.pinned(contents.nbytes).reshape(contents.shape)
    host[:] = contents
    every = range(NUM_PAGES)
    executor.write_pages(every, host, every)
    host[:] = 0
    before = len(driver.log)
    executor.read_pages([4, 5, 6, 1, 0], host, [0, 1, 2, 4, 5])
    assert (host[:, [0, 1, 2, 4, 5]] == contents[:, [4, 5, 6, 1, 0]]).all()
    assert not host[:, [3, 6, 7]].any()
    assert driver.log[before:] == [*copies(api, "DtoH", 3, 1, 1), "cuStreamSynchronize"]
    before = len(driver.log)
    executor.write_pages([2, 3], host, [4, 5])
    assert driver.log[before:] == [*copies(api, "HtoD", 2), "cuStreamSynchronize"]
    executor.read_pages(every, host, every)
    assert (host == contents[:, [0, 1, 1, 0, 4, 5, 6, 7]]).all()
