"""Configurations of well-known models, for measuring with random weights where the weights cannot be had."""

from typing import Any

from mlcgen.checkpoint.base import Checkpoint, Tokenizer
from mlcgen.errors import CheckpointError

PRESETS: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
}


def open_preset(name: str, weights: bool) -> Checkpoint:
    """The preset without weights and tokenizer. Raises CheckpointError where weights are wanted."""
    if weights:
        raise CheckpointError(f"{name!r} is a configuration only: add --random-weights, or name a checkpoint")

    def read(parameter: str) -> Any:
        raise CheckpointError(f"{name!r} has no weights, so no tensor {parameter!r}")

    return Checkpoint(name, PRESETS[name], {}, Tokenizer(None), read, read)
