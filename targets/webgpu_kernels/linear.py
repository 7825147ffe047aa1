"""Products with a stored matrix: which kernel for how many tokens, and its launches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlcgen.errors import UnsupportedError
from mlcgen.formats import TILE, WeightFormat
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
    scratch,
    tensor,
    times,
)

from .code import Buffer, Rows, identifier, kernel, matrix_buffers, matrix_values, split_rows, unit_columns

HOW = "kernel: targets/webgpu_kernels/linear.py"
FEW_TOKENS = 32  # up to here rows are too few to fill a GPU with tiles of tokens
TOKENS_AT_ONCE = 4  # that share what is read
COLUMNS = 32  # of both operands at a time where tokens are many
NORM_THREADS = 256


@dataclass(frozen=True)
class Tile:
    """What a workgroup makes of a product of many tokens."""

    when: Size  # the first that fits is taken
    tokens: int
    quads: int  # of rows
    tokens_each: int  # of an invocation, for 2 quads
    is_half: bool = False


TILES = (
    Tile("has_f16", 64, 32, 8, is_half=True),
    Tile(1, 64, 16, 4),
)


def linear(spec: Linear, can_be_half: bool = True) -> DeviceKernel:
    """can_be_half: with kernels in half precision too, for devices that have it."""
    fmt = spec.fmt
    if spec.is_gated:
        raise UnsupportedError("products on a GPU end with SwiGLU, none begins with it (Target.gates_results)")
    if spec.gates_result and spec.out_features % 8:
        raise UnsupportedError(f"SwiGLU needs sizes that 4 divides, not {spec.out_features // 2}")
    params = [Param("x", ("n", spec.in_features), "float32")]
    if spec.norm_eps is not None:
        params.append(Param("norm", (spec.in_features,), "float32"))
    params += [Param(*part) for part in fmt.parts(spec.out_features, spec.in_features)]
    if spec.has_bias:
        params.append(Param("bias", (spec.out_features,), "float32"))
    width = spec.out_features // 2 if spec.gates_result else spec.out_features
    if spec.has_residual:
        params.append(Param("residual", ("n", width), "float32"))
    params.append(Param("out", ("n", width), "float32"))
    product = _Linear(spec, width, [p.name for p in params], can_be_half and _fits_half(fmt))
    flops = 2 * spec.out_features * spec.in_features
    return DeviceKernel(spec.name, tuple(params), product.code, HOW, flops, spec)


@dataclass(frozen=True)
class _Linear:
    spec: Linear
    width: int  # of the output
    params: list[str]
    can_be_half: bool

    def code(self, dtypes: Sequence[str]) -> Code:
        norm = [self._norm()] if self.spec.norm_eps is not None else []
        before = [launch for launch, _ in norm]
        one, few = self._few(1), self._few(TOKENS_AT_ONCE)
        tiles = [tile for tile in TILES if not tile.is_half or self.can_be_half]
        many = [self._many(tile) for tile in tiles]
        variants = [Variant(["<=", "n", 1], _launches(one)), Variant(["<=", "n", FEW_TOKENS], _launches(few))]
        variants += [Variant(tile.when, (*before, *_launches(each))) for tile, each in zip(tiles, many, strict=True)]
        functions = {launch.function: text for launch, text in (*norm, *one, *few, *(m for each in many for m in each))}
        scratch_bytes = times("n", self.spec.in_features * 4) if before else 0
        return Code((), functions, tuple(variants), scratch_bytes)

    def _name(self, kind: str) -> str:
        spec = self.spec
        flags = {"bias": spec.has_bias, "residual": spec.has_residual, "gated": spec.gates_result}
        words = [kind, spec.fmt.name, f"{spec.out_features}x{spec.in_features}", *(w for w, on in flags.items() if on)]
        return "_".join(words)

    @property
    def _parts(self) -> list[Rows | None]:
        """Rows of the launches that make the product together. SwiGLU's would need twice as many buffers."""
        parts = split_rows(self.spec.fmt, self.spec.out_features, self.spec.in_features)
        return [None] if len(parts) == 1 or self.spec.gates_result else [*parts]

    def _few(self, tokens: int) -> list[tuple[Launch, str]]:
        return [self._few_of(tokens, rows) for rows in self._parts]

    def _few_of(self, tokens: int, rows: Rows | None) -> tuple[Launch, str]:
        eps = self.spec.norm_eps
        norm = [Buffer("norm", "vec4<f32>", self._arg("norm"), is_weight=True)] if eps is not None else []
        name = self._name(f"linear_{tokens}") + (f"_norm_{identifier(eps)}" if eps is not None else "")
        buffers = [Buffer("x", "vec4<f32>", tensor(0)), *norm, *self._buffers(rows)]
        grid = (-(-(rows.count if rows else self.width) // TILE), 1 if tokens == 1 else ceildiv("n", tokens), 1)
        threads, units = self._few_threads(tokens), self.spec.in_features // unit_columns(self.spec.fmt)
        unroll = min(4 if tokens == 1 else 2, -(-units // (threads // 4)))
        values = self._values(rows) | {"TOKENS": tokens, "EPS": eps, "UNROLL": unroll}
        numbers = ({"n": int32("n")} if tokens > 1 else {}) | (rows.numbers if rows else {})
        return kernel(name, "linear_few.wgsl", values, buffers, grid, threads, numbers)

    def _few_threads(self, tokens: int) -> int:
        """As many as have four units each and whose sums workgroup memory has room for; a power of four."""
        most = 64 if tokens > 1 and self.spec.gates_result else 256
        units = self.spec.in_features // unit_columns(self.spec.fmt)
        return next(t for t in (256, 64, 16) if t == 16 or (t <= most and t <= units))

    def _many(self, tile: Tile) -> list[tuple[Launch, str]]:
        return [self._many_of(tile, rows) for rows in self._parts]

    def _many_of(self, tile: Tile, rows: Rows | None) -> tuple[Launch, str]:
        has_norm = self.spec.norm_eps is not None
        buffers = [Buffer("x", "vec4<f32>", scratch() if has_norm else tensor(0)), *self._buffers(rows)]
        grid = (-(-(rows.count if rows else self.spec.out_features) // (4 * tile.quads)), ceildiv("n", tile.tokens), 1)
        values = self._values(rows) | {"TOKENS": tile.tokens, "TILE": tile.tokens, "TOKENS_EACH": tile.tokens_each}
        values |= {"QUADS": tile.quads, "COLUMNS": COLUMNS, "HALF": tile.is_half}
        name = self._name(f"linear_{tile.tokens}" + ("_half" if tile.is_half else ""))
        threads = tile.quads // 2 * (tile.tokens // tile.tokens_each)
        numbers = {"n": int32("n")} | (rows.numbers if rows else {})
        return kernel(name, "linear_many.wgsl", values, buffers, grid, threads, numbers)

    def _norm(self) -> tuple[Launch, str]:
        """x / rms(x) * norm in scratch memory."""
        k, eps = self.spec.in_features, self.spec.norm_eps
        assert eps is not None
        buffers = [Buffer("x", "vec4<f32>", tensor(0)), Buffer("norm", "vec4<f32>", self._arg("norm"), is_weight=True)]
        buffers.append(Buffer("out", "vec4<f32>", scratch()))
        name = f"rms_norm_{k}_{identifier(eps)}"
        return kernel(name, "rms_norm.wgsl", {"K": k, "EPS": eps}, buffers, ("n", 1, 1), NORM_THREADS)

    def _buffers(self, rows: Rows | None) -> list[Buffer]:
        """After x and the norm."""
        buffers = matrix_buffers(self.spec.fmt, self.spec.in_features, self.params, rows)
        if self.spec.has_bias:
            buffers.append(Buffer("bias", "f32", self._arg("bias"), is_weight=True))
        if self.spec.has_residual:
            buffers.append(Buffer("residual", "f32", self._arg("residual")))
        return [*buffers, Buffer("out", "f32", self._arg("out"))]

    def _values(self, rows: Rows | None) -> dict[str, Any]:
        spec = self.spec
        around = {"GATED": spec.gates_result, "HAS_BIAS": spec.has_bias, "HAS_RESIDUAL": spec.has_residual}
        last_quad = f"{-(-spec.out_features // TILE) * 4 - 1}u"
        if rows:
            last_quad = "u32(numbers.end_row - numbers.first_row - 1) / 4u"
        sizes = {"OUT": self.width, "LAST_QUAD": last_quad, "SPLIT": rows is not None}
        return matrix_values(spec.fmt, spec.in_features) | around | sizes

    def _arg(self, name: str) -> list[Any]:
        return tensor(self.params.index(name))


def _fits_half(fmt: WeightFormat) -> bool:
    """Whether half precision has room for the weights' exponents, and no fewer digits than they have."""
    return fmt.is_grouped or fmt.dtype == "float16"


def _launches(kernels: Sequence[tuple[Launch, str]]) -> tuple[Launch, ...]:
    return tuple(launch for launch, _ in kernels)
