"""Adapters as PEFT saves them, written without PEFT."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Pair = tuple[np.ndarray, np.ndarray]  # A (r, in), B (out, r)
CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "some/model",
    "task_type": "CAUSAL_LM",
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "use_dora": False,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_modules": ["q_proj", "v_proj"],
}


def random_pairs(
    shapes: Mapping[str, tuple[int, int]], rank: int, seed: int = 0, scale: float = 0.3
) -> dict[str, Pair]:
    """shapes: module -> (out, in)."""
    rng = np.random.default_rng(seed)

    def matrix(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    return {module: (matrix(rank, k), matrix(n, rank)) for module, (n, k) in shapes.items()}


def tensors_of(pairs: Mapping[str, Pair]) -> dict[str, np.ndarray]:
    names = {
        f"base_model.model.{module}.lora_{part}.weight": m
        for module, pair in pairs.items()
        for part, m in zip("AB", pair, strict=True)
    }
    return dict(names)


def write_adapter(path: Path, pairs: Mapping[str, Pair], alpha: float = 16, **config: Any) -> Path:
    """The folder `path`; the rank is that of the first pair unless the config says another."""
    path.mkdir(parents=True, exist_ok=True)
    rank = next(iter(pairs.values()))[0].shape[0] if pairs else 1
    fields = {**CONFIG, "r": rank, "lora_alpha": alpha, **config}
    (path / "adapter_config.json").write_text(json.dumps(fields))
    save_file(tensors_of(pairs), path / "adapter_model.safetensors")
    return path
