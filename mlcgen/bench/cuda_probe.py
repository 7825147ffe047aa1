"""A GPU's peaks: how fast it copies memory, and multiplies matrices by NVIDIA's library, where PyTorch brings that."""

import importlib.util
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

from mlcgen.runtime.cuda import CudaDevice

SIZE = 1 << 30  # bytes of a copy: far more than any cache
MATRIX = 8192
SECONDS = 0.2  # to spend on each figure


def open_cuda_probe() -> Callable[..., dict[str, Any]]:
    """`sizes` are not looked at: what a GPU reads does not stay in its cache."""
    device = CudaDevice()
    source, to = (device.allocate(SIZE, "the probe") for _ in range(2))

    def measure(sizes: Sequence[int]) -> dict[str, Any]:
        copied = 2 * SIZE / fastest(lambda: device.copy(to, source, SIZE), device.synchronize)
        ops = {"float16": _matmul_ops()} if importlib.util.find_spec("torch") else {}
        return {"bytes_per_s": dict.fromkeys(map(str, sizes), copied), "ops_per_s": ops}

    return measure


def _matmul_ops() -> float:
    import torch

    a, b = (torch.randn(MATRIX, MATRIX, device="cuda", dtype=torch.float16) for _ in range(2))
    return 2 * MATRIX**3 / fastest(lambda: a @ b, torch.cuda.synchronize)


def fastest(work: Callable[[], Any], wait: Callable[[], Any], at_once: int = 5) -> float:
    """Seconds of one call, of several started at once."""
    best, end = float("inf"), perf_counter() + SECONDS
    while perf_counter() < end:
        wait()
        start = perf_counter()
        for _ in range(at_once):
            work()
        wait()
        best = min(best, (perf_counter() - start) / at_once)
    return best
