"""What every checkpoint reader returns: HF-style config, HF parameter names, tensors read one at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class TensorInfo:
    shape: tuple[int, ...]  # logical shape, (out_features, in_features) for a matrix
    dtype: str  # "float32", "float16", "bfloat16", or a GGUF block type such as "q4_1"
    num_bytes: int  # as stored in the source


@dataclass(frozen=True)
class Grouped:
    """A matrix in integer groups: value = (code - 2**(bits-1)) * scale, or code * scale + minimum."""

    bits: int
    group: int
    codes: Array  # (N, K) uint8
    scale: Array  # (N, K/group) float16
    minimum: Array | None  # (N, K/group) float16


@dataclass(frozen=True)
class Tokenizer:
    tokenizer_json: bytes | None  # Hugging Face `tokenizers` file
    config: Mapping[str, Any] = field(default_factory=dict)  # tokenizer_config.json: chat_template, bos_token, ...


@dataclass(frozen=True)
class Checkpoint:
    name: str
    config: Mapping[str, Any]  # the fields of HF's config.json
    tensors: Mapping[str, TensorInfo]  # by HF parameter name, e.g. model.layers.0.self_attn.q_proj.weight
    tokenizer: Tokenizer
    read: Callable[[str], Array]  # float32, float16 or bfloat16 (ml_dtypes); block types are dequantized to float32
    read_grouped: Callable[[str], Grouped]  # block types only, without going through float
