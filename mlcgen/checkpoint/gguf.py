"""GGUF checkpoints as Hugging Face would have them: config fields, parameter names, row order, tokenizer.

A new architecture is one entry in ARCHITECTURES (and its tensors in the tables below, where it has new ones).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mlcgen.checkpoint.base import Array, Checkpoint, Grouped, TensorInfo
from mlcgen.checkpoint.gguf_blocks import dequantize, regroup
from mlcgen.checkpoint.gguf_config import ROPE_FACTORS, Metadata, hf_config, short
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
_FLOAT_TYPES: dict[str, Any] = {"float32": "<f4", "float16": "<f2", "bfloat16": ml_dtypes.bfloat16}


def open_gguf(path: Path) -> Checkpoint:
    """A GGUF file as a Checkpoint with HF names. Weights are read later, one tensor at a time.

    `read` gives float32, float16 or bfloat16 as stored; blocks are dequantized to float32. `read_grouped` gives the
    integer groups of a block-typed matrix; for K-quants its scales are rounded to float16.
    `config["rope_scaling"]` follows HF; see `_rope_scaling` for factors that no HF formula explains.
    Raises CheckpointError for a damaged file, UnsupportedError for an architecture or type that mlcgen lacks.
    """
    file = read_gguf_file(path)
    fields = Metadata(file)
    architecture = _architecture(fields)
    stored = {_hf_name(file, name): tensor for name, tensor in file.tensors.items() if name != ROPE_FACTORS}
    config = hf_config(fields, architecture.model_type, stored)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    reader = _Reader(file, stored, heads if architecture.permuted_heads else {})
    for name, tensor in stored.items():
        reader.check_heads(name, tensor)
    tensors = {name: TensorInfo(t.shape, t.kind.name, t.num_bytes) for name, t in stored.items()}
    tokenizer = build_tokenizer(path, file.metadata)
    return Checkpoint(path.stem, config, tensors, tokenizer, reader.read, reader.read_grouped)


def _architecture(fields: Metadata) -> Architecture:
    if not fields.prefix:
        raise CheckpointError(f"{fields.file.path} has no 'general.architecture' in its metadata; convert it again")
    if fields.prefix not in ARCHITECTURES:
        have = ", ".join(ARCHITECTURES)
        raise UnsupportedError(
            f"{fields.file.path}: GGUF architecture {short(fields.prefix)} is not read; have: {have}"
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
    raise UnsupportedError(f"{file.path}: tensor {short(name)} has no place in a supported architecture")


@dataclass(frozen=True)
class _Reader:
    """Reads tensors by HF name, rows in HF order."""

    file: GgufFile
    stored: Mapping[str, StoredTensor]
    heads: Mapping[str, int]  # module -> heads, where rows are permuted

    def read(self, name: str) -> Array:
        tensor = self._find(name)
        raw, order = self.file.rows(tensor), self._row_order(name, tensor)
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
        raw, order = self.file.rows(tensor), self._row_order(name, tensor)
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
            raise CheckpointError(
                f"{self.file.path}: {name} has {tensor.shape[0]} rows, which {heads} heads do not divide"
            )
        if len(tensor.shape) == 1 and tensor.kind.unpack is not None:
            raise UnsupportedError(
                f"{self.file.path}: {name} is a vector in {tensor.kind.name} blocks; convert it to floats"
            )

    def _find(self, name: str) -> StoredTensor:
        if name not in self.stored:
            raise CheckpointError(f"{self.file.path} has no tensor {name!r} (it has {len(self.stored)} others)")
        return self.stored[name]

    def _heads(self, name: str) -> int:
        return self.heads.get(name.split(".")[-2], 0)

    def _row_order(self, name: str, tensor: StoredTensor) -> Array | None:
        """Stored row of each HF row. llama.cpp stores head halves (2, head_dim/2) as pairs (head_dim/2, 2)."""
        heads = self._heads(name)
        if not heads:
            return None
        order: Array = np.arange(tensor.shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
        return order

    def _as_float16(self, name: str, scale: Array) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):
            rounded = scale.astype(np.float16)
        if not np.isfinite(rounded).all():
            raise CheckpointError(
                f"{self.file.path}: {name} has a scale that is not a finite float16; read it as floats"
            )
        return rounded


def _row_chunks(shape: tuple[int, int]) -> Iterator[slice]:
    step = max(1, CHUNK // shape[1])
    return (slice(start, start + step) for start in range(0, shape[0], step))
