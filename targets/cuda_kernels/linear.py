"""Products with a stored matrix: which kernel for how many tokens, and its launches."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlcgen.formats import F16
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

from . import gemm, gemm_mma, stream
from .code import C_TYPES, HALVES, cpp, definition, operand_type

THREADS = 256  # of the kernels before
HOW = "kernel: targets/cuda_kernels/linear.py"
FEW_TOKENS = 64  # up to here products are bound by reading the weights
MOST_DECODED = 1 << 16  # rows; vocabularies are larger, seldom meet many tokens, and would take a GB of scratch memory
BULK_ARCHS = ("sm_90",)  # where few tokens' weights wait in shared memory (linear_bulk.cuh)


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
    return DeviceKernel(spec.name, tuple(params), kernel.code, HOW, flops, spec)


@dataclass(frozen=True)
class _Linear:
    spec: Linear
    params: list[str]
    operand: str
    arch: str

    def code(self, dtypes: Sequence[str]) -> Code:
        functions: dict[str, str] = {}
        fmt = self.spec.fmt
        before = self._before(functions, dtypes)
        variants = []
        if self._has_bulk or not self._has_stored_gemm:
            variants += self._few_tokens(functions, dtypes, before)
        if self._has_stored_gemm:
            variants += self._gemm(functions, dtypes, before)
        elif self._has_wgmma:
            variants += self._decoded_gemm(functions, dtypes, before)
        elif fmt.is_grouped and not self._is_decoded:
            launch = self._stream(functions, dtypes, stream.STREAMED[fmt.bits][-1], is_staged=False)
            variants.append(Variant(1, (*before, launch)))
        else:
            variants += self._mma_gemm(functions, dtypes, before)
        gemm_header = "gemm_wgmma.cuh" if self._has_wgmma else "gemm_mma.cuh"
        includes = ("linear_bulk.cuh", "norm.cuh", "stored.cuh", gemm_header)
        scratch_bytes = ["+", self._token_bytes if before else 0, self._decoded_bytes]
        return Code(includes, functions, tuple(variants), scratch_bytes)

    @property
    def _has_wgmma(self) -> bool:
        """Whether Hopper's kernel takes the product, of the matrix as it is stored or decoded."""
        return self.arch == "sm_90" and gemm.fits(self.spec, F16)

    @property
    def _has_stored_gemm(self) -> bool:
        """Whether Hopper's kernel takes the matrix as it is stored, and then any number of tokens."""
        return self._has_wgmma and gemm.fits(self.spec, self.spec.fmt)

    @property
    def _has_bulk(self) -> bool:
        """Whether the kernel for few tokens is that whose weights wait in shared memory."""
        return self.arch in BULK_ARCHS and self.spec.in_features % 32 == 0

    @property
    def _is_decoded(self) -> bool:
        """Whether the format has no kernel of its own for many tokens."""
        spec = self.spec
        if self._has_wgmma:
            return spec.fmt.is_grouped and not gemm.is_q4(spec.fmt)
        return spec.fmt.is_grouped and (spec.gates_result or spec.out_features <= MOST_DECODED)

    @property
    def _token_bytes(self) -> Size:
        return times(times("n", self.spec.in_features), 2)

    @property
    def _decoded_bytes(self) -> int:
        return self.spec.out_features * self.spec.in_features * 2 if self._is_decoded else 0

    def _few_tokens(
        self, functions: dict[str, str], dtypes: Sequence[str], before: tuple[Launch, ...]
    ) -> list[Variant]:
        """Kernels that are bound by reading the weights."""
        bits, variants = self.spec.fmt.bits, list[Variant]()
        if self.spec.norm_eps is not None or dtypes[0] == self.operand:
            if self._has_bulk:
                variants += self._bulk(functions, dtypes)
            elif most := stream.most_staged(self.spec, self.arch):
                launch = self._stream(functions, dtypes, stream.STAGED[bits], is_staged=True)
                variants.append(Variant(["<=", "n", most], (launch,)))
        if self._has_stored_gemm:
            return variants
        for shape in stream.STREAMED[bits]:
            if 8 * shape.tiles <= FEW_TOKENS:
                launch = self._stream(functions, dtypes, shape, is_staged=False)
                variants.append(Variant(["<=", "n", 8 * shape.tiles], (*before, launch)))
        return variants

    def _gemm(self, functions: dict[str, str], dtypes: Sequence[str], before: tuple[Launch, ...]) -> list[Variant]:
        """Hopper's tensor cores on the stored matrix."""
        spec = self.spec
        is_q4 = spec.fmt.is_grouped
        tilings = (gemm.q4_tilings if is_q4 else gemm.dense_tilings)(spec, _bytes(dtypes[-1]))
        variants = []
        for most, tiling in tilings:
            if is_q4:
                maps = gemm.q4_maps(tiling, spec, self._arg("w"), self._arg("scale"))
            else:
                maps = [gemm.weight_map(tiling, spec, self._arg(self._matrix), self.operand)]
            launch = self._gemm_launch(functions, dtypes, tiling, maps)
            variants.append(Variant(["<=", "n", most] if most else 1, (*before, launch)))
        return variants

    def _decoded_gemm(
        self, functions: dict[str, str], dtypes: Sequence[str], before: tuple[Launch, ...]
    ) -> list[Variant]:
        """The matrix in 16 bits in scratch memory, then as above: decoding pays where there are many tokens."""
        decode, matrix = self._decode(functions, before)
        variants = []
        for most, tiling in gemm.dense_tilings(self.spec, _bytes(dtypes[-1])):
            if most and most <= FEW_TOKENS:
                continue
            maps = [gemm.weight_map(tiling, self.spec, matrix, "float16")]
            launch = self._gemm_launch(functions, dtypes, tiling, maps)
            variants.append(Variant(["<=", "n", most] if most else 1, (*before, decode, launch)))
        return variants

    def _mma_gemm(self, functions: dict[str, str], dtypes: Sequence[str], before: tuple[Launch, ...]) -> list[Variant]:
        """The tensor cores that all GPUs have, on the stored matrix or the decoded one."""
        spec, out = self.spec, dtypes[-1]
        if self._is_decoded:
            decode, matrix = self._decode(functions, before)
            before = (*before, decode)
        else:
            matrix = self._arg(self._matrix)
        x = scratch() if self._is_copied(dtypes) else tensor(0)
        args = (x, matrix, self._arg("bias"), self._arg("residual"), self._arg("out"), int32("n"))
        variants = []
        for most, tile in gemm_mma.choices(spec.out_features, self.arch):
            text, launch = gemm_mma.kernel(tile, spec, self.operand, out, self.arch, args)
            functions[launch.function] = text
            variants.append(Variant(["<=", "n", most] if most else 1, (*before, launch)))
        return variants

    def _decode(self, functions: dict[str, str], before: tuple[Launch, ...]) -> tuple[Launch, list[object]]:
        """The launch that decodes the whole matrix, and the argument that says where it is then."""
        spec, fmt = self.spec, self.spec.fmt
        n, k = spec.out_features, spec.in_features
        name = f"decode_{fmt.name}_{n}x{k}"
        body = f"decode_matrix<{fmt.bits}, {fmt.group}, {cpp(fmt.has_minimum)}, f16, {n}, {k}>(w, scale, minimum, out);"
        pointers = ["const void* w", "const f16* scale", "const f16* minimum", "f16* out"]
        functions[name] = definition(name, pointers, body, THREADS)
        matrix = scratch(self._token_bytes if before else 0)
        args = (self._arg("w"), self._arg("scale"), self._arg("minimum"), matrix)
        return Launch(name, (-(-k // 128), -(-n // 16), 1), THREADS, args), matrix

    def _gemm_launch(
        self, functions: dict[str, str], dtypes: Sequence[str], tiling: gemm.Tiling, maps: list[list[object]]
    ) -> Launch:
        spec, out = self.spec, dtypes[-1]
        before, params, body = gemm.signature(tiling, spec, self.operand, out)
        numbers = (tiling.tokens, tiling.consumers, tiling.share, tiling.split, tiling.depth, tiling.stages)
        words = [*map(str, numbers), *(["gated"] if spec.gates_result else []), *(["q4"] if tiling.is_q4 else [])]
        sizes = f"{spec.out_features}x{spec.in_features}"
        name = "_".join(["gemm", self.operand, sizes, *words, out, *(["residual"] if spec.has_residual else [])])
        functions[name] = f'extern "C" __global__ {before} void {name}({", ".join(params)}) {{ {body} }}\n'
        x = scratch() if self._is_copied(dtypes) else tensor(0)
        args = (*maps, gemm.token_map(tiling, spec, x, self.operand), self._arg("bias"), self._arg("residual"))
        features = spec.out_features // 2 if spec.gates_result else spec.out_features
        shared = tiling.shared(_bytes(out), spec.gates_result)
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

    def _stream(self, functions: dict[str, str], dtypes: Sequence[str], shape: stream.Shape, is_staged: bool) -> Launch:
        """The kernel that is bound by reading the weights."""
        x = scratch() if not is_staged and self._is_copied(dtypes) else tensor(0)
        text, launch = stream.stream(self.spec, dtypes[-1], shape, is_staged, self._stream_args(x))
        functions[launch.function] = text
        return launch

    def _bulk(self, functions: dict[str, str], dtypes: Sequence[str]) -> list[Variant]:
        """The same kernel with bulk copies, for as many tokens as there is room for."""
        variants = []
        for most, stages in stream.bulk_rings(self.spec):
            text, launch = stream.bulk(self.spec, dtypes[-1], stages, self._stream_args(tensor(0)))
            functions[launch.function] = text
            variants.append(Variant(["<=", "n", most], (launch,)))
        return variants

    def _stream_args(self, x: list[object]) -> list[list[object]]:
        return [x, *(self._arg(p) for p in stream.ARGS), int32("n")]

    def _arg(self, name: str) -> list[object]:
        return tensor(self.params.index(name)) if name in self.params else null()


def _bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def _identifier(value: float) -> str:
    return repr(value).replace(".", "p").replace("-", "m").replace("+", "")
