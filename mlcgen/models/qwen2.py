"""Qwen 2 and 2.5: Llama with a bias on q, k and v (Yang et al. 2024)."""

from collections.abc import Mapping
from typing import Any

from mlcgen.errors import UnsupportedError
from mlcgen.models.config import DecoderConfig, parse_decoder


def parse_config(hf: Mapping[str, Any]) -> DecoderConfig:
    # `sliding_window` means nothing while `use_sliding_window` is off, which parse_decoder holds us to.
    for kind in hf.get("layer_types") or ():
        if kind != "full_attention":
            raise UnsupportedError(f"config field 'layer_types' has {kind!r}; qwen2 has: 'full_attention'")
    return parse_decoder(hf, ("sliding_window", "layer_types", "attention_bias", "mlp_bias"), qkv_bias=True)
