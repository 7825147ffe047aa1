"""Tensor expressions between plain matrices and the tiles of mlcgen/formats.py; they run once, when compiling."""

from collections.abc import Sequence
from typing import Any

from tvm import te, tirx

from mlcgen.formats import TILE, WeightFormat

Tensor = Any


def quantize_and_pack(fmt: WeightFormat, matrix: Tensor) -> list[Tensor]:
    """A float32 (N, K) matrix to the parts of `fmt`.

    Groups are symmetric; with 4 bits the group's largest value maps to -8, the end of the range that has one more
    code (as in Q4_0 of GGUF), which halves the error of the largest weight.
    """
    n, k = (int(d) for d in matrix.shape)
    if not fmt.is_grouped:
        return [_pack_floats(fmt, matrix)]
    tiles, groups, group = -(-n // TILE), k // fmt.group, fmt.group

    def value(row: Any, column: Any) -> Any:
        return tirx.if_then_else(row < n, matrix[row, column], tirx.const(0, "float32"))

    def extreme(reducer: Any, name: str) -> Tensor:
        axis = te.reduce_axis((0, group), "i")
        shape = (tiles, TILE, groups)  # row by row: in the tiles' order LLVM takes ten times as long to compile this
        return te.compute(shape, lambda t, r, g: reducer(value(t * TILE + r, g * group + axis), axis=axis), name=name)

    high, low = extreme(te.max, "high"), extreme(te.min, "low")

    def scale_of(t: Any, g: Any, r: Any) -> Any:
        largest = tirx.if_then_else(high[t, r, g] > -low[t, r, g], high[t, r, g], low[t, r, g])
        if fmt.bits == 4:
            return (largest / tirx.const(-8.0, "float32")).astype("float16")
        return (tirx.abs(largest) / tirx.const(127.0, "float32")).astype("float16")

    scale = te.compute((tiles, groups, TILE), scale_of, name="scale")

    def code(row: Any, column: Any) -> Any:
        s = scale[row // TILE, column // group, row % TILE].astype("float32")
        scaled = tirx.if_then_else(s == 0.0, tirx.const(0, "float32"), value(row, column) / s)
        rounded = tirx.floor(scaled + tirx.const(fmt.zero_point + 0.5, "float32")).astype("int32")
        return tirx.max(tirx.min(rounded, (1 << fmt.bits) - 1), 0).astype("uint8")

    return [_pack_codes(fmt, n, k, code), scale]


def pack_groups(fmt: WeightFormat, codes: Tensor, scale: Tensor, minimum: Tensor | None = None) -> list[Tensor]:
    """Codes (N, K) uint8 and scales (N, K/group) float16 to the parts of `fmt`, value for value."""
    n, k = (int(d) for d in codes.shape)

    def code(row: Any, column: Any) -> Any:
        return tirx.if_then_else(row < n, codes[row, column], tirx.const(fmt.zero_point, "uint8"))

    def pack_scales(source: Tensor, name: str) -> Tensor:
        def at(t: Any, g: Any, r: Any) -> Any:
            return tirx.if_then_else(t * TILE + r < n, source[t * TILE + r, g], tirx.const(0, "float16"))

        return te.compute((-(-n // TILE), k // fmt.group, TILE), at, name=name)

    parts = [_pack_codes(fmt, n, k, code), pack_scales(scale, "scale")]
    return parts if minimum is None else [*parts, pack_scales(minimum, "minimum")]


def dequantize(fmt: WeightFormat, n: int, k: int, parts: Sequence[Tensor]) -> Tensor:
    """The float32 (N, K) matrix that the parts stand for: what kernels must compute with."""

    def value(row: Any, column: Any) -> Any:
        tile, lane = row // TILE, row % TILE
        if not fmt.is_grouped:
            stored = parts[0][tile, column, lane]
            bits = tirx.reinterpret("bfloat16", stored) if fmt.dtype == "uint16" else stored
            return bits.astype("float32")
        code = _stored_code(fmt, parts[0], tile, lane, column).astype("float32")
        scale = parts[1][tile, column // fmt.group, lane].astype("float32")
        if fmt.has_minimum:
            return code * scale + parts[2][tile, column // fmt.group, lane].astype("float32")
        return (code - tirx.const(fmt.zero_point, "float32")) * scale

    return te.compute((n, k), value, name="dequantize")


def bfloat16_bits(value: Any) -> Any:
    """A float32 rounded to bfloat16 (ties to even), as uint16; TVM does not lower a cast and reinterpret."""
    bits = tirx.reinterpret("uint32", value)
    one, half = tirx.const(1, "uint32"), tirx.const(0x7FFF, "uint32")
    sixteen = tirx.const(16, "uint32")
    return ((bits + half + ((bits >> sixteen) & one)) >> sixteen).astype("uint16")


def _pack_floats(fmt: WeightFormat, matrix: Tensor) -> Tensor:
    n, k = (int(d) for d in matrix.shape)

    def at(t: Any, c: Any, r: Any) -> Any:
        value = tirx.if_then_else(t * TILE + r < n, matrix[t * TILE + r, c], tirx.const(0, "float32"))
        return bfloat16_bits(value) if fmt.dtype == "uint16" else value.astype(fmt.dtype)

    return te.compute((-(-n // TILE), k, TILE), at, name="w")


def _pack_codes(fmt: WeightFormat, n: int, k: int, code: Any) -> Tensor:
    def at(t: Any, c: Any, r: Any, j: Any) -> Any:
        row = t * TILE + r
        if fmt.bits == 8:
            return code(row, c * 4 + j)
        return code(row, c * 8 + j) | (code(row, c * 8 + 4 + j) << tirx.const(4, "uint8"))

    return te.compute((-(-n // TILE), k * fmt.bits // 32, TILE, 4), at, name="w")


def _stored_code(fmt: WeightFormat, w: Tensor, tile: Any, lane: Any, column: Any) -> Any:
    if fmt.bits == 8:
        return w[tile, column // 4, lane, column % 4]
    byte = w[tile, column // 8, lane, column % 4]
    shift = ((column // 4) % 2 * 4).astype("uint8")
    return (byte >> shift) & tirx.const(15, "uint8")
