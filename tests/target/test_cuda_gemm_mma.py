"""Products of many tokens without Hopper's instructions (gemm_mma.cuh) under the emulator, against NumPy."""

from dataclasses import replace

import pytest

from mlcgen.formats import BF16, F16, Q4, Q8, WeightFormat, grouped
from mlcgen.targets.base import Linear
from mlcgen.targets.cuda import ARCHS
from mlcgen.targets.cuda_kernels import gemm_mma, linear
from mlcgen.targets.cuda_kernels.gemm_mma import TILES, Tile
from mlcgen.targets.device_kernel import Variant

from .emulate_cuda import needs_compiler
from .test_cuda_linear import EPS, check

SMALLEST_SHARED_MEMORY = 99 * 1024  # that a block can have (sm_86, sm_89)


PRODUCTS = {
    "odd": (Linear(F16, 83, 40, has_bias=True), (65, 128), "float16"),
    "gate and bias": (Linear(BF16, 200, 96, gates_result=True, has_bias=True), (100, 129), "bfloat16"),
    "residual": (Linear(F16, 96, 352, has_residual=True, has_bias=True), (100, 129), "float32"),
    "bf16": (Linear(BF16, 200, 96), (65, 200), "float32"),
    "gate": (Linear(F16, 96, 40, gates_result=True), (65, 128), "float32"),
}
# Every product with the smallest tile, the first two with the others.
CASES = [(tile, name) for tile in TILES for name in list(PRODUCTS)[: None if tile == TILES[-1] else 2]]


@needs_compiler
@pytest.mark.parametrize(
    ("tile", "product"), [pytest.param(*case, id=f"{case[0].tokens}x{case[0].rows}-{case[1]}") for case in CASES]
)
def test_tiles(tile: Tile, product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An odd number of tokens runs in descending order of threads, an even one in ascending."""
    monkeypatch.setattr(gemm_mma, "TILES", (tile,))  # the only one there is
    spec, num_tokens, out = PRODUCTS[product]
    check(spec, num_tokens, out)


@needs_compiler
@pytest.mark.parametrize("shared", [64 * 1024, 48 * 1024], ids=["4 stages", "3 stages"])
def test_a_ring_that_wraps(shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_mma, "SHARED", {"sm_80": shared})
    check(Linear(F16, 32, 1096), (65,))
    check(Linear(BF16, 16, 8), (66,))  # and one that is hardly begun


@needs_compiler
@pytest.mark.parametrize("fmt", [Q4, Q8, grouped(4, 32, has_minimum=True), grouped(8, 16)], ids=lambda fmt: fmt.name)
def test_codes_are_decoded_before(fmt: WeightFormat) -> None:
    spec = Linear(fmt, 83, 96, has_bias=True)
    assert [name.split("_")[0] for name in names(last(spec, "sm_80"))] == ["decode", "gemm"]
    check(spec, (65, 100))
    check(Linear(fmt, 96, 64, norm_eps=EPS, gates_result=True), (129,), "float16")


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch != "sm_90"])
@pytest.mark.parametrize("fmt", [F16, Q8, Q4], ids=lambda fmt: fmt.name)
def test_up_to_64_tokens_weights_stream(fmt: WeightFormat, arch: str) -> None:
    spec = Linear(fmt, 4096, 4096, gates_result=True)
    variants = linear(spec, arch).generate(dtypes(spec)).variants
    assert [v.when[2] for v in variants if names(v)[-1].startswith("linear_")] == [4, 8, 16, 32, 64]
    assert "gemm_mma" in names(variants[5])[-1]
    assert "gemm_mma" in names(variants[-1])[-1]


@pytest.mark.parametrize("fmt", [F16, Q8, Q4], ids=lambda fmt: fmt.name)
def test_hopper_has_a_better_kernel(fmt: WeightFormat) -> None:
    assert not many(Linear(fmt, 4096, 4096), "sm_90")


def test_hopper_takes_it_for_what_wgmma_does_not() -> None:
    for spec in (Linear(F16, 83, 96), Linear(BF16, 256, 96, gates_result=True, has_bias=True), Linear(Q4, 96, 96)):
        assert "gemm_mma" in names(last(spec, "sm_90"))[-1]


def test_a_vocabulary_is_not_decoded() -> None:
    head = Linear(Q4, 128256, 64)
    assert [name.split("_")[0] for name in names(last(head, "sm_86"))] == ["linear"]
    assert linear(head, "sm_86").generate(dtypes(head)).scratch == ["+", 0, 0]
    assert "gemm_mma" in names(last(replace(head, fmt=F16), "sm_86"))[-1]


@pytest.mark.parametrize("arch", ARCHS)
def test_tiles_fit_and_are_chosen_for_more_and_more_tokens(arch: str) -> None:
    for rows in (16, 83, 576, 4096, 14336, 128256):
        spec = Linear(F16, rows, 4096, has_bias=True)
        choices = gemm_mma.choices(rows, arch)
        limits = [most for most, _ in choices]
        assert limits == [*sorted(limits[:-1]), 0]
        if arch != "sm_90":
            assert all(v.launches[-1].shared <= SMALLEST_SHARED_MEMORY for v in many(spec, arch))


def dtypes(spec: Linear) -> list[str]:
    """With the narrowest types for what the kernel exchanges with others."""
    return [p.narrow[0] if p.narrow else p.dtype for p in linear(spec, "sm_80").params]


def many(spec: Linear, arch: str) -> list[Variant]:
    variants = linear(spec, arch).generate(dtypes(spec)).variants
    return [v for v in variants if names(v)[-1].startswith("gemm_mma")]


def last(spec: Linear, arch: str) -> Variant:
    """For the most tokens."""
    return linear(spec, arch).generate(dtypes(spec)).variants[-1]


def names(variant: Variant) -> list[str]:
    return [launch.function for launch in variant.launches]
