"""The path of low-rank adapters: y += f(x) A^T B^T with each token's own A and B (low_rank.cuh)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlcgen.adapter_layout import SLOTS, ProjectionGroup, num_tiles
from mlcgen.errors import UnsupportedError
from mlcgen.formats import TILE
from mlcgen.runtime.sizes import Size
from mlcgen.targets.base import LowRank
from mlcgen.targets.device_kernel import (
    Code,
    DeviceKernel,
    Launch,
    Param,
    Variant,
    ceildiv,
    float32,
    int32,
    null,
    scratch,
    tensor,
    times,
)

from .code import C_TYPES, HALVES, cpp, definition

HOW = "kernel: targets/cuda_kernels/low_rank.py"
GROUP, SHRINK_THREADS, EXPAND_THREADS, FEATURES = 8, 128, 64, 256  # as in low_rank.cuh
FEW_TOKENS = 128  # up to here each has blocks of its own, more share theirs by groups
SHARE, MANY_SPLITS = 512, 4  # columns of A that a block takes of few tokens; shares of A for many


def low_rank(spec: LowRank) -> DeviceKernel:
    """PrimFunc(x (n, K), [norm weight (K,) f32], adapter_slots (n,) int32, lora_a, lora_b, y (n, sum of N) f32), which
    adds to y in place; with gates_result PrimFunc(…, y, out (n, N / 2)), which leaves y alone."""
    if spec.is_gated:
        raise UnsupportedError("products on a GPU end with SwiGLU, none begins with it (Target.gates_results)")
    if spec.limits.dtype != "float16":
        raise UnsupportedError(f"cuda takes adapters in float16, not {spec.limits.dtype}")
    group = ProjectionGroup(("",) * len(spec.out_features), spec.in_features, spec.out_features)
    n, has_norm = sum(spec.out_features), spec.norm_eps is not None
    params = [Param("x", ("n", spec.in_features), "float32", () if has_norm else HALVES)]
    if has_norm:
        params.append(Param("norm", (spec.in_features,), "float32"))
    params.append(Param(SLOTS, ("n",), "int32"))
    params.append(Param("lora_a", group.a_shape(spec.limits), "float16"))
    params.append(Param("lora_b", group.b_shape(spec.limits), "float16"))
    params.append(Param("y", ("n", n), "float32"))
    if spec.gates_result:
        params.append(Param("out", ("n", n // 2), "float32", HALVES))
    kernel = _LowRank(spec, [p.name for p in params])
    flops = 2 * spec.limits.rank * (len(spec.out_features) * spec.in_features + n)
    return DeviceKernel(spec.name, tuple(params), kernel.code, HOW, flops, spec)


@dataclass(frozen=True)
class _LowRank:
    spec: LowRank
    params: list[str]

    def code(self, dtypes: Sequence[str]) -> Code:
        few_splits = -(-self.spec.in_features // SHARE)
        many_splits = min(few_splits, MANY_SPLITS)
        functions: dict[str, str] = {}
        few = self._launches(functions, dtypes, few_splits, 1)
        many = self._launches(functions, dtypes, many_splits, GROUP)
        variants = (Variant(["<=", "n", FEW_TOKENS], few), Variant(1, many))
        each = self._pitch * 4
        of_few, of_many = times(["min", "n", FEW_TOKENS], few_splits * each), times("n", many_splits * each)
        return Code(("low_rank.cuh",), functions, variants, ["max", of_few, of_many])

    @property
    def _a_tiles(self) -> int:
        return num_tiles(len(self.spec.out_features) * self.spec.limits.rank)

    @property
    def _pitch(self) -> int:
        """Floats of a token's share of h, and of the norm's squares."""
        return self._a_tiles * TILE + 4

    def _launches(
        self, functions: dict[str, str], dtypes: Sequence[str], splits: int, tokens: int
    ) -> tuple[Launch, Launch]:
        blocks = ceildiv("n", tokens)
        return (
            self._shrink(functions, dtypes[0], splits, tokens, blocks),
            self._expand(functions, dtypes[-1], splits, tokens, blocks),
        )

    def _shrink(self, functions: dict[str, str], x: str, splits: int, tokens: int, blocks: Size) -> Launch:
        spec, has_norm = self.spec, self.spec.norm_eps is not None
        sizes = f"{spec.in_features}, {self._a_tiles}, {splits}"
        name = "_".join(["low_rank_shrink", x, *sizes.split(", "), *(["norm"] if has_norm else []), str(tokens)])
        template = f"ShrinkSpec<{C_TYPES[x]}, {sizes}, {cpp(has_norm)}>"
        pointers = ["const void* x", "const float* norm", f"const i32* {SLOTS}", "const f16* lora_a", "float* shares"]
        body = (
            f"using namespace low_rank; shrink_tokens<{template}, {tokens}>({{x, norm, {SLOTS}, lora_a, shares, n}});"
        )
        functions[name] = definition(name, [*pointers, "int n"], body, SHRINK_THREADS)
        args = (tensor(0), self._arg("norm"), self._arg(SLOTS), self._arg("lora_a"), scratch(), int32("n"))
        return Launch(name, (self._a_tiles * splits, blocks, 1), SHRINK_THREADS, args)

    def _expand(self, functions: dict[str, str], out: str, splits: int, tokens: int, blocks: Size) -> Launch:
        spec, eps = self.spec, self.spec.norm_eps
        features = spec.out_features[:1] if spec.gates_result else spec.out_features
        sizes = f"{spec.in_features}, {spec.limits.rank}, {splits}"
        flags = {"norm": eps is not None, "swiglu": spec.gates_result}
        words = ["x".join(map(str, spec.out_features)), *sizes.split(", "), *(word for word, on in flags.items() if on)]
        name = "_".join(["low_rank_expand", *words, out, str(tokens)])
        parts = ", ".join(map(str, spec.out_features))
        template = f"ExpandSpec<{C_TYPES[out]}, {sizes}, {', '.join(map(cpp, flags.values()))}, {parts}>"
        params = ["const float* shares", f"const i32* {SLOTS}", "const f16* lora_b", "float* y", "void* out"]
        body = f"using namespace low_rank; expand_tokens<{template}, {tokens}>"
        body += f"({{shares, {SLOTS}, lora_b, y, out, n, eps}});"
        functions[name] = definition(name, [*params, "int n", "float eps"], body, EXPAND_THREADS)
        args = (scratch(), *map(self._arg, (SLOTS, "lora_b", "y", "out")), int32("n"), float32(eps or 0.0))
        return Launch(name, (sum(-(-n // FEATURES) for n in features), blocks, 1), EXPAND_THREADS, args)

    def _arg(self, name: str) -> list[Any]:
        return tensor(self.params.index(name)) if name in self.params else null()
