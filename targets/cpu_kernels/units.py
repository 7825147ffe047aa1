"""The multiply-add instructions: each adds products of packed words, one word per 32-bit lane, one lane per output row.

A word holds one float32, two bfloat16 or four bytes, so that all of them read weights and activations the same way.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from tvm.tirx.script import builder as T  # noqa: N812

from ...formats import TILE, WeightFormat
from .isa import Isa
from .vector import Buffer, Expr, bind, lanes_of, shuffle, splat, store, store_f32

# bfloat16 vectors do not survive TVM's legalization, so these instructions come as LLVM's own text.
_BF16_LLVM = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
declare <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float>, <16 x float>)

define <16 x float> @mlcgen_dot_bf16(<16 x float> %sum, <16 x i32> %a, <16 x i32> %b)
    alwaysinline "target-features"="+avx512f,+avx512bf16" {
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %sum, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}

define <16 x i16> @mlcgen_round_bf16(<16 x float> %x) alwaysinline "target-features"="+avx512f,+avx512bf16" {
  %y = fptrunc <16 x float> %x to <16 x bfloat>
  %r = bitcast <16 x bfloat> %y to <16 x i16>
  ret <16 x i16> %r
}

define <16 x i32> @mlcgen_bf16_words(<16 x float> %low, <16 x float> %high)
    alwaysinline "target-features"="+avx512f,+avx512bw,+avx512bf16" {
  %x = call <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float> %high, <16 x float> %low)
  %y = shufflevector <32 x bfloat> %x, <32 x bfloat> poison, <32 x i32> <MIXED>
  %r = bitcast <32 x bfloat> %y to <16 x i32>
  ret <16 x i32> %r
}
""".replace("MIXED", ", ".join(f"i32 {half + lane}" for lane in range(TILE) for half in (0, TILE)))


def bf16_scope(needed: bool = True) -> AbstractContextManager[Any]:
    """What the body of a function must stand in to use the bfloat16 instructions."""
    return T.attr(T.int32(0), "pragma_import_llvm", _BF16_LLVM) if needed else nullcontext()


def multiply_add(total: Expr, weights: Expr, activation: Expr) -> Expr:
    """total + weights * activation: float32 lanes and a float32."""
    return total + splat(activation, lanes_of(total)) * weights


def dot_bf16(total: Expr, weights: Expr, activation: Expr) -> Expr:
    """total (16 float32) + both products of two bfloat16: words of 16 rows and a word. Inside `bf16_scope`."""
    return T.call_extern("float32x16", "mlcgen_dot_bf16", total, weights, splat(activation, TILE))


def bf16_words(low: Expr, high: Expr) -> Expr:
    """16 words of two bfloat16 from two vectors of float32, rounded to nearest even. Inside `bf16_scope`."""
    return T.call_extern("uint32x16", "mlcgen_bf16_words", low, high)


def store_bf16(isa: Isa, buffer: Buffer, value: Expr, *index: Expr) -> None:
    """As `store_f32`, in one instruction for a whole vector. Inside `bf16_scope`."""
    if lanes_of(value) == TILE:
        store(buffer, T.call_extern("uint16x16", "mlcgen_round_bf16", value), *index)
    else:
        store_f32(isa, buffer, value, *index)


class Int8Dot:
    """sum over a group's columns of (code - offset) * int8 activation, for the 16 rows of a tile.

    `start` gives an empty sum, `add` adds four columns, `total` ends it as 16 int32.
    """

    def __init__(self, isa: Isa, fmt: WeightFormat) -> None:
        self.name = isa.int8_dot or "int32 arithmetic"
        fits_int8 = fmt.bits == 4  # codes are below 16: signed or not is the same
        # Signed operands: codes of 8 bits lose their zero point, 128, by a flip of the top bit.
        self.offset = 128 if self.name in ("pmaddubsw", "sdot") and not fits_int8 else 0
        add = {
            "vpdpbusd": _vpdpbusd,
            "pmaddubsw": _pmaddubsw_small if fits_int8 and fmt.group <= 32 else _pmaddubsw_signed,
            "usdot": _arm_dot("usdot"),
            "sdot": _arm_dot("sdot"),
        }
        self._add = add.get(self.name, _int32_dot)
        # Instructions are as wide as the machine's vectors, those of AVX2 at most 8 lanes.
        self._lanes = min(isa.lanes, 8) if self.name == "pmaddubsw" else isa.lanes
        self._sums_int16 = self._add is _pmaddubsw_small

    def start(self) -> Expr:
        return splat(T.int16(0), 2 * TILE) if self._sums_int16 else splat(T.int32(0), TILE)

    def add(self, total: Expr, codes: Expr, activations: Expr) -> Expr:
        """codes: 16 words of four unsigned bytes; activations: a word of four int8."""
        if self.offset:
            codes = codes ^ splat(T.uint32(0x80808080), TILE)
        return bind(self._in_pieces(self._add, total, codes, splat(activations, TILE)))

    def total(self, total: Expr) -> Expr:
        return bind(self._in_pieces(_add_pairs, total)) if self._sums_int16 else total

    def _in_pieces(self, function: Callable[..., Expr], *vectors: Expr) -> Expr:
        """Apply an instruction of fewer lanes to vectors of 16 (32-bit) lanes."""
        if self._lanes == TILE:
            return function(*vectors)
        count = TILE // self._lanes
        pieces = [function(*(_piece(v, i, count) for v in vectors)) for i in range(count)]
        return shuffle(pieces, range(sum(lanes_of(piece) for piece in pieces)))


def _piece(vector: Expr, index: int, count: int) -> Expr:
    lanes = lanes_of(vector) // count
    return shuffle([vector], range(index * lanes, (index + 1) * lanes))


def _intrinsic(dtype: str, name: str, *args: Expr) -> Expr:
    return T.call_llvm_pure_intrin(dtype, name, *args)


def _bytes(words: Expr, dtype: str = "int8") -> Expr:
    return T.reinterpret(f"{dtype}x{4 * lanes_of(words)}", words)


def _vpdpbusd(total: Expr, codes: Expr, activations: Expr) -> Expr:
    lanes = lanes_of(total)
    name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
    return _intrinsic(f"int32x{lanes}", name, total, _bytes(codes, "uint8"), _bytes(activations))


def _pmaddubsw(codes: Expr, activations: Expr) -> Expr:
    """Unsigned codes times signed activations, neighbours added: int16, saturating."""
    lanes = lanes_of(codes)
    name = "llvm.x86.avx2.pmadd.ub.sw" if lanes == 8 else "llvm.x86.ssse3.pmadd.ub.sw.128"
    return _intrinsic(f"int16x{2 * lanes}", name, _bytes(codes), _bytes(activations))


def _add_pairs(pairs: Expr) -> Expr:
    """Neighbouring int16 added into int32."""
    lanes = lanes_of(pairs) // 2
    name = "llvm.x86.avx2.pmadd.wd" if lanes == 8 else "llvm.x86.sse2.pmadd.wd"
    return _intrinsic(f"int32x{lanes}", name, pairs, splat(T.int16(1), 2 * lanes))


def _pmaddubsw_small(total: Expr, codes: Expr, activations: Expr) -> Expr:
    """Codes below 16: the sums of 32 columns, at most 8 * 2 * 15 * 127 = 30480, fit int16."""
    return total + _pmaddubsw(codes, activations)


def _pmaddubsw_signed(total: Expr, codes: Expr, activations: Expr) -> Expr:
    """Signed codes of 8 bits: |code| times the activation with the code's sign; 2 * 128 * 127 fits int16."""
    lanes = lanes_of(codes)
    signed = bind(_bytes(codes))
    zero = splat(T.int8(0), 4 * lanes)
    name = "llvm.x86.avx2.psign.b" if lanes == 8 else "llvm.x86.ssse3.psign.b.128"
    with_sign = _intrinsic(f"int8x{4 * lanes}", name, _bytes(activations), signed)
    magnitude = T.Select(signed < zero, zero - signed, signed)
    products = _pmaddubsw(T.reinterpret(f"uint32x{lanes}", magnitude), T.reinterpret(f"int32x{lanes}", with_sign))
    return total + _add_pairs(bind(products))


def _arm_dot(name: str) -> Callable[[Expr, Expr, Expr], Expr]:
    def dot(total: Expr, codes: Expr, activations: Expr) -> Expr:
        return _intrinsic("int32x4", f"llvm.aarch64.neon.{name}.v4i32.v16i8", total, _bytes(codes), _bytes(activations))

    return dot


def _int32_dot(total: Expr, codes: Expr, activations: Expr) -> Expr:
    lanes = lanes_of(total)
    for byte in range(4):
        code = (codes >> splat(T.uint32(8 * byte), lanes)) & splat(T.uint32(255), lanes)
        left = activations << splat(T.int32(24 - 8 * byte), lanes)
        total = total + T.reinterpret(f"int32x{lanes}", code) * (left >> splat(T.int32(24), lanes))
    return total
