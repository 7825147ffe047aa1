"""Products of any number of tokens on Hopper's tensor cores (gemm_wgmma.cuh): tilings, and what a launch needs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlcgen.formats import WeightFormat
from mlcgen.runtime.sizes import Size
from mlcgen.targets.base import Linear
from mlcgen.targets.device_kernel import ceildiv, times

from .code import C_TYPES, MAX_TOKENS_PER_STEP, MULTIPROCESSORS, RESERVED_BYTES, SHARED_BYTES, cpp

BLOCK_K = 64
SWIZZLE_128, NO_SWIZZLE = 3, 0  # CUtensorMapSwizzle


@dataclass(frozen=True)
class Tiling:
    """Template parameters, as in gemm_wgmma.cuh."""

    tokens: int
    consumers: int
    share: int
    split: int
    stages: int
    depth: int = 1
    is_q4: bool = False
    blocks: int = 1  # at once on a multiprocessor

    @property
    def threads(self) -> int:
        return 128 * self.consumers + (128 if self.tokens > 192 or self.is_q4 else 32)

    @property
    def part(self) -> int:
        """Tokens whose sums one of the blocks that split k adds up."""
        sizes = (size for size in (8, *range(16, self.tokens + 1, 16)) if self.tokens % size == 0)
        return self.tokens if self.split == 1 else next(size for size in sizes if size * self.split >= self.tokens)

    def features(self, is_gated: bool) -> int:
        """Of a block."""
        return self.consumers * (32 if is_gated else 64)

    def grid(self, features: int, is_gated: bool) -> Size:
        cluster = self.share * self.split
        per_worker = -(-features // (self.features(is_gated) * self.share))
        tiles = times(per_worker, ceildiv("n", self.tokens))
        return times(["min", self.blocks * MULTIPROCESSORS["sm_90"] // cluster, tiles], cluster)

    def shared(self, out_bytes: int, is_gated: bool) -> int:
        """Bytes: the ring of stages, the slabs that results are stored through, sums of other blocks, barriers."""
        weights = self.consumers * (2304 if self.is_q4 else 8192)
        stage = -(-self.depth * (self.tokens * 128 + weights) // 1024) * 1024
        part = self.part
        if self.tokens == 256 and out_bytes == 2:
            slab = 64
        else:
            slab = 32 if self.tokens >= 128 and self.split == 1 else min(part, 16)
        slabs = self.consumers * 2 * slab * (32 if is_gated else 64) * out_bytes
        inbox = self.consumers * (self.split - 1) * part * 256
        return self.stages * stage + slabs + inbox + 24 * self.stages + 16 * self.consumers


def dense_tilings(spec: Linear, out_bytes: int) -> list[tuple[int, Tiling]]:
    """(tokens up to which, tiling) for a matrix; measured on an H100. Results in float32 leave less room for stages."""
    found = _dense_tilings(spec.out_features)
    return [(most, _fitting(tiling, spec, out_bytes, tiling.stages)) for most, tiling in found]


def _dense_tilings(rows: int) -> list[tuple[int, Tiling]]:
    one_wave = 66 < rows // 64 <= MULTIPROCESSORS["sm_90"]
    return [
        (16, Tiling(16, 1, 1, 1 if one_wave else 2, 20)),
        (32, Tiling(32, 1, 1, 2, 16)),
        (64, Tiling(64, 1, 1, 2, 12)),
        (128, _by_rows(rows, Tiling(128, 1, 1, 2, 7), Tiling(128, 2, 1, 2, 5), Tiling(128, 2, 1, 1, 6))),
        (256, _by_rows(rows, Tiling(128, 2, 1, 2, 5), Tiling(128, 3, 1, 2, 4), Tiling(256, 2, 1, 1, 4))),
        (512, _by_rows(rows, Tiling(128, 2, 1, 1, 6), Tiling(128, 3, 1, 1, 5), Tiling(128, 3, 1, 1, 5))),
        (1024, _by_rows(rows, Tiling(256, 2, 2, 1, 4), Tiling(128, 3, 2, 1, 5), Tiling(256, 2, 2, 1, 4))),
        (0, Tiling(256, 2, 2, 1, 4)),
    ]


# Clusters are scheduled as a whole, and those of more than two leave a few multiprocessors without one: blocks that all
# run at once, measured on an H100, by how many a multiprocessor has room for.
_ONE_WAVE = {1: 112, 2: 200}
_MOST_SPLIT, _MOST_STAGES = 6, 16


def q4_tilings(spec: Linear, out_bytes: int) -> list[tuple[int, Tiling]]:
    """Likewise. Up to 64 tokens weights must come as fast as memory gives them: all multiprocessors have blocks, which
    split k where rows are few."""
    few = [_q4_tiling(spec, out_bytes, 16, consumers=2, depth=2, blocks=2)]
    for tokens in (32, 48, 64):
        each = [_q4_tiling(spec, out_bytes, tokens, consumers, depth=2) for consumers in (4, 3)]
        few.append(max(each, key=lambda tiling: _blocks_of_a_wave(spec, tiling)))
    for tokens in (96, 128):
        many = _q4_tiling(spec, out_bytes, tokens, consumers=3)
        fits = _blocks_of_a_wave(spec, many) > 0
        few.append(many if fits else _q4_tiling(spec, out_bytes, tokens, consumers=2, depth=2))
    few.append(_q4_tiling(spec, out_bytes, 192, consumers=2))
    return [*((tiling.tokens, tiling) for tiling in few), *_large_q4_tilings(spec, out_bytes)]


_TWO_ADD_UP = 1.15  # time of a product whose k two blocks share, to half of it by one; measured on an H200


def _large_q4_tilings(spec: Linear, out_bytes: int) -> list[tuple[int, Tiling]]:
    """Beyond 192 tokens; two blocks share k for such numbers of tiles as leave many multiprocessors without one."""
    whole, halves = (_fitting(Tiling(256, 2, 1, k, 1, is_q4=True), spec, out_bytes, _MOST_STAGES) for k in (1, 2))
    rows, workers = _row_tiles(spec, whole), MULTIPROCESSORS["sm_90"]
    found = [(0, whole)]
    for tokens in range(MAX_TOKENS_PER_STEP, 0, -256):
        tiles = rows * tokens // 256
        turns, half_turns = -(-tiles // workers), -(-tiles // (workers // 2))
        pays = half_turns / 2 * _TWO_ADD_UP < turns and spec.in_features > BLOCK_K
        tiling = halves if pays else whole
        if tiling != found[0][1]:
            found.insert(0, (tokens, tiling))
    return found


def _q4_tiling(
    spec: Linear,
    out_bytes: int,
    tokens: int,
    consumers: int,
    depth: int = 1,
    blocks: int = 1,
) -> Tiling:
    """With k split as far as all blocks still run at once, and as many stages as there is shared memory for."""
    tiling = Tiling(tokens, consumers, 1, 1, 1, depth, is_q4=True, blocks=blocks)
    steps = -(-spec.in_features // (BLOCK_K * depth))
    splits = (replace(tiling, split=split) for split in range(min(_MOST_SPLIT, steps), 1, -1))
    tiling = next((each for each in splits if _blocks_of_a_wave(spec, each)), tiling)
    return _fitting(tiling, spec, out_bytes, _MOST_STAGES)


def _fitting(tiling: Tiling, spec: Linear, out_bytes: int, most: int) -> Tiling:
    """With up to `most` stages, as many as there is shared memory for."""
    room = SHARED_BYTES["sm_90"] // tiling.blocks - (RESERVED_BYTES if tiling.blocks > 1 else 0)
    stages = (replace(tiling, stages=stages) for stages in range(most, 0, -1))
    return next(each for each in stages if each.shared(out_bytes, spec.gates_result) <= room)


def _row_tiles(spec: Linear, tiling: Tiling) -> int:
    features = spec.out_features // 2 if spec.gates_result else spec.out_features
    return -(-features // tiling.features(spec.gates_result))


def _blocks_of_a_wave(spec: Linear, tiling: Tiling) -> int:
    """Of a product whose tokens fit the tile; 0 where one wave is not enough."""
    blocks = _row_tiles(spec, tiling) * tiling.split
    is_paired = tiling.blocks == 1 and tiling.split <= 2
    return blocks if blocks <= (MULTIPROCESSORS["sm_90"] if is_paired else _ONE_WAVE[tiling.blocks]) else 0


def _by_rows(rows: int, few: Tiling, some: Tiling, many: Tiling) -> Tiling:
    return few if rows <= 5120 else some if rows <= 16384 else many


def fits(spec: Linear, fmt: WeightFormat) -> bool:
    """Whether the kernels take this product: whole tiles of rows, and no bias before a gate."""
    whole = spec.out_features % (128 if spec.gates_result else 64) == 0 and spec.in_features % 32 == 0
    return whole and not (spec.gates_result and spec.has_bias) and (not fmt.is_grouped or is_q4(fmt))


def is_q4(fmt: WeightFormat) -> bool:
    return fmt.bits == 4 and fmt.group == 32 and not fmt.has_minimum


def signature(tiling: Tiling, spec: Linear, operand: str, out: str) -> tuple[str, list[str], str]:
    """(what stands before the name, parameters, body) of a kernel."""
    gated, q4 = spec.gates_result, tiling.is_q4
    numbers = (tiling.tokens, tiling.consumers, tiling.share, tiling.split, tiling.depth, tiling.stages)
    tile = f"gemm::Tiling<gemm::Weights::{'Q4' if q4 else 'DENSE'}, {', '.join(map(str, numbers))}, {cpp(gated)}>"
    has_residual = spec.has_residual and out != "float32"
    bounds = f"__launch_bounds__({tiling.threads}, {tiling.blocks})"
    before = f"__cluster_dims__({tiling.share * tiling.split}, 1, 1) {bounds}"
    maps = ["codes", "scales", "x"] if q4 else ["w", "x"]
    params = [f"const __grid_constant__ TensorMap {name}" for name in maps]
    params += ["const float* bias", "const float* residual", f"{C_TYPES[out]}* out", "int n"]
    features = spec.out_features // 2 if gated else spec.out_features
    first = "codes, scales, x" if q4 else "w, w, x"
    body = f"gemm::gemm_block<{C_TYPES[operand]}, {tile}, {cpp(has_residual)}>(gemm::Maps{{{first}}}, "
    residual = "residual" if spec.has_residual else "nullptr"
    body += f"gemm::Output<{C_TYPES[out]}>(out, bias, {residual}, n, {features}), {spec.in_features});"
    return before, params, body


def weight_map(tiling: Tiling, spec: Linear, of: list[Any], operand: str) -> list[Any]:
    """The map of dense weights, row-major; gated: 8 rows of the gate and the same 8 of the up projection in turn."""
    k, n = spec.in_features, spec.out_features
    if not spec.gates_result:
        return tensor_map(of, operand, (k, n), (2 * k,), (BLOCK_K, tiling.features(False)), SWIZZLE_128)
    half = n // 2
    dims, strides = (k, 8, 2, half // 8), (2 * k, 2 * half * k, 16 * k)
    return tensor_map(of, operand, dims, strides, (BLOCK_K, 8, 2, tiling.features(True) // 8), SWIZZLE_128)


def q4_maps(tiling: Tiling, spec: Linear, codes: list[Any], scales: list[Any]) -> list[list[Any]]:
    k, parts = spec.in_features, 2 if spec.gates_result else 1
    n = spec.out_features // parts
    tiles = tiling.consumers * 4 // parts
    words, groups = (128 * tiling.depth, parts, tiles), (32 * tiling.depth, parts, tiles)
    return [
        tensor_map(codes, "uint32", (2 * k, parts, n // 16), (n // 2 * k, 8 * k), words, NO_SWIZZLE),
        tensor_map(scales, "float16", (k // 2, parts, n // 16), (n // 16 * k, k), groups, NO_SWIZZLE),
    ]


def token_map(tiling: Tiling, spec: Linear, of: list[Any], operand: str) -> list[Any]:
    k = spec.in_features
    return tensor_map(of, operand, (k, "n"), (2 * k,), (BLOCK_K, tiling.tokens // tiling.share), SWIZZLE_128)


def tensor_map(
    of: list[Any], dtype: str, dims: Sequence[Size], strides: Sequence[int], box: Sequence[int], swizzle: int
) -> list[Any]:
    """A box of a tensor as the copy engine takes it: the innermost dimension first, strides in bytes."""
    described = {"of": of, "dtype": dtype, "dims": list(dims), "strides": list(strides), "box": list(box)}
    return ["map", {**described, "swizzle": swizzle}]
