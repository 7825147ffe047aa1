"""Which tokens of a text that has outgrown its window stay in the cache, and how their keys and values move together.

As in H2O (Zhang et al., 2023, arXiv:2306.14048) half of those that stay are the last ones, the others heavy hitters:
tokens that attention falls on. Where H2O sums up attention, which kernels would have to give out, we take the tokens
whose keys have the smallest norms: they are those that attention falls on (Devoto et al., 2024, arXiv:2406.11430), and
the cache alone tells them. A token stays or goes as a whole, in all layers and heads, as pages hold all of them.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from mlcgen.runtime import bfloat16
from mlcgen.runtime.executor import Float32, Int32

__all__ = ["KeyLayout", "heavy_hitters", "key_norms", "move_together"]

Cells: TypeAlias = npt.NDArray[Any]  # (layers, pages, 2, kv_heads, page_size, head_dim): keys, then values


@dataclass(frozen=True)
class KeyLayout:
    """What a page holds, and how keys are rotated: pairs (i, i + head_dim / 2) by position * inv_freq[i]."""

    num_kv_heads: int
    page_size: int
    head_dim: int
    dtype: str  # bfloat16 is kept as its bits, uint16
    inv_freq: tuple[float, ...]  # (head_dim / 2,)

    def cells(self, raw: npt.NDArray[np.uint8]) -> Cells:
        """raw: (layers, pages, bytes of a page of one layer), as Executor.read_pages gives it."""
        shape = 2, self.num_kv_heads, self.page_size, self.head_dim
        return raw.view(self.dtype).reshape(*raw.shape[:2], *shape)


def key_norms(cells: Cells, num_tokens: int) -> Float32:
    """(num_tokens,): the norm of each token's keys, the mean over layers and heads."""
    layers, pages, _, heads, page_size, _ = cells.shape
    total = np.zeros((pages, page_size), np.float32)
    for layer in cells:  # one by one: all keys in float32 are twice what is read
        total += np.linalg.norm(_floats(layer[:, 0]), axis=-1).sum(1)
    norms: Float32 = total.reshape(-1)[:num_tokens] / (layers * heads)
    return norms


def heavy_hitters(norms: Float32, kept: int, sinks: int) -> Int32:
    """Positions of `kept` tokens, in order: the first `sinks`, the last half, and those of the smallest norms."""
    num_tokens = len(norms)
    last = min(kept // 2, kept - sinks)
    between = norms[sinks : num_tokens - last]
    heavy = np.sort(np.argsort(between, kind="stable")[: kept - last - sinks]) + sinks
    return np.concatenate([np.arange(sinks), heavy, np.arange(num_tokens - last, num_tokens)]).astype(np.int32)


def move_together(cells: Cells, places: Int32, layout: KeyLayout) -> Cells:
    """Pages of the tokens at `places` alone, one after the other, their keys turned to the positions they have now."""
    page_size, now = layout.page_size, np.arange(len(places))
    layers, _, *of_page = cells.shape
    moved = np.zeros((layers, -(-len(places) // page_size), *of_page), cells.dtype)
    angles = np.outer(now - places, layout.inv_freq)  # (kept, head_dim / 2); the way back is short: float64
    cos, sin = (f(angles).astype(np.float32)[:, None] for f in (np.cos, np.sin))
    has_moved = now != places
    for old, new in zip(cells, moved, strict=True):
        kept = old[places // page_size, :, :, places % page_size]  # (kept, 2, kv_heads, head_dim)
        # What has not moved stays bit by bit.
        kept[has_moved, 0] = _stored(_turned(_floats(kept[has_moved, 0]), cos[has_moved], sin[has_moved]), cells.dtype)
        new[now // page_size, :, :, now % page_size] = kept
    return moved


def _turned(keys: Float32, cos: Float32, sin: Float32) -> Float32:
    a, b = np.split(keys, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _floats(stored: npt.NDArray[Any]) -> Float32:
    if stored.dtype == np.uint16:
        return bfloat16.to_float32(stored)
    return stored.astype(np.float32)


def _stored(values: Float32, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    return bfloat16.from_float32(values) if dtype == np.uint16 else values.astype(dtype)
