"""Will it fit? Weights, KV cache and workspace from a model's config alone, before anything is compiled."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlcgen.errors import MlcgenError
from mlcgen.formats import WeightFormat, resolve_kv_dtype, stored_format, wanted_format
from mlcgen.models.config import DecoderConfig
from mlcgen.runtime.offload import SLOTS, layer_of

__all__ = ["Plan", "kv_bytes_per_token", "make_plan", "plan_model", "weight_bytes"]

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint16": 2, "uint8": 1}
TOKENS_PER_STEP = 512  # a step's share of the prompt that the estimate assumes


@dataclass(frozen=True)
class Plan:
    """Bytes that a compiled model needs when it runs, against what this machine has free."""

    model: str
    quantization: str
    context_length: int
    max_batch: int
    weight_bytes: int
    kv_bytes_per_token: int
    kv_bytes_one_sequence: int  # one sequence of the whole context
    kv_bytes: int  # max_batch of them
    workspace_bytes: int
    free_bytes: int
    verdict: str  # "fits", "fits with paging" or "does not fit"
    advice: str  # what to do about it; empty if it fits

    @property
    def fits(self) -> bool:
        return self.verdict != "does not fit"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan_model(
    model: str | Path,
    quantization: str = "q4",
    context_length: int | None = None,
    max_batch: int = 64,
    kv_dtype: str = "auto",
) -> Plan:
    """Plan for anything that `mlcgen compile` takes; of a hub model only the JSON files are fetched.

    Raises CheckpointError or UnsupportedError as `compile` would, and MlcgenError for values that it would refuse.
    """
    from mlcgen.checkpoint import open_checkpoint
    from mlcgen.models import parse_config
    from mlcgen.runtime.load import free_memory

    checkpoint = open_checkpoint(model, weights=False)
    config = parse_config(checkpoint.config)
    stored = {name: info.dtype for name, info in checkpoint.tensors.items()}
    context = context_length or config.max_position_embeddings
    if context > config.max_position_embeddings:
        raise MlcgenError(
            f"--context-length {context} is beyond the model's {config.max_position_embeddings}; lower --context-length"
        )
    weights = weight_bytes(config, quantization, stored)
    per_token = kv_bytes_per_token(config, resolve_kv_dtype(kv_dtype, quantization))
    return make_plan(checkpoint.name, config, quantization, weights, per_token, context, max_batch, free_memory())


def make_plan(
    name: str,
    config: DecoderConfig,
    quantization: str,
    weights: int,
    kv_per_token: int,
    context_length: int,
    max_batch: int,
    free: int,
) -> Plan:
    """The arithmetic of a plan. It fits if one whole sequence does: with fewer pages than tokens, requests wait."""
    workspace = workspace_bytes(config, max_batch)
    one = kv_per_token * context_length
    room = free - weights - workspace
    verdict = "fits" if room >= one * max_batch else "fits with paging" if room >= one else "does not fit"
    advice = "" if verdict == "fits" else _advice(verdict, quantization, room, one, kv_per_token)
    if verdict == "does not fit" and (streaming := _streaming(config, weights, free - workspace - one)):
        advice += f"; or {streaming}"
    return Plan(
        name,
        quantization,
        context_length,
        max_batch,
        weights,
        kv_per_token,
        one,
        one * max_batch,
        workspace,
        free,
        verdict,
        advice,
    )


def weight_bytes(config: DecoderConfig, quantization: str, stored: Mapping[str, str] | None = None) -> int:
    """Bytes of all weights as packed for the CPU. `stored`: each tensor's type in the source, which `gguf` keeps."""
    vectors = sum(math.prod(shape) for _, shape in _tensors(config) if len(shape) == 1)
    matrices = sum(
        matrix_bytes(_format(quantization, name, shape, stored or {}), *shape)
        for name, shape in _tensors(config)
        if len(shape) == 2
    )
    return matrices + 4 * vectors  # norms and biases are float32


def matrix_bytes(fmt: WeightFormat, n: int, k: int) -> int:
    return sum(math.prod(shape) * ITEM_BYTES[dtype] for _, shape, dtype in fmt.parts(n, k))


def kv_bytes_per_token(config: DecoderConfig, kv_dtype: str) -> int:
    return 2 * config.num_layers * config.kv_size * ITEM_BYTES[kv_dtype]


def workspace_bytes(config: DecoderConfig, max_batch: int) -> int:
    """Activations that are alive at once in the widest place of a layer, and the logits."""
    widest = 2 * config.hidden_size + max(config.q_size + 2 * config.kv_size, 3 * config.intermediate_size)
    return 4 * (TOKENS_PER_STEP * widest + max_batch * config.vocab_size)


def _tensors(config: DecoderConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """HF name and shape of every parameter."""
    hidden, q, kv, ffn = config.hidden_size, config.q_size, config.kv_size, config.intermediate_size
    linears = [
        ("self_attn.q_proj", q, hidden, config.qkv_bias),
        ("self_attn.k_proj", kv, hidden, config.qkv_bias),
        ("self_attn.v_proj", kv, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, q, config.o_bias),
        ("mlp.gate_proj", ffn, hidden, config.mlp_bias),
        ("mlp.up_proj", ffn, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, ffn, config.mlp_bias),
    ]
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        for name, n, k, has_bias in linears:
            yield f"{prefix}{name}.weight", (n, k)
            if has_bias:
                yield f"{prefix}{name}.bias", (n,)


def _format(quantization: str, name: str, shape: tuple[int, ...], stored: Mapping[str, str]) -> WeightFormat:
    if quantization.startswith("gguf") and name not in stored:
        raise MlcgenError("-q gguf keeps the blocks of a .gguf file, which this model is not; choose another -q")
    return stored_format(wanted_format(quantization, name, stored.get(name, "float32")), shape)


def _advice(verdict: str, quantization: str, room: int, one: int, kv_per_token: int) -> str:
    if verdict == "fits with paging":
        return f"the KV cache holds {room // one} whole sequences at a time; lower --max-batch or --context-length"
    tokens = room // kv_per_token
    if tokens > 0:
        return f"--context-length {tokens} or less would fit"
    return "no context fits beside the weights; " + (
        "a smaller model is needed" if quantization == "q4" else "try -q q4 or a smaller model"
    )


def _streaming(config: DecoderConfig, weights: int, budget: int) -> str:
    """What --weight-memory would do with that much for weights; empty where it is too little for two layers."""
    sizes = [(name, math.prod(shape)) for name, shape in _tensors(config)]
    in_layers = sum(size for name, size in sizes if layer_of(name) is not None)
    each = weights * in_layers // sum(size for _, size in sizes) // config.num_layers  # nearly, as packed
    held = (budget - (weights - each * config.num_layers)) // max(each, 1)  # layers that are there at a time
    if held < SLOTS:
        return ""
    streamed = (config.num_layers - (held - SLOTS)) * each
    rate = 1e9 / streamed
    return (
        f"--weight-memory {budget >> 20}MiB streams {streamed / 2**30:.1f} GiB of layers in each step: at most "
        f"{rate:.2g} tokens/s per sequence for each GB/s of the link"
    )
