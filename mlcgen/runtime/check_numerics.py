"""Whether a kernel's results are numbers, and how to name the kernel."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["described", "is_finite"]


def is_finite(result: npt.NDArray[Any]) -> bool:
    """Integers are; uint16 holds the bits of bfloat16."""
    if result.dtype == np.uint16:
        return bool(((result & 0x7F80) != 0x7F80).all())
    return result.dtype.kind != "f" or bool(np.isfinite(result).all())


def described(kernel: str, weights: Sequence[str]) -> str:
    """weights: names of those that the kernel reads, which tell the layer."""
    return f"kernel {kernel}" + (f" with {', '.join(weights)}" if weights else "")
