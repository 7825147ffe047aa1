"""Products of few tokens, bound by reading the weights (linear_stream.cuh, linear_bulk.cuh): shapes and kernels."""

from dataclasses import dataclass
from typing import Any

from mlcgen.formats import WeightFormat
from mlcgen.runtime.sizes import Size
from mlcgen.targets.base import Linear
from mlcgen.targets.device_kernel import Launch, ceildiv, times

from .code import C_TYPES, LEAST_SHARED_BYTES, MULTIPROCESSORS, RESERVED_BYTES, SHARED_BYTES, cpp, definition

STAGED_TOKENS = 4  # up to here each block keeps, and normalizes, the tokens itself; more are normalized once, before
ARGS = ("norm", "w", "scale", "minimum", "bias", "residual", "out")  # between x and n
PARAMS = [
    *("const void* x", "const float* norm", "const void* w", "const void* scale", "const void* minimum"),
    *("const float* bias", "const float* residual", "void* out", "int n"),
]
SUM_BYTES = 32 * 4  # of a warp for each token (and one between): floats of 32 rows


@dataclass(frozen=True)
class Shape:
    """A way to run the streaming kernel: tiles of 8 tokens, and what registers allow for each."""

    tiles: int
    warps: int
    ahead: int  # chunks of weights in flight per warp
    blocks: int  # at once on a multiprocessor


# By bits of a weight: for few tokens, kept in shared memory; and for up to 8, 16, 32 and more.
STAGED = {16: Shape(1, 16, 2, 1), 8: Shape(1, 16, 2, 2), 4: Shape(1, 16, 4, 2)}
STREAMED = {
    16: (Shape(1, 8, 4, 2), Shape(2, 8, 4, 2), Shape(4, 8, 2, 2), Shape(8, 8, 1, 1)),
    8: (Shape(1, 8, 4, 2), Shape(2, 8, 4, 2), Shape(4, 8, 2, 1), Shape(8, 8, 1, 1)),
    4: (Shape(1, 8, 6, 2), Shape(2, 8, 4, 2), Shape(4, 8, 2, 1), Shape(8, 8, 2, 1)),
}
# By bits: (warps, columns of a segment, segments of a warp's ring) of the kernel whose weights wait in shared
# memory. They take more than half of it (linear_bulk.cuh says why).
BULK = {16: (8, 128, 2), 8: (8, 256, 2), 4: (8, 256, 4)}


def stream(spec: Linear, out: str, shape: Shape, is_staged: bool, args: list[list[Any]]) -> tuple[str, Launch]:
    """(definition, launch) of the kernel that reads weights into registers."""
    fmt, n, k = spec.fmt, spec.out_features, spec.in_features
    has_norm = is_staged and spec.norm_eps is not None
    flags = {"staged": is_staged, "norm": has_norm, "gated": spec.gates_result}
    words = [fmt.name, f"{n}x{k}", *(word for word, on in flags.items() if on), out, str(8 * shape.tiles)]
    name = "_".join(["linear", *words])
    sizes = f"{n}, {k}, {shape.tiles}, {shape.warps}, {shape.ahead}"
    template = f"StreamSpec<{_weights_type(spec)}, {C_TYPES[out]}, {sizes}, {', '.join(map(cpp, flags.values()))}>"
    threads = 32 * shape.warps
    text = definition(name, PARAMS, f"linear_stream<{template}>({_fields(spec)});", threads, shape.blocks)
    shared: Size = SUM_BYTES * shape.warps * ((STAGED_TOKENS if is_staged else 8 * shape.tiles) + 1)
    if is_staged:
        shared = ["+", shared, times("n", _token_bytes(k))]
    grid = (_row_blocks(spec), 1 if is_staged else ceildiv("n", 8 * shape.tiles), 1)
    return text, Launch(name, grid, threads, tuple(args), shared)


def most_staged(spec: Linear, arch: str) -> int:
    """Tokens that a block can keep."""
    sums = SUM_BYTES * STAGED[spec.fmt.bits].warps * (STAGED_TOKENS + 1)
    room = SHARED_BYTES.get(arch, LEAST_SHARED_BYTES) - RESERVED_BYTES - sums
    return min(STAGED_TOKENS, room // _token_bytes(spec.in_features))


def bulk_rings(spec: Linear) -> list[tuple[int, int]]:
    """(tokens up to which, segments of a ring): rings leave room for the tokens."""
    rings: list[tuple[int, int]] = []
    for stages in range(BULK[spec.fmt.bits][2], 0, -1):
        room = SHARED_BYTES["sm_90"] - RESERVED_BYTES - _bulk_bytes(spec.fmt, stages)
        most = min(STAGED_TOKENS, room // _token_bytes(spec.in_features))
        if most > (rings[-1][0] if rings else 0):
            rings.append((most, stages))
    return rings


def bulk(spec: Linear, out: str, stages: int, args: list[list[Any]]) -> tuple[str, Launch]:
    """The same with bulk copies into shared memory."""
    fmt, n, k, has_norm = spec.fmt, spec.out_features, spec.in_features, spec.norm_eps is not None
    warps, segment, _ = BULK[fmt.bits]
    flags = (*(["norm"] if has_norm else []), *(["gated"] if spec.gates_result else []))
    name = "_".join(["linear_bulk", fmt.name, f"{n}x{k}", *flags, out, str(stages)])
    sizes = f"{n}, {k}, {warps}, {segment}, {stages}, {cpp(has_norm)}, {cpp(spec.gates_result)}"
    template = f"BulkSpec<{_weights_type(spec)}, {C_TYPES[out]}, {sizes}>"
    text = definition(name, PARAMS, f"linear_bulk<{template}>({_fields(spec)});", 32 * warps)
    shared: Size = ["+", _bulk_bytes(fmt, stages), times("n", _token_bytes(k))]
    grid = (min(_row_blocks(spec), MULTIPROCESSORS["sm_90"]), 1, 1)
    return text, Launch(name, grid, 32 * warps, tuple(args), shared)


def _bulk_bytes(fmt: WeightFormat, stages: int) -> int:
    """Of shared memory for weights and sums."""
    warps, segment, _ = BULK[fmt.bits]
    if fmt.is_grouped:
        stage = 2 * (segment * fmt.bits * 2 + segment // fmt.group * (64 if fmt.has_minimum else 32))
    else:
        stage = 32 * (segment * 2 + 64)
    return warps * (stages * stage + 2 * SUM_BYTES * (STAGED_TOKENS + 1))


def _fields(spec: Linear) -> str:
    """LinearArgs."""
    return f"{{x, norm, w, scale, minimum, bias, residual, out, n, {spec.norm_eps or 0.0!r}f}}"


def _row_blocks(spec: Linear) -> int:
    """Of 32 rows, or 16 of the gate and 16 of the up projection."""
    return -(-spec.out_features // 32)


def _token_bytes(k: int) -> int:
    """Of a token in shared memory, spread over its banks."""
    return k * 2 + (64 if k * 2 % 128 == 0 else 0)


def _weights_type(spec: Linear) -> str:
    fmt, sizes = spec.fmt, f"{spec.out_features}, {spec.in_features}, {cpp(spec.gates_result)}"
    if fmt.is_grouped:
        return f"GroupWeights<{fmt.bits}, {fmt.group}, {cpp(fmt.has_minimum)}, {sizes}>"
    return f"FloatWeights<{C_TYPES[fmt.dtype]}, {sizes}>"
