"""Llama 1 to 3, SmolLM2 and what else calls itself `llama` (Touvron et al. 2023)."""

from collections.abc import Mapping
from typing import Any

from mlcgen.models.config import DecoderConfig, parse_decoder


def parse_config(hf: Mapping[str, Any]) -> DecoderConfig:
    attention_bias, mlp_bias = bool(hf.get("attention_bias")), bool(hf.get("mlp_bias"))
    return parse_decoder(
        hf, ("attention_bias", "mlp_bias"), qkv_bias=attention_bias, o_bias=attention_bias, mlp_bias=mlp_bias
    )
