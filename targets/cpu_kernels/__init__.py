"""Kernels of the CPU target: functions that return a `tvm.tirx.PrimFunc` for static sizes and an instruction set.

All take a dynamic number of tokens, activations in float32, fully packed buffers, and write to their last argument(s).
"""

from .activation import silu_mul
from .attention import paged_attention
from .embedding import embedding
from .isa import Isa
from .linear import linear
from .norm import add_rms_norm, rms_norm
from .rope import rope_append

__all__ = ["Isa", "add_rms_norm", "embedding", "linear", "paged_attention", "rms_norm", "rope_append", "silu_mul"]
