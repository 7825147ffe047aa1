"""GGUF checkpoints as Hugging Face would have them: config fields, parameter names, row order, tokenizer.

A new architecture is one entry in ARCHITECTURES (and its tensors in the tables below, where it has new ones).
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mlcgen.checkpoint.base import Array, Checkpoint, Grouped, TensorInfo
from mlcgen.checkpoint.gguf_blocks import dequantize, regroup
from mlcgen.checkpoint.gguf_header import GgufFile, StoredTensor, read_gguf_file
from mlcgen.checkpoint.gguf_tokenizer import build_tokenizer
from mlcgen.errors import CheckpointError, UnsupportedError

CHUNK = 1 << 20  # weights taken apart at a time: the temporaries stay at a few MiB


@dataclass(frozen=True)
class Architecture:
    model_type: str
    permuted_heads: bool = False  # llama.cpp stores the q and k rows of each head in interleaved-rope order


ARCHITECTURES = {
    "llama": Architecture("llama", permuted_heads=True),
    "qwen2": Architecture("qwen2"),
}

_GLOBAL_MODULES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"  # llama3 rope scaling, baked into one divisor per frequency
_FLOAT_TYPES: dict[str, Any] = {"float32": "<f4", "float16": "<f2", "bfloat16": ml_dtypes.bfloat16}


def open_gguf(path: Path) -> Checkpoint:
    """A GGUF file as a Checkpoint with HF names. Weights are read later, one tensor at a time.

    `read` gives float32, float16 or bfloat16 as stored; blocks are dequantized to float32. `read_grouped` gives the
    integer groups of a block-typed matrix; for K-quants its scales are rounded to float16.
    `config["rope_scaling"]` follows HF; see `_rope_scaling` for factors that no HF formula explains.
    Raises CheckpointError for a damaged file, UnsupportedError for an architecture or type that mlcgen lacks.
    """
    file = read_gguf_file(path)
    fields = _Metadata(file)
    architecture = _architecture(fields)
    stored = {_hf_name(file, name): tensor for name, tensor in file.tensors.items() if name != _ROPE_FACTORS}
    config = _config(fields, architecture, stored)
    heads = _permuted_heads(config) if architecture.permuted_heads else {}
    reader = _Reader(path, stored, heads)
    for name, tensor in stored.items():
        reader.check_heads(name, tensor)
    tensors = {name: TensorInfo(t.shape, t.kind.name, t.num_bytes) for name, t in stored.items()}
    tokenizer = build_tokenizer(path, file.metadata)
    return Checkpoint(path.stem, config, tensors, tokenizer, reader.read, reader.read_grouped)


class _Metadata:
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
            raise CheckpointError(f"{self.file.path}: metadata {full!r} is {_short(value)}, not one {kind.__name__}")
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
        return single if math.isfinite(single) else value

    def text(self, key: str, default: str) -> str:
        return str(self._get(key, str, default))

    def has(self, key: str) -> bool:
        return f"{self.prefix}.{key}" in self.file.metadata


def _short(value: object) -> str:
    return repr(value)[:60].replace("\n", " ")


def _architecture(fields: _Metadata) -> Architecture:
    if not fields.prefix:
        raise CheckpointError(f"{fields.file.path} has no 'general.architecture' in its metadata; convert it again")
    if fields.prefix not in ARCHITECTURES:
        have = ", ".join(ARCHITECTURES)
        raise UnsupportedError(
            f"{fields.file.path}: GGUF architecture {_short(fields.prefix)} is not read; have: {have}"
        )
    if fields.has("expert_count"):
        raise UnsupportedError(f"{fields.file.path}: mixture-of-experts GGUF files are not read; use the HF directory")
    return ARCHITECTURES[fields.prefix]


def _hf_name(file: GgufFile, name: str) -> str:
    match = re.fullmatch(r"(?:blk\.(0|[1-9][0-9]{0,4})\.)?([a-z_]+)\.(weight|bias)", name)
    layer, module, part = match.groups() if match else (None, "", "")
    if layer is not None and module in _LAYER_MODULES:
        return f"model.layers.{layer}.{_LAYER_MODULES[module]}.{part}"
    if layer is None and module in _GLOBAL_MODULES:
        return f"{_GLOBAL_MODULES[module]}.{part}"
    raise UnsupportedError(f"{file.path}: tensor {_short(name)} has no place in a supported architecture")


# --- config ---------------------------------------------------------------------------------------------------------


def _config(fields: _Metadata, architecture: Architecture, stored: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """The fields of HF's config.json. `torch_dtype` is that of `read` for most of the weights."""
    hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    head_dim = fields.integer("attention.key_length", hidden // heads)
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedError(f"{fields.file.path}: attention keys and values of different length are not read")
    first = "model.layers.0"
    config = {
        "model_type": architecture.model_type,
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


def _num_layers(fields: _Metadata, stored: Mapping[str, StoredTensor]) -> int:
    present = {int(match[1]) for name in stored if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    count = fields.integer("block_count")
    if present and (len(present) != count or max(present) != count - 1):
        raise CheckpointError(
            f"{fields.file.path}: {fields.prefix}.block_count is {count} but the tensors are those of {len(present)} "
            f"layers, the last {max(present)}; a part of a split file cannot be read alone"
        )
    return count


def _vocab_size(fields: _Metadata, stored: Mapping[str, StoredTensor]) -> int:
    if "model.embed_tokens.weight" in stored:
        return stored["model.embed_tokens.weight"].shape[0]
    tokens = fields.file.metadata.get("tokenizer.ggml.tokens", [])
    return fields.integer("vocab_size", len(tokens) if isinstance(tokens, list) else 0)


def _torch_dtype(stored: Mapping[str, StoredTensor]) -> str:
    sizes: dict[str, int] = {}
    for tensor in stored.values():
        dtype = tensor.kind.name if tensor.kind.name in _FLOAT_TYPES else "float32"
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


def _rope_scaling(fields: _Metadata, head_dim: int) -> dict[str, Any] | None:
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
    raise UnsupportedError(f"{fields.file.path}: rope scaling {_short(kind)} is not read; have: linear, yarn, llama3")


def _yarn_scaling(fields: _Metadata) -> dict[str, Any]:
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
    tensor = file.tensors.get(_ROPE_FACTORS)
    if tensor is None:
        return None
    if tensor.kind.name != "float32" or len(tensor.shape) != 1:
        raise CheckpointError(
            f"{file.path}: {_ROPE_FACTORS} is {tensor.kind.name} {tensor.shape}, not a float32 vector"
        )
    factors: Array = _raw_rows(file.path, tensor).view("<f4").reshape(-1).astype(np.float64)
    return factors


def _llama3_scaling(fields: _Metadata, factors: Array, head_dim: int) -> dict[str, Any] | None:
    if len(factors) != head_dim // 2 or not (np.isfinite(factors).all() and (factors > 0).all()):
        raise CheckpointError(
            f"{fields.file.path}: {_ROPE_FACTORS} must be {head_dim // 2} positive numbers, has {len(factors)}"
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
    """Fit the smooth part: smooth = (original / wavelength - low) / (high - low) is a line in 1 / wavelength.

    Only original : low : high shows in the factors, so `original` may be chosen.
    """
    factor = float(factors.max())
    between = (factors > factors.min()) & (factors < factor)
    if factor <= 1 or between.sum() < 2:
        return None
    smooth = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
    slope, offset = np.polyfit(1 / wavelength[between], smooth, 1)
    if slope <= 0:
        return None
    span = original / slope  # high - low
    low = -offset * span
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


# --- tensors --------------------------------------------------------------------------------------------------------


def _permuted_heads(config: Mapping[str, Any]) -> dict[str, int]:
    return {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}


@dataclass(frozen=True)
class _Reader:
    path: Path
    stored: Mapping[str, StoredTensor]
    heads: Mapping[str, int]  # module -> heads, where rows are permuted

    def read(self, name: str) -> Array:
        tensor = self._find(name)
        raw, order = _raw_rows(self.path, tensor), self._row_order(name, tensor)
        if tensor.kind.unpack is None:
            values = np.array(raw) if order is None else raw[order]
            return values.view(_FLOAT_TYPES[tensor.kind.name]).reshape(tensor.shape)
        out = np.empty((len(raw), tensor.shape[-1]), np.float32)
        for rows in _row_chunks(out.shape):
            out[rows] = dequantize(tensor.kind, raw[rows if order is None else order[rows]])
        return out.reshape(tensor.shape)

    def read_grouped(self, name: str) -> Grouped:
        tensor = self._find(name)
        kind = tensor.kind
        if kind.unpack is None or len(tensor.shape) != 2:
            raise UnsupportedError(f"{name} is {kind.name} {tensor.shape}, not a matrix in blocks; read it as floats")
        raw, order = _raw_rows(self.path, tensor), self._row_order(name, tensor)
        codes, scales = np.empty(tensor.shape, np.uint8), (tensor.shape[0], tensor.shape[1] // kind.group)
        scale, minimum = np.empty(scales, np.float16), np.empty(scales, np.float16)
        has_minimum = False
        for rows in _row_chunks(tensor.shape):
            part = regroup(kind, raw[rows if order is None else order[rows]])
            codes[rows], scale[rows] = part.codes, self._as_float16(name, part.scale)
            if part.minimum is not None:
                minimum[rows], has_minimum = self._as_float16(name, part.minimum), True
        return Grouped(kind.bits, kind.group, codes, scale, minimum if has_minimum else None)

    def check_heads(self, name: str, tensor: StoredTensor) -> None:
        heads = self._heads(name)
        if not heads:
            return
        if tensor.shape[0] % (2 * heads):
            raise CheckpointError(f"{self.path}: {name} has {tensor.shape[0]} rows, which {heads} heads do not divide")
        if len(tensor.shape) == 1 and tensor.kind.unpack is not None:
            raise UnsupportedError(
                f"{self.path}: {name} is a vector in {tensor.kind.name} blocks; convert it to floats"
            )

    def _find(self, name: str) -> StoredTensor:
        if name not in self.stored:
            raise CheckpointError(f"{self.path} has no tensor {name!r} (it has {len(self.stored)} others)")
        return self.stored[name]

    def _heads(self, name: str) -> int:
        return self.heads.get(name.split(".")[-2], 0)

    def _row_order(self, name: str, tensor: StoredTensor) -> Array | None:
        """Stored row of each HF row. llama.cpp turns the halves of a head (2, head_dim/2) into pairs (head_dim/2, 2)."""
        heads = self._heads(name)
        if not heads:
            return None
        order: Array = np.arange(tensor.shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
        return order

    def _as_float16(self, name: str, scale: Array) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):
            rounded = scale.astype(np.float16)
        if not np.isfinite(rounded).all():
            raise CheckpointError(f"{self.path}: {name} has a scale that is not a finite float16; read it as floats")
        return rounded


def _raw_rows(path: Path, tensor: StoredTensor) -> Array:
    """The stored bytes, mapped: (rows, bytes per row) uint8. A vector of floats has one element per row."""
    try:
        flat = np.memmap(path, np.uint8, "r", tensor.offset, (tensor.num_bytes,))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; was it changed since it was opened?") from error
    is_float_vector = len(tensor.shape) == 1 and tensor.kind.unpack is None
    return flat.reshape(-1, tensor.kind.row_bytes(1 if is_float_vector else tensor.shape[-1]))


def _row_chunks(shape: tuple[int, int]) -> Iterator[slice]:
    step = max(1, CHUNK // shape[1])
    return (slice(start, start + step) for start in range(0, shape[0], step))
