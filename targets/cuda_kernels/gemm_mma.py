"""Products of many tokens on tensor cores that every GPU since sm_80 has (gemm_mma.cuh): tilings, and their kernels."""

from dataclasses import dataclass
from typing import Any

from mlcgen.targets.base import Linear
from mlcgen.targets.device_kernel import Launch, ceildiv

from .code import C_TYPES, MULTIPROCESSORS, cpp, definition

THREADS = 128
BLOCKS = 2  # at once on a multiprocessor
KB = 1024
# Of a block. Two of them fit a multiprocessor that has 100 KB (sm_86, sm_89, perhaps what runs compute_80) or more.
SHARED = {"sm_80": 64 * KB, "sm_90": 64 * KB, "sm_100": 64 * KB}
SMALLEST_SHARED = 48 * KB
PARAMS = ["const void* x", "const void* w", "const float* bias", "const float* residual"]


@dataclass(frozen=True)
class Tile:
    """What a block computes: `tokens` by `rows` of the matrix, `columns` of both at a time."""

    tokens: int
    rows: int
    columns: int
    speed: float  # estimated, compared with the first: smaller tiles read more of shared memory for each product

    def stages(self, arch: str) -> int:
        """Of the ring of tiles."""
        return SHARED.get(arch, SMALLEST_SHARED) // self.stage_bytes

    @property
    def stage_bytes(self) -> int:
        return 2 * (self.tokens + self.rows) * self.columns

    def time(self, tokens: int, rows: int, multiprocessors: int) -> float:
        """Of the multiprocessor that has the most blocks to compute, for each column."""
        blocks = -(-tokens // self.tokens) * -(-rows // self.rows)
        return -(-blocks // multiprocessors) * self.tokens * self.rows / self.speed


TILES = (Tile(128, 128, 32, 1), Tile(128, 64, 32, 0.87), Tile(64, 64, 64, 0.65))
TOKENS = range(128, 2049, 128)  # for which a tile is chosen; more are as the last


def choices(rows: int, arch: str) -> list[tuple[int, Tile]]:
    """(tokens up to which, tile) for a matrix of so many rows; 0 tokens: any number."""
    multiprocessors = MULTIPROCESSORS.get(arch, MULTIPROCESSORS["sm_80"])
    found: list[tuple[int, Tile]] = []
    for tokens in TOKENS:
        best = min(TILES, key=lambda tile: tile.time(tokens, rows, multiprocessors))
        if found and found[-1][1] == best:
            found.pop()
        found.append((tokens, best))
    return [*found[:-1], (0, found[-1][1])]


def kernel(
    tile: Tile, spec: Linear, operand: str, out: str, arch: str, args: tuple[list[Any], ...]
) -> tuple[str, Launch]:
    """(definition, launch) for tokens and a matrix of type `operand`."""
    n, k, gated = spec.out_features, spec.in_features, spec.gates_result
    sizes = (tile.tokens, tile.rows, tile.columns, tile.stages(arch))
    words = [operand, f"{n}x{k}", *map(str, sizes), *(["gated"] if gated else []), out]
    name = "_".join(["gemm_mma", *words])
    numbers = ", ".join(map(str, (n, k, *sizes)))
    template = f"gemm_mma::Spec<{C_TYPES[operand]}, {C_TYPES[out]}, {numbers}, {cpp(gated)}>"
    body = f"gemm_mma::gemm_block<{template}>(x, w, {{bias, residual}}, out, n);"
    text = definition(name, [*PARAMS, f"{C_TYPES[out]}* out", "int n"], body, THREADS, BLOCKS)
    grid = (ceildiv("n", tile.tokens), -(-n // tile.rows), 1)
    return text, Launch(name, grid, THREADS, args, tile.stages(arch) * tile.stage_bytes)
