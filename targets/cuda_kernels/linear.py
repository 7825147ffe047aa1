"""Products with a stored matrix: which kernel for how many tokens, and its launches."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlcgen.formats import WeightFormat
from mlcgen.runtime.sizes import Size
from mlcgen.targets.base import Linear
from mlcgen.targets.device_kernel import (
    Code,
    DeviceKernel,
    Launch,
    Param,
    Variant,
    ceildiv,
    int32,
    null,
    scratch,
    tensor,
    times,
)

from .code import C_TYPES, HALVES, cpp, definition, operand_type

WARPS = 8
THREADS = WARPS * 32
NORM_TOKENS = 4  # up to here each block normalizes the tokens itself; more are normalized once, by a kernel before
TOKEN_TILES = (1, 2, 4, 8)  # of 8 tokens, that a block of the streaming kernel takes
# Chunks of weights in flight per warp, by bits and token tiles: as many as registers hold.
AHEAD = {16: (4, 4, 2, 1), 8: (4, 4, 2, 1), 4: (8, 4, 2, 2)}


def linear(spec: Linear) -> DeviceKernel:
    fmt, has_norm = spec.fmt, spec.norm_eps is not None
    operand = operand_type(fmt)
    params = [Param("x", ("n", spec.in_features), "float32", () if has_norm else (operand,))]
    if has_norm:
        params.append(Param("norm", (spec.in_features,), "float32"))
    params += [Param(*part) for part in fmt.parts(spec.out_features, spec.in_features)]
    if spec.has_bias:
        params.append(Param("bias", (spec.out_features,), "float32"))
    width = spec.out_features // 2 if spec.gates_result else spec.out_features
    if spec.has_residual:
        params.append(Param("residual", ("n", width), "float32"))
    params.append(Param("out", ("n", width), "float32", () if spec.has_residual else HALVES))
    kernel = _Linear(spec, [p.name for p in params], operand)
    flops = 2 * spec.out_features * spec.in_features
    return DeviceKernel(spec.name, tuple(params), kernel.code, "kernel: targets/cuda_kernels/linear.py", flops)


@dataclass(frozen=True)
class _Linear:
    spec: Linear
    params: list[str]
    operand: str

    def code(self, dtypes: Sequence[str]) -> Code:
        functions: dict[str, str] = {}
        variants = []
        has_norm = self.spec.norm_eps is not None
        if has_norm:
            variants.append(Variant(["<=", "n", NORM_TOKENS], (self._stream(functions, dtypes, 0, True),)))
        before = self._before(functions, dtypes)
        for i, tiles in enumerate(TOKEN_TILES):
            when: Size = ["<=", "n", 8 * tiles] if i + 1 < len(TOKEN_TILES) else 1
            variants.append(Variant(when, (*before, self._stream(functions, dtypes, i, False))))
        includes = ("linear_stream.cuh", "norm.cuh")
        return Code(includes, functions, tuple(variants), times(times("n", self.spec.in_features), 2) if before else 0)

    def _before(self, functions: dict[str, str], dtypes: Sequence[str]) -> tuple[Launch, ...]:
        """What makes 16-bit tokens of x, in scratch memory, where x is not that yet."""
        k = self.spec.in_features
        operand = C_TYPES[self.operand]
        if self.spec.norm_eps is not None:
            name = f"rms_norm_{self.operand}_{k}_{_identifier(self.spec.norm_eps)}"
            body = f"rms_norm<{operand}, {k}, {THREADS}>(x, weight, out, {self.spec.norm_eps!r}f);"
            functions[name] = definition(
                name, ["const float* x", "const float* weight", f"{operand}* out"], body, THREADS
            )
            return (Launch(name, ("n", 1, 1), THREADS, (tensor(0), tensor(1), scratch())),)
        if dtypes[0] == self.operand:
            return ()
        name = f"convert_{dtypes[0]}_{self.operand}"
        params = [f"const {C_TYPES[dtypes[0]]}* x", f"{operand}* out", "int count"]
        functions[name] = definition(name, params, "convert(x, out, i64(count) * 4);", THREADS)
        groups = times("n", k // 4)
        grid = (ceildiv(groups, THREADS), 1, 1)
        return (Launch(name, grid, THREADS, (tensor(0), scratch(), int32(groups))),)

    def _stream(self, functions: dict[str, str], dtypes: Sequence[str], index: int, fuses_norm: bool) -> Launch:
        """The kernel that is bound by reading the weights."""
        spec, fmt = self.spec, self.spec.fmt
        n, k, tiles = _stored_rows(spec), spec.in_features, TOKEN_TILES[index]
        flags = "".join(f"_{word}" for word, on in (("norm", fuses_norm), ("gated", spec.gates_result)) if on)
        name = f"linear_{fmt.name}_{n}x{k}{flags}_{dtypes[-1]}_{8 * tiles}"
        ahead = AHEAD[fmt.bits][index]
        template = (
            f"StreamSpec<{_weights_type(fmt, n, k, spec.gates_result)}, {C_TYPES[dtypes[-1]]}, {n}, {k}, {tiles}, "
            f"{WARPS}, {ahead}, {cpp(fuses_norm)}, {cpp(spec.gates_result)}>"
        )
        eps = f"{spec.norm_eps or 0.0!r}f"
        params = ["const void* x", "const float* norm", "const void* w", "const void* scale", "const void* minimum"]
        params += ["const float* bias", "const float* residual", "void* out", "int n"]
        fields = f"{{x, norm, w, scale, minimum, bias, residual, out, n, {eps}}}"
        functions[name] = definition(name, params, f"linear_stream<{template}>({fields});", THREADS)
        shared = WARPS * 32 * (8 * tiles + 1) * 4
        if fuses_norm:
            shared = max(shared, NORM_TOKENS * (k * 2 + (64 if k * 2 % 128 == 0 else 0)))
        per_block = 16 if spec.gates_result else 32
        grid = (-(-(n // 2 if spec.gates_result else n) // per_block), ceildiv("n", 8 * tiles), 1)
        is_copied = not fuses_norm and (spec.norm_eps is not None or dtypes[0] != self.operand)
        x = scratch() if is_copied else tensor(0)
        args = [x, *(self._arg(p) for p in ("norm", "w", "scale", "minimum", "bias", "residual", "out")), int32("n")]
        return Launch(name, grid, THREADS, tuple(args), shared)

    def _arg(self, name: str) -> list[object]:
        return tensor(self.params.index(name)) if name in self.params else null()


def _stored_rows(spec: Linear) -> int:
    return spec.out_features


def _weights_type(fmt: WeightFormat, n: int, k: int, gated: bool) -> str:
    if fmt.is_grouped:
        return f"GroupWeights<{fmt.bits}, {fmt.group}, {cpp(fmt.has_minimum)}, {n}, {k}, {cpp(gated)}>"
    return f"FloatWeights<{C_TYPES[fmt.dtype]}, {n}, {k}, {cpp(gated)}>"


def _identifier(value: float) -> str:
    return repr(value).replace(".", "p").replace("-", "m").replace("+", "")
