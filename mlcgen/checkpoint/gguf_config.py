"""GGUF metadata as the fields of HF's config.json, with rope scaling recovered."""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlcgen.checkpoint.base import Array
from mlcgen.checkpoint.gguf_header import GgufFile, StoredTensor
from mlcgen.errors import CheckpointError, UnsupportedError

ROPE_FACTORS = "rope_freqs.weight"  # llama3 rope scaling, baked into one divisor per frequency


class Metadata:
    """Typed look-ups: a missing, mistyped or absurd value is a CheckpointError that names the key."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.prefix = str(file.metadata.get("general.architecture", ""))

    def _get(self, key: str, kind: type, default: Any) -> Any:
        full = f"{self.prefix}.{key}"
        value = self.file.metadata.get(full, default)
        if value is None:
            raise CheckpointError(f"{self.file.path} has no {full!r} in its metadata; convert the model again")
        if isinstance(value, bool) or not isinstance(value, kind):
            raise CheckpointError(f"{self.file.path}: metadata {full!r} is {short(value)}, not one {kind.__name__}")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = int(self._get(key, int, default))
        if not 1 <= value < 1 << 31:
            raise CheckpointError(f"{self.file.path}: metadata {self.prefix}.{key} is {value}, out of range")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = float(self._get(key, float, default))
        if not (math.isfinite(value) and value > 0):
            raise CheckpointError(f"{self.file.path}: metadata {self.prefix}.{key} is {value}, not a positive number")
        with np.errstate(over="ignore"):
            single = float(str(np.float32(value)))  # 9.999999747378752e-06 was written as 1e-05
        return single if 0 < single < math.inf else value

    def text(self, key: str, default: str) -> str:
        return str(self._get(key, str, default))

    def has(self, key: str) -> bool:
        """Whether the key is there and says something: 0 and false switch a feature off."""
        value = self.file.metadata.get(f"{self.prefix}.{key}")
        return value is not None and not (isinstance(value, int) and value == 0)


def short(value: object) -> str:
    return repr(value)[:60].replace("\n", " ")


def hf_config(fields: Metadata, model_type: str, stored: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """The fields of HF's config.json. `torch_dtype` is that of `read` for most of the weights."""
    hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    head_dim = fields.integer("attention.key_length", hidden // heads)
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedError(f"{fields.file.path}: attention keys and values of different length are not read")
    if fields.integer("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedError(f"{fields.file.path}: rotary embedding of a part of each head is not read")
    first = "model.layers.0"
    config = {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": fields.integer("feed_forward_length"),
        "num_hidden_layers": _num_layers(fields, stored),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(fields, head_dim),
        "max_position_embeddings": fields.integer("context_length"),
        "vocab_size": _vocab_size(fields, stored),
        "tie_word_embeddings": "lm_head.weight" not in stored,
        "attention_bias": f"{first}.self_attn.q_proj.bias" in stored,
        "mlp_bias": f"{first}.mlp.gate_proj.bias" in stored,
        "torch_dtype": _torch_dtype(stored),
    }
    if fields.has("attention.sliding_window"):
        config["sliding_window"] = fields.integer("attention.sliding_window")
    return config | _token_ids(fields.file)


def _num_layers(fields: Metadata, stored: Mapping[str, StoredTensor]) -> int:
    present = {int(match[1]) for name in stored if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    count = fields.integer("block_count")
    if present and (len(present) != count or max(present) != count - 1):
        raise CheckpointError(
            f"{fields.file.path}: {fields.prefix}.block_count is {count} but the tensors are those of {len(present)} "
            f"layers, the last {max(present)}; a part of a split file cannot be read alone"
        )
    return count


def _vocab_size(fields: Metadata, stored: Mapping[str, StoredTensor]) -> int:
    if "model.embed_tokens.weight" in stored:
        return stored["model.embed_tokens.weight"].shape[0]
    tokens = fields.file.metadata.get("tokenizer.ggml.tokens", [])
    return fields.integer("vocab_size", len(tokens) if isinstance(tokens, list) else 0)


def _torch_dtype(stored: Mapping[str, StoredTensor]) -> str:
    sizes: dict[str, int] = {}
    for tensor in stored.values():
        dtype = "float32" if tensor.kind.unpack else tensor.kind.name
        sizes[dtype] = sizes.get(dtype, 0) + math.prod(tensor.shape)
    return max(sizes, key=sizes.__getitem__, default="float32")


def _token_ids(file: GgufFile) -> dict[str, Any]:
    """bos and eos; generation also stops at the end of a turn where that is another token."""
    ids = {
        f"{name}_token_id": value
        for name in ("bos", "eos", "eot")
        if type(value := file.metadata.get(f"tokenizer.ggml.{name}_token_id")) is int
    }
    turn, end = ids.pop("eot_token_id", None), ids.get("eos_token_id")
    if turn is None or turn == end:
        return ids
    return {**ids, "generation_eos_token_id": [turn] if end is None else [end, turn]}


# --- rope scaling ---------------------------------------------------------------------------------------------------


def _rope_scaling(fields: Metadata, head_dim: int) -> dict[str, Any] | None:
    """HF's `rope_scaling`, or None.

    `linear` and `yarn` are in the metadata. llama3 scaling is stored as the tensor rope_freqs: its fields are recovered
    where HF's formula gives these factors back; else they are passed on as {"rope_type": "factors", "factors": [...]},
    head_dim/2 divisors of the inverse frequencies.
    """
    factors = _rope_factors(fields.file)
    if factors is not None:
        return _llama3_scaling(fields, factors, head_dim)
    kind = fields.text("rope.scaling.type", "linear" if fields.has("rope.scale_linear") else "none")
    if kind == "none":
        return None
    if kind == "linear":
        factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 1.0))
        return None if factor == 1 else {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return _yarn_scaling(fields)
    raise UnsupportedError(f"{fields.file.path}: rope scaling {short(kind)} is not read; have: linear, yarn, llama3")


def _yarn_scaling(fields: Metadata) -> dict[str, Any]:
    original = fields.integer("rope.scaling.original_context_length", fields.integer("context_length"))
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": fields.number("rope.scaling.factor"),
        "original_max_position_embeddings": original,
    }
    if fields.has("rope.scaling.attn_factor"):
        scaling["attention_factor"] = fields.number("rope.scaling.attn_factor")
    for key in ("beta_fast", "beta_slow"):
        if fields.has(f"rope.scaling.yarn_{key}"):
            scaling[key] = fields.number(f"rope.scaling.yarn_{key}")
    return scaling


def _rope_factors(file: GgufFile) -> Array | None:
    tensor = file.tensors.get(ROPE_FACTORS)
    if tensor is None:
        return None
    if tensor.kind.name != "float32" or len(tensor.shape) != 1:
        raise CheckpointError(f"{file.path}: {ROPE_FACTORS} is {tensor.kind.name} {tensor.shape}, not a float32 vector")
    factors: Array = file.rows(tensor).view("<f4").reshape(-1).astype(np.float64)
    return factors


def _llama3_scaling(fields: Metadata, factors: Array, head_dim: int) -> dict[str, Any] | None:
    if len(factors) != head_dim // 2 or not (np.isfinite(factors).all() and (factors > 0).all()):
        raise CheckpointError(
            f"{fields.file.path}: {ROPE_FACTORS} must be {head_dim // 2} positive numbers, has {len(factors)}"
        )
    if (factors == 1).all():
        return None
    theta = fields.number("rope.freq_base", 10000.0)
    wavelength = 2 * np.pi * theta ** (np.arange(len(factors)) / len(factors))
    original = fields.integer("rope.scaling.original_context_length", 8192)
    scaling = _solve_llama3(factors, wavelength, original)
    if scaling is not None and np.allclose(_llama3_factors(scaling, wavelength), factors, rtol=1e-5):
        return scaling
    return {"rope_type": "factors", "factors": factors.tolist()}


def _solve_llama3(factors: Array, wavelength: Array, original: int) -> dict[str, Any] | None:
    """From two points of the smooth part, smooth = (original / wavelength - low) / (high - low).

    Only original : low : high shows in the factors, so `original` may be chosen.
    """
    factor = float(factors.max())
    between = (factors > factors.min()) & (factors < factor)
    if factor <= 1 or between.sum() < 2:
        return None
    smooth = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
    turns = original / wavelength[between]
    if turns[0] == turns[-1] or smooth[0] <= smooth[-1]:
        return None
    span = (turns[0] - turns[-1]) / (smooth[0] - smooth[-1])  # high - low
    low = turns[0] - smooth[0] * span
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": round(float(low), 3),
        "high_freq_factor": round(float(low + span), 3),
        "original_max_position_embeddings": original,
    }


def _llama3_factors(scaling: Mapping[str, Any], wavelength: Array) -> Array:
    """The divisors of the inverse frequencies in HF's `_compute_llama3_parameters`."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    if low >= high:
        return np.full_like(wavelength, np.nan)
    smooth = (scaling["original_max_position_embeddings"] / wavelength - low) / (high - low)
    smooth = np.clip(smooth, 0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)
