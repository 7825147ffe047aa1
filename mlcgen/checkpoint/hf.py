"""Hugging Face directories: config.json, tokenizer files, and safetensors in one file or many shards."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mlcgen.checkpoint.base import Array, Checkpoint, Grouped, TensorInfo, Tokenizer
from mlcgen.errors import CheckpointError, UnsupportedError
from mlcgen.json_file import read_object
from mlcgen.safetensors import Entry, read_entries, read_tensor

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BUFFERS = ("I64", "U64", "I32", "U32", "I16", "U16", "I8", "U8", "BOOL")  # position ids, masks: never parameters
FLOATS: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def open_hf(path: Path, weights: bool = True) -> Checkpoint:
    """A Hugging Face directory as a Checkpoint; `read` gives float32, float16 or bfloat16 as stored.

    generation_config.json's eos ids appear in the config as `generation_eos_token_id`. Integer buffers (position ids,
    masks) are left out of `tensors`. weights=False looks at no weight file.
    Raises CheckpointError for missing, truncated or contradictory files, UnsupportedError for weights that are
    quantized in a way that mlcgen does not read.
    """
    config = _config(path)
    entries = _entries(path) if weights else {}
    if weights:
        _refuse_quantized(path, config)
    parameters = {name: entry for name, entry in entries.items() if _is_parameter(name, entry)}
    tensors = {name: TensorInfo(e.shape, _DTYPES[e.dtype], e.num_bytes) for name, e in parameters.items()}

    def find(name: str) -> Entry:
        if name not in parameters:
            raise CheckpointError(f"{path} has no tensor {name!r} (it has {len(parameters)} others)")
        return parameters[name]

    def read(name: str) -> Array:
        entry = find(name)
        return read_tensor(entry, FLOATS[entry.dtype])

    def read_grouped(name: str) -> Grouped:
        raise UnsupportedError(f"{name} is stored as {_DTYPES[find(name).dtype]}, not in blocks; read it as floats")

    return Checkpoint(path.resolve().name, config, tensors, _tokenizer(path), read, read_grouped)


def _read_json(path: Path) -> dict[str, Any]:
    return read_object(path, CheckpointError, "download it again")


def _read_optional(path: Path) -> dict[str, Any]:
    return _read_json(path) if path.exists() else {}


def _config(path: Path) -> dict[str, Any]:
    if not (path / "config.json").exists():
        found = next(iter(sorted(path.glob("*.gguf"))), None)
        advice = f"pass {found}" if found else "pass a Hugging Face model directory or a .gguf file"
        raise CheckpointError(f"{path} has no config.json; {advice}")
    config = _read_json(path / "config.json")
    eos = _read_optional(path / "generation_config.json").get("eos_token_id")
    return config if eos is None else {**config, "generation_eos_token_id": eos}


def _tokenizer(path: Path) -> Tokenizer:
    """chat_template.jinja wins over tokenizer_config.json, as in transformers."""
    config, template = _read_optional(path / "tokenizer_config.json"), path / "chat_template.jinja"
    try:
        if template.exists():
            config["chat_template"] = template.read_text(encoding="utf-8")
        file = path / "tokenizer.json"
        return Tokenizer(file.read_bytes() if file.exists() else None, config)
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read the tokenizer in {path}: {error}") from error


def _entries(path: Path) -> dict[str, Entry]:
    if (path / _SINGLE).exists():
        return read_entries(path / _SINGLE)
    if (path / _INDEX).exists():
        return _sharded_entries(path, _weight_map(path / _INDEX))
    if any(path.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"{path} has only pickled weights (pytorch_model*.bin), which can run code and are not read; convert them: "
            "AutoModel.from_pretrained(DIR).save_pretrained(DIR) of transformers writes safetensors"
        )
    raise CheckpointError(f"{path} has neither {_SINGLE} nor {_INDEX}; download the weights too")


def _weight_map(index: Path) -> dict[str, str]:
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{index} has no 'weight_map'; download it again")
    for name, shard in shards.items():
        # A plain file name: an index from elsewhere must not make us read outside the directory.
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or set(shard) & set("/\\:\0"):
            raise CheckpointError(f"{index} puts {name[:80]!r} into {str(shard)[:80]!r}, not a .safetensors beside it")
    return shards


def _sharded_entries(path: Path, shards: Mapping[str, str]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    files = sorted(set(shards.values()))
    missing = next((shard for shard in files if not (path / shard).exists()), None)
    if missing is not None:
        raise CheckpointError(f"{path} lacks {missing!r}, which {_INDEX} names; download it too")
    for shard in files:
        for name, entry in read_entries(path / shard).items():
            if shards.get(name) != shard:
                where = repr(shards[name]) if name in shards else "nowhere"
                raise CheckpointError(
                    f"{path / shard} holds {name[:80]!r}, which {_INDEX} puts {where}; fetch both again"
                )
            entries[name] = entry
    missing = next((name for name in shards if name not in entries), None)
    if missing is not None:
        raise CheckpointError(
            f"{path / shards[missing]} lacks {missing[:80]!r}, which {_INDEX} puts there; fetch it again"
        )
    return entries


def _is_parameter(name: str, entry: Entry) -> bool:
    if entry.dtype not in FLOATS and entry.dtype not in _BUFFERS:
        raise UnsupportedError(f"{entry.path}: {name!r} is {entry.dtype}; have: {', '.join(FLOATS)}")
    return entry.dtype in FLOATS


def _refuse_quantized(path: Path, config: Mapping[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UnsupportedError(
            f"{path} is quantized with {str(method)[:40]!r}; use the float checkpoint or a GGUF file"
        )
