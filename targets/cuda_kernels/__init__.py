"""The kernels of a CUDA target: each .py says which CUDA C++ (.cuh) runs for how many tokens, and with which sizes."""

from .attention import HEAD_DIMS, paged_attention, rope_attention
from .linear import linear
from .lookup import embedding, rope_append
from .low_rank import low_rank

__all__ = ["HEAD_DIMS", "embedding", "linear", "low_rank", "paged_attention", "rope_append", "rope_attention"]
