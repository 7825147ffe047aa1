"""Which tokens stay of a text that fills its window, and whether their keys are turned to where they are now."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlcgen.runtime.heavy_hitters import Cells, KeyLayout, heavy_hitters, key_norms, move_together

NUMBERS = {"float32": np.float32, "float16": np.float16, "uint16": ml_dtypes.bfloat16}
LAYERS = 2


@given(st.data(), st.integers(0, 5), st.integers(6, 40), st.integers(0, 60))
def test_the_first_the_last_and_the_lightest_stay(data: st.DataObject, sinks: int, kept: int, more: int) -> None:
    values = data.draw(st.lists(st.floats(0, 9, width=32), min_size=kept + more, max_size=kept + more))
    norms = np.array(values, np.float32)
    places = heavy_hitters(norms, kept, sinks).tolist()
    assert len(places) == kept
    assert sorted(set(places)) == places
    last = min(kept // 2, kept - sinks)
    assert places[:sinks] == list(range(sinks))
    assert places[kept - last :] == list(range(len(norms) - last, len(norms)))
    gone = set(range(len(norms))) - set(places)
    chosen = places[sinks : kept - last]
    assert not (gone and chosen) or norms[chosen].max() <= norms[list(gone)].min()


def plain_rotation(keys: np.ndarray, positions: np.ndarray, inv_freq: tuple[float, ...]) -> np.ndarray:
    """keys: (tokens, heads, head_dim), as in float64 by complex numbers."""
    half = keys.shape[-1] // 2
    pairs = (keys[..., :half] + 1j * keys[..., half:]) * np.exp(1j * np.outer(positions, inv_freq))[:, None]
    return np.concatenate([pairs.real, pairs.imag], -1)


def random_cells(layout: KeyLayout, num_tokens: int, rng: np.random.Generator) -> tuple[Cells, np.ndarray]:
    """Keys rotated to their positions, and keys (layer, token, head, dim) before that. Slots of no token are NaN."""
    number = NUMBERS[layout.dtype]
    shape = (LAYERS, -(-num_tokens // layout.page_size), 2, layout.num_kv_heads, layout.page_size, layout.head_dim)
    cells = np.full(shape, np.nan, number)
    keys = rng.standard_normal((LAYERS, num_tokens, layout.num_kv_heads, layout.head_dim))
    for layer in range(LAYERS):
        turned = plain_rotation(keys[layer], np.arange(num_tokens), layout.inv_freq)
        for t in range(num_tokens):
            page, row = divmod(t, layout.page_size)
            cells[layer, page, 0, :, row] = turned[t]
            cells[layer, page, 1, :, row] = rng.standard_normal(turned[t].shape)
    return cells.view(layout.dtype), keys


def token_of(cells: Cells, layout: KeyLayout, layer: int, t: int) -> np.ndarray:
    """(2, heads, head_dim)"""
    page, row = divmod(t, layout.page_size)
    return np.asarray(cells[layer, page, :, :, row])


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize(("page_size", "num_tokens"), [(1, 9), (16, 70), (16, 64), (256, 33)])
def test_keys_are_those_of_the_new_positions(dtype: str, page_size: int, num_tokens: int) -> None:
    rng = np.random.default_rng()
    layout = KeyLayout(3, page_size, 8, dtype, (1.0, 0.3, 0.01, 1e-4))
    cells, keys = random_cells(layout, num_tokens, rng)
    places = np.sort(rng.choice(num_tokens, max(num_tokens // 2, 1), replace=False)).astype(np.int32)
    places[0] = 0
    moved = move_together(cells, places, layout)
    assert moved.shape[1] == -(-len(places) // page_size)
    assert np.isfinite(moved.view(NUMBERS[dtype]).astype(np.float64)).all()
    eps = float(ml_dtypes.finfo(NUMBERS[dtype]).eps)
    for layer in range(LAYERS):
        expected = plain_rotation(keys[layer, places], np.arange(len(places)), layout.inv_freq)
        for now, place in enumerate(places):
            before, after = (token_of(c, layout, layer, t) for c, t in ((cells, place), (moved, now)))
            np.testing.assert_array_equal(after[1], before[1])
            if now == place:
                np.testing.assert_array_equal(after[0], before[0])
            found = after[0].view(NUMBERS[dtype]).astype(np.float64)
            # Of a pair, both were rounded, and are again.
            half = layout.head_dim // 2
            size = np.hypot(expected[now][:, :half], expected[now][:, half:])
            assert (np.abs(found - expected[now]) <= 3 * eps * np.tile(size, 2) + 1e-6).all()


@pytest.mark.parametrize("dtype", NUMBERS)
def test_norms(dtype: str) -> None:
    layout = KeyLayout(3, 4, 8, dtype, (1.0, 0.3, 0.01, 1e-4))
    cells, keys = random_cells(layout, 9, np.random.default_rng())
    tolerance = 2 * float(ml_dtypes.finfo(NUMBERS[dtype]).eps)
    np.testing.assert_allclose(key_norms(cells, 9), np.linalg.norm(keys, axis=-1).mean((0, 2)), rtol=tolerance)


def test_cells_of_raw_pages() -> None:
    layout = KeyLayout(2, 3, 4, "float16", (1.0, 0.5))
    pages = np.arange(5 * 7 * 2 * 2 * 3 * 4, dtype=np.float16).reshape(5, 7, 2, 2, 3, 4)
    np.testing.assert_array_equal(layout.cells(pages.view(np.uint8).reshape(5, 7, -1)), pages)
