"""What a model's prefill computes and its decode reads, from the artifact's own report: bytes and FLOPs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcgen import artifact
from mlcgen.checkpoint import open_checkpoint
from mlcgen.runtime.kv_size import page_bytes

LOOKUPS = ("embedding", "take")  # kernels that read a row of their weights for each token, not all of them


@dataclass(frozen=True)
class DecodeReads:
    """What one decode step of one sequence reads, in bytes."""

    weights: int
    kv_per_token: int

    def step(self, cached_tokens: float) -> float:
        return self.weights + self.kv_per_token * cached_tokens


def artifact_reads(path: Path, manifest: Mapping[str, Any], target: str) -> DecodeReads:
    kernels = artifact.read_report(path)[target]["kernels"]
    weights = sum(k["weight_bytes"] for k in kernels if not k["name"].startswith(LOOKUPS))
    return DecodeReads(weights, page_bytes(manifest["kv"]) // manifest["kv"]["page_size"])


def gguf_reads(file: Path, kv: Mapping[str, Any]) -> DecodeReads:
    """Of an engine that reads the file's own blocks and keeps keys and values in float16, as llama.cpp does."""
    tensors = open_checkpoint(file).tensors
    lookup = "model.embed_tokens.weight" if "lm_head.weight" in tensors else None
    weights = sum(tensor.num_bytes for name, tensor in tensors.items() if name != lookup)
    return DecodeReads(weights, page_bytes({**kv, "dtype": "float16", "page_size": 1}))


def torch_reads(manifest: Mapping[str, Any]) -> DecodeReads:
    """Of the Llama in float16 that bench/torch_engine.py builds: all matrices, keys and values."""
    model = manifest["model"]
    hidden, dim = model["hidden_size"], model["head_dim"]
    attention = hidden * dim * (2 * model["num_heads"] + 2 * model["num_kv_heads"])
    block = attention + 3 * hidden * model["intermediate_size"]
    kv = 2 * model["num_layers"] * model["num_kv_heads"] * dim
    return DecodeReads(2 * (model["num_layers"] * block + model["vocab_size"] * hidden), 2 * kv)


def prefill_flops(path: Path, manifest: Mapping[str, Any], target: str, tokens: int) -> int:
    """Multiplications and additions of the matrices and of causal attention, with the logits of the last token only.

    0 if the report does not say.
    """
    model = manifest["model"]
    all_linear = sum(k["calls"] * k["flops_per_token"] for k in artifact.read_report(path)[target]["kernels"])
    if not all_linear:
        return 0
    head = 2 * model["vocab_size"] * model["hidden_size"]
    attention = 4 * model["num_heads"] * model["head_dim"] * model["num_layers"]  # per token and token it looks at
    return tokens * (all_linear - head) + head + attention * tokens * (tokens + 1) // 2
