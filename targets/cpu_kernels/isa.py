"""What the CPU kernels need to know of an instruction set. Kernels ask for a capability, never for a CPU's name."""

from collections.abc import Iterable
from dataclasses import dataclass

import tvm
from tvm.target import codegen


@dataclass(frozen=True)
class Isa:
    """Capabilities of one instruction set; the default is what every 64-bit CPU has."""

    lanes: int = 4  # float32 per vector register
    registers: int = 16  # vector registers
    has_f16_convert: bool = False  # float16 <-> float32 in one instruction

    @property
    def registers_per_tile(self) -> int:
        """Registers that 16 floats take."""
        return 16 // self.lanes

    @classmethod
    def from_features(cls, features: Iterable[str]) -> "Isa":
        """From LLVM's feature names ("avx2", "avx512f", "neon", …)."""
        have = frozenset(features)
        if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= have:
            return cls(16, 32, has_f16_convert=True)
        if {"avx2", "fma"} <= have:
            return cls(8, 16, has_f16_convert="f16c" in have)
        if "neon" in have:
            return cls(4, 32, has_f16_convert=True)
        return cls()

    @classmethod
    def from_target(cls, target: tvm.target.Target) -> "Isa":
        """From an LLVM target's mtriple, mcpu and mattr."""
        return cls.from_features(codegen.llvm_get_cpu_features(target))
