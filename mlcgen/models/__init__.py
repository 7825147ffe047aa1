"""Model architectures, one file each: file name == HF `model_type`, found by that name."""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from mlcgen.errors import UnsupportedError
from mlcgen.models.config import DecoderConfig

_SHARED = ("config", "layers", "rope")  # blocks, not architectures


def architectures() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _SHARED)


def parse_config(hf: Mapping[str, Any]) -> DecoderConfig:
    """The model's shape from the fields of a HF config.json.

    Raises UnsupportedError that names an unknown architecture, or a field that would change the result and that
    mlcgen does not honour.
    """
    model_type = hf.get("model_type")
    if model_type not in architectures():
        raise UnsupportedError(
            f"model_type {model_type!r} is not supported; have: {', '.join(architectures())}"
            f" (a new one is a file mlcgen/models/{model_type}.py)"
        )
    config: DecoderConfig = importlib.import_module(f"mlcgen.models.{model_type}").parse_config(hf)
    return config
