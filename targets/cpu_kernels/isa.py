"""What the CPU kernels need to know of an instruction set. Kernels ask for a capability, never for a CPU's name."""

from collections.abc import Iterable
from dataclasses import dataclass

import tvm
from tvm.target import codegen

# The instruction that multiplies int8 activations with unsigned codes and adds four products to an int32 lane: LLVM's
# feature -> our name of it, the best first. Without any, plain int32 arithmetic does.
INT8_DOTS = {
    "avx512vnni": "vpdpbusd",
    "avxvnni": "vpdpbusd",
    "avx2": "pmaddubsw",
    "ssse3": "pmaddubsw",
    "i8mm": "usdot",
    "dotprod": "sdot",
}


@dataclass(frozen=True)
class Isa:
    """Capabilities of one instruction set; the default is what every 64-bit CPU has."""

    lanes: int = 4  # float32 per vector register
    registers: int = 16  # vector registers
    has_f16_convert: bool = False  # float16 <-> float32 in one instruction
    int8_dot: str = ""  # a value of INT8_DOTS
    has_bf16_convert: bool = False  # float32 -> bfloat16 in one instruction (AVX512-BF16)
    has_bf16_dot: bool = False  # two bfloat16 products added to a float32 lane, at twice the rate of float32's
    has_amx_bf16: bool = False  # products of 16x32 by 32x16 bfloat16 tiles

    @property
    def has_int8_dot(self) -> bool:
        """In one instruction: what pmaddubsw begins takes two more."""
        return self.int8_dot not in ("", "pmaddubsw")

    @property
    def registers_per_tile(self) -> int:
        """Registers that 16 floats take."""
        return 16 // self.lanes

    @classmethod
    def from_features(cls, features: Iterable[str]) -> "Isa":
        """From LLVM's feature names ("avx2", "avx512f", "neon", …)."""
        have = frozenset(features)
        int8_dot = next((name for feature, name in INT8_DOTS.items() if feature in have), "")
        if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= have:
            bf16, amx = "avx512bf16" in have, {"amx-tile", "amx-bf16"} <= have
            int8_dot = int8_dot if "avx512vnni" in have else "pmaddubsw"
            # CPUs with AMX have bfloat16 dot products too, at half the rate of float32's multiply-adds (measured).
            return cls(16, 32, True, int8_dot, bf16, bf16 and not amx, amx)
        if {"avx2", "fma"} <= have:
            return cls(8, 16, "f16c" in have, int8_dot)
        if "neon" in have:
            return cls(4, 32, True, int8_dot)
        return cls(int8_dot="pmaddubsw" if "ssse3" in have else "")

    @classmethod
    def from_target(cls, target: tvm.target.Target) -> "Isa":
        """From an LLVM target's mtriple, mcpu and mattr."""
        return cls.from_features(codegen.llvm_get_cpu_features(target))
