"""bfloat16 as NumPy, which has no such type, keeps it: the upper halves of float32s, as uint16."""

import numpy as np
import numpy.typing as npt

from mlcgen.runtime.executor import Float32

__all__ = ["from_float32", "to_float32"]


def to_float32(bits: npt.NDArray[np.uint16]) -> Float32:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def from_float32(values: Float32) -> npt.NDArray[np.uint16]:
    """Rounded to nearest, ties to even. NaN may become another number: values are finite."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
