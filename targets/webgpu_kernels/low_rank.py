"""The path of low-rank adapters: y += f(x) A^T B^T with each token's own A and B (low_rank_*.wgsl; Punica, Chen et al.
2023), in two launches: h = f(x) A^T, the columns of A in shares, and y += h B^T."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlcgen.adapter_layout import SLOTS, ProjectionGroup, num_tiles
from mlcgen.errors import UnsupportedError
from mlcgen.formats import TILE
from mlcgen.targets.base import LowRank
from mlcgen.targets.device_kernel import (
    Code,
    DeviceKernel,
    Launch,
    Param,
    Variant,
    ceildiv,
    int32,
    scratch,
    tensor,
    times,
)

from .code import Buffer, identifier, kernel

HOW = "kernel: targets/webgpu_kernels/low_rank.py"
THREADS = 64
FEATURES = THREADS * 4  # of a workgroup
GROUP, FEW_TOKENS = 8, 32  # tokens that share what is read, where there are more than few
SHARE, MAX_SPLITS = 512, 16  # columns of A that a workgroup takes, where that gives no more shares
RANKS = 64  # at a time


def low_rank(spec: LowRank) -> DeviceKernel:
    """PrimFunc(x (n, K) f32, [norm weight (K,) f32], adapter_slots (n,) int32, lora_a, lora_b, y (n, sum of N) f32),
    which adds to y in place; with gates_result PrimFunc(…, y, out (n, N / 2) f32), which leaves y alone."""
    if spec.is_gated:
        raise UnsupportedError("products on a GPU end with SwiGLU, none begins with it (Target.gates_results)")
    if spec.in_features % 4:
        raise UnsupportedError(f"adapters on this device need sizes that 4 divides, not {spec.in_features}")
    limits, group = spec.limits, ProjectionGroup(("",) * len(spec.out_features), spec.in_features, spec.out_features)
    n = sum(spec.out_features)
    params = [Param("x", ("n", spec.in_features), "float32")]
    if spec.norm_eps is not None:
        params.append(Param("norm", (spec.in_features,), "float32"))
    params.append(Param(SLOTS, ("n",), "int32"))
    params.append(Param("lora_a", group.a_shape(limits), limits.dtype))
    params.append(Param("lora_b", group.b_shape(limits), limits.dtype))
    params.append(Param("y", ("n", n), "float32"))
    if spec.gates_result:
        params.append(Param("out", ("n", n // 2), "float32"))
    flops = 2 * limits.rank * (len(spec.out_features) * spec.in_features + n)
    made = _LowRank(spec, [p.name for p in params])
    return DeviceKernel(spec.name, tuple(params), made.code, HOW, flops, spec)


@dataclass(frozen=True)
class _Part:
    """Features that are one projection's: where they begin."""

    features: int
    block: int
    tile: int  # of B
    column: int  # of y
    rank: int  # of h


@dataclass(frozen=True)
class _LowRank:
    spec: LowRank
    params: list[str]

    def code(self, dtypes: Sequence[str]) -> Code:
        few, many = self._launches(1), self._launches(GROUP)
        is_few = ["max", "is_decode", ["<=", "n", FEW_TOKENS]]
        variants = tuple(
            Variant(when, tuple(launch for launch, _ in kernels)) for when, kernels in ((is_few, few), (1, many))
        )
        functions = {launch.function: text for launch, text in (*few, *many)}
        return Code((), functions, variants, times("n", self._splits * self._pitch * 4))

    @property
    def _splits(self) -> int:
        return min(-(-self.spec.in_features // SHARE), MAX_SPLITS)

    @property
    def _a_tiles(self) -> int:
        return num_tiles(len(self.spec.out_features) * self.spec.limits.rank)

    @property
    def _pitch(self) -> int:
        """Floats of a token's share of h, and of the norm's squares."""
        return self._a_tiles * TILE + 4

    @property
    def _parts(self) -> list[_Part]:
        parts, at = [], (0, 0, 0, 0)
        for n in self.spec.out_features:
            parts.append(_Part(n, *at))
            block, tile, column, rank = at
            at = block + -(-n // FEATURES), tile + num_tiles(n), column + n, rank + self.spec.limits.rank
        return parts

    def _launches(self, tokens: int) -> list[tuple[Launch, str]]:
        return [self._shrink(tokens), self._expand(tokens)]

    def _shrink(self, tokens: int) -> tuple[Launch, str]:
        spec, has_norm = self.spec, self.spec.norm_eps is not None
        norm = [Buffer("norm", "vec4<f32>", self._arg("norm"), is_weight=True)] if has_norm else []
        a, shares = self._quads("a", "lora_a"), Buffer("shares", "vec4<f32>", scratch())
        buffers = [Buffer("x", "vec4<f32>", tensor(0)), *norm, self._slots, a, shares]
        share = -(-spec.in_features // 4 // self._splits)
        values = {"K": spec.in_features, "TILES": self._a_tiles, "SPLITS": self._splits, "SHARE": share}
        values |= {"TOKENS": tokens, "HAS_NORM": has_norm, "IS_HALF": spec.limits.dtype == "float16"}
        words = [spec.limits.dtype, spec.in_features, self._a_tiles, *(["norm"] if has_norm else []), tokens]
        name = "_".join(["low_rank_shrink", *map(str, words)])
        grid = (self._a_tiles * self._splits, ceildiv("n", tokens), 1)
        return kernel(name, "low_rank_shrink.wgsl", values, buffers, grid, THREADS, {"n": int32("n")})

    def _expand(self, tokens: int) -> tuple[Launch, str]:
        spec, parts, rank = self.spec, self._parts, self.spec.limits.rank
        parts = parts[:1] if spec.gates_result else parts
        out = [Buffer("out", "f32", self._arg("out"))] if spec.gates_result else []
        shares, y = Buffer("shares", "f32", scratch()), Buffer("y", "f32", self._arg("y"))
        buffers = [shares, self._slots, self._quads("b", "lora_b"), y, *out]
        values: dict[str, Any] = {
            "K": spec.in_features,
            "EPS": spec.norm_eps,
            "SPLITS": self._splits,
            "PITCH": self._pitch,
        }
        values |= {"TILES": sum(map(num_tiles, spec.out_features)), "N": sum(spec.out_features), "PARTS": parts}
        values |= {"RANK": rank, "RANKS": min(-(-rank // 4) * 4, RANKS), "GATED": spec.gates_result}
        values |= {"TOKENS": tokens, "IS_HALF": spec.limits.dtype == "float16"}
        sizes = ["x".join(map(str, spec.out_features)), rank, spec.in_features]
        around = [*([f"norm_{identifier(spec.norm_eps)}"] if spec.norm_eps is not None else [])]
        around += ["swiglu"] * spec.gates_result
        name = "_".join(["low_rank_expand", *map(str, [spec.limits.dtype, *sizes, *around, tokens])])
        grid = (parts[-1].block + -(-parts[-1].features // FEATURES), ceildiv("n", tokens), 1)
        return kernel(name, "low_rank_expand.wgsl", values, buffers, grid, THREADS, {"n": int32("n")})

    @property
    def _slots(self) -> Buffer:
        return Buffer("slots", "i32", self._arg(SLOTS))

    def _quads(self, name: str, param: str) -> Buffer:
        """A or B by quads of rows."""
        type_ = "vec2<u32>" if self.spec.limits.dtype == "float16" else "vec4<f32>"
        return Buffer(name, type_, self._arg(param), is_weight=True)

    def _arg(self, name: str) -> list[Any]:
        return tensor(self.params.index(name))
