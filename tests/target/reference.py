"""NumPy references for the CPU kernels: packing of weights (mlcgen/formats.py), and each operation written plainly."""

import ml_dtypes
import numpy as np

from mlcgen.formats import TILE, WeightFormat


def tiled(matrix: np.ndarray) -> np.ndarray:
    """(N, K) -> (tiles, K, 16), padded with zeros."""
    n, k = matrix.shape
    padded = np.zeros((-(-n // TILE) * TILE, k), matrix.dtype)
    padded[:n] = matrix
    return np.ascontiguousarray(padded.reshape(-1, TILE, k).transpose(0, 2, 1))


def random_weight(fmt: WeightFormat, n: int, k: int, rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
    """(stored tensors, the (n, k) float32 matrix that they mean)."""
    if not fmt.is_grouped:
        matrix = rng.standard_normal((n, k)).astype(np.float32)
        stored = matrix.astype({"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}[fmt.name])
        return [tiled(stored.view(np.dtype(fmt.dtype)))], stored.astype(np.float32)
    codes = rng.integers(0, 1 << fmt.bits, (n, k), dtype=np.uint8)
    scale = rng.uniform(0.01, 0.1, (n, k // fmt.group)).astype(np.float16)
    minimum = -rng.uniform(0.01, 0.1, (n, k // fmt.group)).astype(np.float16)
    parts = [pack_codes(fmt, codes), tiled(scale)] + ([tiled(minimum)] if fmt.has_minimum else [])
    spread = [np.repeat(part.astype(np.float32), fmt.group, axis=1) for part in (scale, minimum)]
    matrix = (codes.astype(np.float32) - fmt.zero_point) * spread[0]
    return parts, matrix + spread[1] if fmt.has_minimum else matrix


def pack_codes(fmt: WeightFormat, codes: np.ndarray) -> np.ndarray:
    """(N, K) uint8 codes -> (tiles, K * bits / 32, 16, 4)."""
    tiles = tiled(codes)  # (tiles, K, 16)
    count, k, _ = tiles.shape
    if fmt.bits == 8:
        return np.ascontiguousarray(tiles.reshape(count, k // 4, 4, TILE).transpose(0, 1, 3, 2))
    low, high = np.moveaxis(tiles.reshape(count, k // 8, 2, 4, TILE), 2, 0)
    return np.ascontiguousarray((low | high << 4).transpose(0, 1, 3, 2))


def to_storage(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 -> a KV cache's dtype; bfloat16 as uint16 bit patterns."""
    return values.astype(ml_dtypes.bfloat16).view(np.uint16) if dtype == "bfloat16" else values.astype(dtype)


def from_storage(stored: np.ndarray, dtype: str) -> np.ndarray:
    return (stored.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else stored).astype(np.float32)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + eps) * weight


def silu_mul(gate_up: np.ndarray) -> np.ndarray:
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * up


def round_activations(x: np.ndarray, group: int) -> np.ndarray:
    """Each group of columns rounded to 127 steps of its largest value."""
    groups = x.astype(np.float64).reshape(len(x), -1, group)
    step = np.abs(groups).max(-1, keepdims=True) / 127
    return (np.round(groups / np.where(step == 0, 1, step)) * step).reshape(x.shape)


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x (n, heads, D), cos and sin (n, D/2): rotate the pairs (i, i + D/2)."""
    a, b = np.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attend(q: np.ndarray, keys: np.ndarray, values: np.ndarray, position: int, scale: float, window: int) -> np.ndarray:
    """One token: q (H, D), keys and values (positions, KV, D) -> (H, D)."""
    first = max(0, position - window + 1) if window > 0 else 0
    return attend_to(q, keys, values, np.arange(first, position + 1), scale)


def attend_to(q: np.ndarray, keys: np.ndarray, values: np.ndarray, seen: np.ndarray, scale: float) -> np.ndarray:
    """As `attend`, to the keys that are named."""
    group = q.shape[0] // keys.shape[1]
    k, v = (np.repeat(a[seen], group, axis=1).astype(np.float64) for a in (keys, values))
    scores = np.einsum("hd,phd->hp", q, k) * scale
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hp,phd->hd", p / p.sum(-1, keepdims=True), v)
