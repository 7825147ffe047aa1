"""Kernels of the CPU target: functions that return a `tvm.tirx.PrimFunc` for static sizes and an instruction set.

All take a dynamic number of tokens, activations in float32, fully packed buffers, and write to their last argument(s).
"""

from .attention import paged_attention
from .embedding import embedding
from .isa import Isa
from .linear import describe_linear, linear
from .low_rank import low_rank
from .rope import rope_append

__all__ = ["Isa", "describe_linear", "embedding", "linear", "low_rank", "paged_attention", "rope_append"]
