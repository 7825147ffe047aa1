"""GGUF's block types: how each packs a run of weights into bytes, and how to take it apart into integer groups.

Layouts follow ggml's `block_*` structs. Every function works on (num_blocks, bytes per block) uint8 at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mlcgen.checkpoint.base import Array


class Unpacked(NamedTuple):
    codes: Array  # (num_blocks, block) uint8
    scale: Array  # (num_blocks, block / group) float32
    minimum: Array | None  # like scale


@dataclass(frozen=True)
class BlockType:
    name: str
    block: int  # weights per block
    num_bytes: int  # bytes per block
    bits: int = 0  # width of the codes that `unpack` gives; 0: a plain float type
    group: int = 0  # weights that share a scale
    unpack: Callable[[Array], Unpacked] | None = None

    def row_bytes(self, row: int) -> int:
        return row // self.block * self.num_bytes


def dequantize(kind: BlockType, rows: Array) -> Array:
    """(N, bytes per row) uint8 -> (N, K) float32, in the same order of operations as ggml."""
    codes, scale, minimum = _unpack(kind, rows)
    grouped = codes.reshape(*scale.shape, kind.group).astype(np.float32)
    if minimum is None:
        grouped -= np.float32(1 << (kind.bits - 1))
    grouped *= scale[..., None]
    if minimum is not None:
        grouped += minimum[..., None]
    return grouped.reshape(len(rows), -1)


def regroup(kind: BlockType, rows: Array) -> Unpacked:
    """(N, bytes per row) uint8 -> codes (N, K) uint8, scale and minimum (N, K/group) float32."""
    codes, scale, minimum = _unpack(kind, rows)
    n = len(rows)
    return Unpacked(codes.reshape(n, -1), scale.reshape(n, -1), None if minimum is None else minimum.reshape(n, -1))


def _unpack(kind: BlockType, rows: Array) -> Unpacked:
    assert kind.unpack is not None, f"{kind.name} has no blocks"
    return kind.unpack(np.ascontiguousarray(rows).reshape(-1, kind.num_bytes))


def _half(blocks: Array, at: int) -> Array:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)  # (n, 1)


def _nibbles(packed: Array, run: int) -> Array:
    """Of every `run` bytes first the low nibbles, then the high ones."""
    n = len(packed)
    shifts = np.array([[0], [4]], np.uint8)
    return (packed.reshape(n, -1, 1, run) >> shifts & np.uint8(15)).reshape(n, -1)


def _fifth_bits(packed: Array) -> Array:
    return np.unpackbits(packed, axis=1, bitorder="little") << np.uint8(4)  # (n, 4) -> (n, 32)


def _q4_0(b: Array) -> Unpacked:
    return Unpacked(_nibbles(b[:, 2:], 16), _half(b, 0), None)


def _q4_1(b: Array) -> Unpacked:
    return Unpacked(_nibbles(b[:, 4:], 16), _half(b, 0), _half(b, 2))


def _q5_0(b: Array) -> Unpacked:
    codes = _nibbles(b[:, 6:], 16) | _fifth_bits(b[:, 2:6])
    return Unpacked(codes + np.uint8(128 - 16), _half(b, 0), None)  # 5-bit codes centred in 8 bits


def _q5_1(b: Array) -> Unpacked:
    return Unpacked(_nibbles(b[:, 8:], 16) | _fifth_bits(b[:, 4:8]), _half(b, 0), _half(b, 2))


def _q8_0(b: Array) -> Unpacked:
    return Unpacked(b[:, 2:] ^ np.uint8(128), _half(b, 0), None)  # int8 + 128


def _k_scales(b: Array) -> tuple[Array, Array]:
    """Scale and minimum of the 8 groups of a Q4_K or Q5_K block, from 6-bit integers: each (n, 8) float32."""
    low, high, rest = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scale = np.concatenate([low & 63, rest & 15 | low >> 2 & 48], axis=1)
    minimum = np.concatenate([high & 63, rest >> 4 | high >> 2 & 48], axis=1)
    return _half(b, 0) * scale.astype(np.float32), -(_half(b, 2) * minimum.astype(np.float32))


def _q4_k(b: Array) -> Unpacked:
    return Unpacked(_nibbles(b[:, 16:], 32), *_k_scales(b))


def _q5_k(b: Array) -> Unpacked:
    bit = np.arange(8, dtype=np.uint8)[:, None]  # bit g of byte i belongs to weight i of group g
    high = (b[:, None, 16:48] >> bit & np.uint8(1)).reshape(len(b), -1)
    return Unpacked(_nibbles(b[:, 48:], 32) | high << np.uint8(4), *_k_scales(b))


def _q6_k(b: Array) -> Unpacked:
    shifts = np.array([[0], [2], [4], [6]], np.uint8)
    high = (b[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & np.uint8(3)).reshape(len(b), -1)
    codes = _nibbles(b[:, :128], 64) | high << np.uint8(4)
    scale = _half(b, 208) * b[:, 192:208].view(np.int8).astype(np.float32)
    return Unpacked(codes + np.uint8(128 - 32), scale, None)  # 6-bit codes centred in 8 bits


BLOCK_TYPES = {  # by ggml's type number
    0: BlockType("float32", 1, 4),
    1: BlockType("float16", 1, 2),
    2: BlockType("q4_0", 32, 18, 4, 32, _q4_0),
    3: BlockType("q4_1", 32, 20, 4, 32, _q4_1),
    6: BlockType("q5_0", 32, 22, 8, 32, _q5_0),
    7: BlockType("q5_1", 32, 24, 8, 32, _q5_1),
    8: BlockType("q8_0", 32, 34, 8, 32, _q8_0),
    12: BlockType("q4_k", 256, 144, 4, 32, _q4_k),
    13: BlockType("q5_k", 256, 176, 8, 32, _q5_k),
    14: BlockType("q6_k", 256, 210, 8, 16, _q6_k),
    30: BlockType("bfloat16", 1, 2),
}
OTHER_TYPES = {  # named in errors only
    9: "q8_1", 10: "q2_k", 11: "q3_k", 15: "q8_k", 16: "iq2_xxs", 17: "iq2_xs", 18: "iq3_xxs", 19: "iq1_s",
    20: "iq4_nl", 21: "iq3_s", 22: "iq2_s", 23: "iq4_xs", 24: "int8", 25: "int16", 26: "int32", 27: "int64",
    28: "float64", 29: "iq1_m", 34: "tq1_0", 35: "tq2_0", 39: "mxfp4",
}  # fmt: skip
