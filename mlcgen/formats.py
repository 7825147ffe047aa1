"""How a weight matrix is stored: the contract between quantization, packing and every target's kernels.

A matrix W of shape (N, K) (output features, input features) is stored in tiles of 16 output rows, so that one vector
lane is one row and no kernel needs a horizontal sum. N is padded up to a multiple of 16 with zeros.

float formats (f32, f16, bf16):  w      (N/16, K, 16)          storage dtype; bf16 as uint16 bit patterns
8-bit groups:                    w      (N/16, K/4, 16, 4)     uint8; [.., r, j] is column 4*c + j of row r
4-bit groups:                    w      (N/16, K/8, 16, 4)     uint8; [.., r, j] holds column 8*c + j in its low nibble
                                                               and column 8*c + 4 + j in its high nibble
both:                            scale  (N/16, K/group, 16)    float16
with has_minimum:                minimum (N/16, K/group, 16)   float16

value = (code - zero_point) * scale            zero_point = 8 (4 bits) or 128 (8 bits)
value = code * scale + minimum                 with has_minimum

Four bytes of one row make one 32-bit lane: the operand order of int8 dot-product instructions, and what a shift and
a mask take apart for float activations.

A format also says what its products are computed with: with int8_activations each group of a row of activations is
rounded to 127 steps of its largest value (as llama.cpp does); otherwise they stay floats.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mlcgen.errors import UnsupportedError

TILE = 16  # output rows per tile


@dataclass(frozen=True)
class WeightFormat:
    name: str
    bits: int  # 32, 16, 8 or 4 per weight, without scales
    dtype: str  # storage dtype of `w`
    group: int = 0  # columns that share a scale; 0: not grouped
    has_minimum: bool = False
    int8_activations: bool = False

    @property
    def is_grouped(self) -> bool:
        return self.group > 0

    @property
    def zero_point(self) -> int:
        return 0 if self.has_minimum or not self.is_grouped else 1 << (self.bits - 1)

    def parts(self, n: int, k: int) -> list[tuple[str, tuple[int, ...], str]]:
        """(name, shape, dtype) of each stored tensor of an (n, k) matrix, in the order that kernels take them."""
        tiles = -(-n // TILE)
        if not self.is_grouped:
            return [("w", (tiles, k, TILE), self.dtype)]
        scales = (tiles, k // self.group, TILE)
        parts = [("w", (tiles, k * self.bits // 32, TILE, 4), "uint8"), ("scale", scales, "float16")]
        return [*parts, ("minimum", scales, "float16")] if self.has_minimum else parts


def grouped(bits: int, group: int = 32, has_minimum: bool = False) -> WeightFormat:
    name = f"q{bits}" + ("m" if has_minimum else "") + (f"g{group}" if group != 32 else "")
    return WeightFormat(name, bits, "uint8", group, has_minimum)


def with_int8_activations(fmt: WeightFormat) -> WeightFormat:
    """The same storage, products with 8-bit activations; a float format has no codes to multiply them with."""
    return replace(fmt, name=f"{fmt.name}a8", int8_activations=True) if fmt.is_grouped else fmt


F32 = WeightFormat("f32", 32, "float32")
F16 = WeightFormat("f16", 16, "float16")
BF16 = WeightFormat("bf16", 16, "uint16")
Q8 = grouped(8)
Q4 = grouped(4)

QUANTIZATIONS: dict[str, WeightFormat | None] = {
    "f32": F32,
    "f16": F16,
    "bf16": BF16,
    "q8": Q8,
    "q4": Q4,
    "gguf": None,  # each matrix in the file's own blocks
}
QUANTIZATIONS |= {f"{name}a8": QUANTIZATIONS[name] for name in ("q8", "q4", "gguf")}  # 8-bit activations too
# The format that holds what a checkpoint stores: a GGUF block's codes and scales without going through float.
SOURCE_FORMATS: Mapping[str, WeightFormat] = {
    "float32": F32,
    "float16": F16,
    "bfloat16": BF16,
    "q4_0": Q4,
    "q4_1": grouped(4, has_minimum=True),
    "q5_0": Q8,
    "q5_1": grouped(8, has_minimum=True),
    "q8_0": Q8,
    "q4_k": grouped(4, has_minimum=True),
    "q5_k": grouped(8, has_minimum=True),
    "q6_k": grouped(8, group=16),
}
# 4 bits cost these more quality than any other matrix: q4 keeps them in 8, as GGUF's 4-bit files do.
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def wanted_format(quantization: str, name: str, source_dtype: str) -> WeightFormat:
    """The format of parameter `name` under a quantization. Raises UnsupportedError for an unknown one."""
    if quantization not in QUANTIZATIONS:
        raise UnsupportedError(f"quantization {quantization!r} is not supported; have: {', '.join(QUANTIZATIONS)}")
    weights, has_a8 = quantization.removesuffix("a8"), quantization.endswith("a8")
    fmt = Q8 if weights == "q4" and name in VOCABULARY else QUANTIZATIONS[weights] or SOURCE_FORMATS[source_dtype]
    return with_int8_activations(fmt) if has_a8 else fmt


def stored_format(wanted: WeightFormat, shape: tuple[int, ...]) -> WeightFormat:
    """`wanted`, or f16 where the columns do not divide into its groups."""
    return F16 if wanted.is_grouped and shape[1] % wanted.group else wanted


KV_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}  # short name -> name


def resolve_kv_dtype(kv_dtype: str, quantization: str) -> str:
    """float32, float16 or bfloat16; "auto" is float32 beside float32 weights, else float16."""
    if kv_dtype == "auto":
        return "float32" if quantization == "f32" else "float16"
    kv_dtype = KV_DTYPES.get(kv_dtype, kv_dtype)
    if kv_dtype not in KV_DTYPES.values():
        have = ", ".join(["auto", *KV_DTYPES.values()])
        raise UnsupportedError(f"--kv-dtype {kv_dtype!r} is not supported; have: {have}")
    return kv_dtype
