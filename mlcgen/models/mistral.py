"""Mistral: Llama whose tokens may see only the last `sliding_window` ones (Jiang et al. 2023)."""

from collections.abc import Mapping
from typing import Any

from mlcgen.models.config import DecoderConfig, parse_decoder, parse_window


def parse_config(hf: Mapping[str, Any]) -> DecoderConfig:
    return parse_decoder(hf, ("sliding_window",), window=parse_window(hf, default=4096))
