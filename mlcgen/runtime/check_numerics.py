"""Whether results are numbers, how to name the kernel whose are not, and what to tell the one who asked for them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcgen.errors import RequestError
from mlcgen.runtime.executor import Executor, StepInput

__all__ = ["described", "is_finite", "not_finite_error"]


def is_finite(result: npt.NDArray[Any]) -> bool:
    """Integers are; uint16 holds the bits of bfloat16."""
    if result.dtype == np.uint16:
        return bool(((result & 0x7F80) != 0x7F80).all())
    return result.dtype.kind != "f" or bool(np.isfinite(result).all())


def described(kernel: str, weights: Sequence[str]) -> str:
    """weights: names of those that the kernel reads, which tell the layer."""
    return f"kernel {kernel}" + (f" with {', '.join(weights)}" if weights else "")


def not_finite_error(num_tokens: int, executor: Executor | None, step: StepInput) -> RequestError:
    """Of a sequence with so many tokens. executor: None: which kernel it was is not looked for."""
    if executor is None:
        more = "; check_numerics names the kernel, and `mlcgen verify` checks the artifact"
    else:
        where = executor.first_not_finite(step)
        more = f"; the first such numbers come from {where}" if where else ", but not when the step ran again"
    return RequestError(f"the model gave NaN or infinite logits after {num_tokens} tokens{more}")
