"""The kernels of WebGPU's devices: each .py says which WGSL (.wgsl) runs for how many tokens, and with which sizes."""

from .attention import HEAD_DIMS, paged_attention
from .linear import linear
from .lookup import embedding, rope_append
from .low_rank import low_rank
from .sample import argmax, sampling, take_tokens

__all__ = [
    "HEAD_DIMS",
    "argmax",
    "embedding",
    "linear",
    "low_rank",
    "paged_attention",
    "rope_append",
    "sampling",
    "take_tokens",
]
