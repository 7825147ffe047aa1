"""Products with a stored matrix: which kernel for how many tokens, and its launches."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlcgen.formats import F16, WeightFormat
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

from . import gemm
from .code import C_TYPES, HALVES, cpp, definition, operand_type

THREADS = 256  # of the kernels before
STAGED_TOKENS = 4  # up to here each block keeps, and normalizes, the tokens itself; more are normalized once, before
LINEAR_ARGS = ("norm", "w", "scale", "minimum", "bias", "residual", "out")
LINEAR_PARAMS = [
    *("const void* x", "const float* norm", "const void* w", "const void* scale", "const void* minimum"),
    *("const float* bias", "const float* residual", "void* out", "int n"),
]
FEW_TOKENS = 16  # up to here the weights stream; beyond, Hopper has a better kernel
SUM_BYTES = 32 * 4  # of a warp for each token (and one between): floats of 32 rows


# Products of few tokens whose weights wait in shared memory (linear_bulk.cuh): by bits, (warps, columns of a segment,
# segments of a warp). On no GPU yet: its last version has run under the emulator only, the one before it on an H100.
BULK_ARCHS: tuple[str, ...] = ()
BULK = {4: (8, 256, 2), 8: (8, 128, 2)}
MULTIPROCESSORS = 132  # of an H100


@dataclass(frozen=True)
class Shape:
    """A way to run the streaming kernel: tiles of 8 tokens, and what registers allow for each."""

    tiles: int
    warps: int
    ahead: int  # chunks of weights in flight per warp
    blocks: int  # at once on a multiprocessor
    prefetch: int = 0  # columns that are brought into the second-level cache at the start


# By bits of a weight: for few tokens, kept in shared memory; and for up to 8, 16, 32 and more.
STAGED = {16: Shape(1, 16, 2, 1), 8: Shape(1, 16, 2, 2), 4: Shape(1, 16, 4, 2)}
STREAMED = {
    16: (Shape(1, 8, 4, 2), Shape(2, 8, 4, 2), Shape(4, 8, 2, 2), Shape(8, 8, 1, 1)),
    8: (Shape(1, 8, 4, 2), Shape(2, 8, 4, 2), Shape(4, 8, 2, 1), Shape(8, 8, 1, 1)),
    4: (Shape(1, 8, 6, 2), Shape(2, 8, 4, 2), Shape(4, 8, 2, 1), Shape(8, 8, 2, 1)),
}


def linear(spec: Linear, arch: str) -> DeviceKernel:
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
    kernel = _Linear(spec, [p.name for p in params], operand, arch)
    flops = 2 * spec.out_features * spec.in_features
    return DeviceKernel(spec.name, tuple(params), kernel.code, "kernel: targets/cuda_kernels/linear.py", flops)


@dataclass(frozen=True)
class _Linear:
    spec: Linear
    params: list[str]
    operand: str
    arch: str

    def code(self, dtypes: Sequence[str]) -> Code:
        functions: dict[str, str] = {}
        spec, fmt = self.spec, self.spec.fmt
        has_wgmma = self.arch == "sm_90"
        before = self._before(functions, dtypes)
        variants = []
        if fmt.is_grouped or not has_wgmma or not gemm.fits(spec, fmt):
            variants += self._few_tokens(functions, dtypes, before)
        if has_wgmma and gemm.fits(spec, fmt):
            variants += self._gemm(functions, dtypes, before)
        elif has_wgmma and fmt.is_grouped and gemm.fits(spec, F16):
            variants += self._decoded_gemm(functions, dtypes, before)
        else:
            variants.append(Variant(1, (*before, self._stream(functions, dtypes, STREAMED[fmt.bits][-1], False))))
        includes = ["linear_bulk.cuh", "norm.cuh", "stored.cuh", *(["gemm_wgmma.cuh"] if has_wgmma else [])]
        scratch_bytes = ["+", self._token_bytes if before else 0, self._decoded_bytes if has_wgmma else 0]
        return Code(tuple(includes), functions, tuple(variants), scratch_bytes)

    @property
    def _token_bytes(self) -> Size:
        return times(times("n", self.spec.in_features), 2)

    @property
    def _decoded_bytes(self) -> int:
        """Of the whole matrix in 16 bits, where the format has no kernel of its own for many tokens."""
        is_decoded = self.spec.fmt.is_grouped and not gemm.is_q4(self.spec.fmt)
        return self.spec.out_features * self.spec.in_features * 2 if is_decoded else 0

    def _few_tokens(
        self, functions: dict[str, str], dtypes: Sequence[str], before: tuple[Launch, ...]
    ) -> list[Variant]:
        """Kernels that are bound by reading the weights."""
        bits, variants = self.spec.fmt.bits, []
        if self.spec.norm_eps is not None or dtypes[0] == self.operand:
            if self.arch in BULK_ARCHS and bits in BULK:
                launch = self._bulk(functions, dtypes, *BULK[bits])
            else:
                launch = self._stream(functions, dtypes, STAGED[bits], is_staged=True)
            variants.append(Variant(["<=", "n", STAGED_TOKENS], (launch,)))
        for shape in STREAMED[bits]:
            if 8 * shape.tiles <= FEW_TOKENS or self.arch != "sm_90":
                launch = self._stream(functions, dtypes, shape, is_staged=False)
                variants.append(Variant(["<=", "n", 8 * shape.tiles], (*before, launch)))
        return variants

    def _gemm(self, functions: dict[str, str], dtypes: Sequence[str], before: tuple[Launch, ...]) -> list[Variant]:
        """Hopper's tensor cores on the stored matrix."""
        spec, q4 = self.spec, self.spec.fmt.is_grouped
        tilings = gemm.q4_tilings(spec.out_features) if q4 else gemm.dense_tilings(spec.out_features)
        variants = []
        for most, tiling in tilings:
            if q4:
                maps = gemm.q4_maps(tiling, spec, self._arg("w"), self._arg("scale"))
            else:
                maps = [gemm.weight_map(tiling, spec, self._arg(self._matrix), self.operand)]
            launch = self._gemm_launch(functions, dtypes, tiling, maps, q4)
            variants.append(Variant(["<=", "n", most] if most else 1, (*before, launch)))
        return variants

    def _decoded_gemm(
        self, functions: dict[str, str], dtypes: Sequence[str], before: tuple[Launch, ...]
    ) -> list[Variant]:
        """The matrix in 16 bits in scratch memory, then as above: decoding pays where there are many tokens."""
        spec, fmt = self.spec, self.spec.fmt
        n, k = spec.out_features, spec.in_features
        name = f"decode_{fmt.name}_{n}x{k}"
        body = f"decode_matrix<{fmt.bits}, {fmt.group}, {cpp(fmt.has_minimum)}, f16, {n}, {k}>(w, scale, minimum, out);"
        pointers = ["const void* w", "const f16* scale", "const f16* minimum", "f16* out"]
        functions[name] = definition(name, pointers, body, THREADS)
        matrix = scratch(self._token_bytes if before else 0)
        args = (self._arg("w"), self._arg("scale"), self._arg("minimum"), matrix)
        decode = Launch(name, (-(-k // 128), -(-n // 16), 1), THREADS, args)
        variants = []
        for most, tiling in gemm.dense_tilings(n):
            if most and most <= FEW_TOKENS:
                continue
            maps = [gemm.weight_map(tiling, spec, matrix, "float16")]
            launch = self._gemm_launch(functions, dtypes, tiling, maps, q4=False)
            variants.append(Variant(["<=", "n", most] if most else 1, (*before, decode, launch)))
        return variants

    def _gemm_launch(
        self, functions: dict[str, str], dtypes: Sequence[str], tiling: gemm.Tiling, maps: list[list[object]], q4: bool
    ) -> Launch:
        spec, out = self.spec, dtypes[-1]
        before, params, body = gemm.signature(tiling, spec, self.operand, out, q4)
        numbers = (tiling.tokens, tiling.consumers, tiling.share, tiling.split, tiling.stages)
        words = [*map(str, numbers), *(["gated"] if spec.gates_result else []), *(["q4"] if q4 else [])]
        sizes = f"{spec.out_features}x{spec.in_features}"
        name = "_".join(["gemm", self.operand, sizes, *words, out, *(["residual"] if spec.has_residual else [])])
        functions[name] = f'extern "C" __global__ {before} void {name}({", ".join(params)}) {{ {body} }}\n'
        x = scratch() if self._is_copied(dtypes) else tensor(0)
        args = (*maps, gemm.token_map(tiling, spec, x, self.operand), self._arg("bias"), self._arg("residual"))
        features = spec.out_features // 2 if spec.gates_result else spec.out_features
        shared = tiling.shared(4 if out == "float32" else 2, spec.gates_result, q4)
        grid = (tiling.grid(features, spec.gates_result), 1, 1)
        return Launch(name, grid, tiling.threads, (*args, self._arg("out"), int32("n")), shared)

    def _is_copied(self, dtypes: Sequence[str]) -> bool:
        """Whether a kernel before leaves the tokens in scratch memory."""
        return self.spec.norm_eps is not None or dtypes[0] != self.operand

    @property
    def _matrix(self) -> str:
        return self.spec.fmt.parts(16, 64)[0][0]

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

    def _stream(self, functions: dict[str, str], dtypes: Sequence[str], shape: Shape, is_staged: bool) -> Launch:
        """The kernel that is bound by reading the weights."""
        spec, fmt = self.spec, self.spec.fmt
        n, k = spec.out_features, spec.in_features
        has_norm = is_staged and spec.norm_eps is not None
        flags = {"staged": is_staged, "norm": has_norm, "gated": spec.gates_result}
        words = [fmt.name, f"{n}x{k}", *(word for word, on in flags.items() if on), dtypes[-1], str(8 * shape.tiles)]
        name = "_".join(["linear", *words])
        weights = _weights_type(fmt, n, k, spec.gates_result)
        sizes = f"{n}, {k}, {shape.tiles}, {shape.warps}, {shape.ahead}, {shape.prefetch}"
        template = f"StreamSpec<{weights}, {C_TYPES[dtypes[-1]]}, {sizes}, {', '.join(map(cpp, flags.values()))}>"
        fields = f"{{x, norm, w, scale, minimum, bias, residual, out, n, {spec.norm_eps or 0.0!r}f}}"
        threads = 32 * shape.warps
        body = f"linear_stream<{template}>({fields});"
        functions[name] = definition(name, LINEAR_PARAMS, body, threads, shape.blocks)
        shared: Size = SUM_BYTES * shape.warps * ((STAGED_TOKENS if is_staged else 8 * shape.tiles) + 1)
        if is_staged:
            shared = ["+", shared, times("n", k * 2 + (64 if k * 2 % 128 == 0 else 0))]
        row_blocks = n // 32 if spec.gates_result else -(-n // 32)
        grid = (row_blocks, 1 if is_staged else ceildiv("n", 8 * shape.tiles), 1)
        x = scratch() if not is_staged and self._is_copied(dtypes) else tensor(0)
        args = [x, *(self._arg(p) for p in LINEAR_ARGS), int32("n")]
        return Launch(name, grid, threads, tuple(args), shared)

    def _bulk(self, functions: dict[str, str], dtypes: Sequence[str], warps: int, segment: int, stages: int) -> Launch:
        """The same with bulk copies into shared memory, for at most STAGED_TOKENS tokens."""
        spec, fmt = self.spec, self.spec.fmt
        n, k, has_norm = spec.out_features, spec.in_features, spec.norm_eps is not None
        flags = (*(["norm"] if has_norm else []), *(["gated"] if spec.gates_result else []))
        name = "_".join(["linear_bulk", fmt.name, f"{n}x{k}", *flags, dtypes[-1]])
        sizes = f"{n}, {k}, {warps}, {segment}, {stages}, {cpp(has_norm)}, {cpp(spec.gates_result)}, false"
        template = f"BulkSpec<{_weights_type(fmt, n, k, spec.gates_result)}, {C_TYPES[dtypes[-1]]}, {sizes}>"
        fields = f"{{x, norm, w, scale, minimum, bias, residual, out, n, {spec.norm_eps or 0.0!r}f}}"
        functions[name] = definition(name, LINEAR_PARAMS, f"linear_bulk<{template}>({fields});", 32 * warps, 2)
        parts = 2 if fmt.has_minimum else 1
        stage = 2 * (segment * fmt.bits * 2 + segment // fmt.group * 32 * parts)
        tokens = times("n", k * 2 + (64 if k * 2 % 128 == 0 else 0))
        shared: Size = ["+", warps * (stages * stage + 1280), tokens]
        row_blocks = n // 32 if spec.gates_result else -(-n // 32)
        grid = (min(row_blocks, MULTIPROCESSORS), 1, 1)
        args = [tensor(0), *(self._arg(p) for p in LINEAR_ARGS), int32("n")]
        return Launch(name, grid, 32 * warps, tuple(args), shared, is_shared_heavy=True)

    def _arg(self, name: str) -> list[object]:
        return tensor(self.params.index(name)) if name in self.params else null()


def _weights_type(fmt: WeightFormat, n: int, k: int, gated: bool) -> str:
    if fmt.is_grouped:
        return f"GroupWeights<{fmt.bits}, {fmt.group}, {cpp(fmt.has_minimum)}, {n}, {k}, {cpp(gated)}>"
    return f"FloatWeights<{C_TYPES[fmt.dtype]}, {n}, {k}, {cpp(gated)}>"


def _identifier(value: float) -> str:
    return repr(value).replace(".", "p").replace("-", "m").replace("+", "")
