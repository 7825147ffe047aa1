"""The whole story on one page: checkpoint -> IRModule -> passes -> target -> artifact."""

import dataclasses
import errno
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlcgen import artifact, weights
from mlcgen.adapter_layout import MAX_RANK, MAX_SLOTS, AdapterLimits
from mlcgen.checkpoint import Checkpoint, open_checkpoint
from mlcgen.compile_target import (
    Compiled,
    Observer,
    Options,
    Progress,
    build_functions,
    carry_runtime,
    compile_targets,
)
from mlcgen.errors import CompileError, UnsupportedError
from mlcgen.formats import QUANTIZATIONS, resolve_kv_dtype
from mlcgen.models import parse_config
from mlcgen.models.config import DecoderConfig
from mlcgen.models.layers import export
from mlcgen.passes.paged_attention import KvLayout
from mlcgen.passes.rewrite import FORWARD, static_shape
from mlcgen.targets import resolve
from mlcgen.targets.base import Target


def compile(
    model: str | Path,
    targets: Sequence[str] = ("cpu",),
    quantization: str = "q4",
    output: str | Path | None = None,
    *,
    context_length: int | None = None,
    max_batch: int = 64,
    kv_dtype: str = "auto",
    page_size: int = 16,
    layers: int | None = None,
    dump_ir: str | Path | None = None,
    random_weights: bool = False,
    lora_rank: int | None = None,
    adapters: int = 8,
    progress: Progress | None = None,
    log: Callable[[str], None] | None = None,
) -> Path:
    """Compile `model` (an HF directory, a .gguf file, a hub id or a model package's name) into an artifact directory.

    targets: such as "cpu", "cpu:x86-64-v3". quantization: f32, f16, bf16, q8, q4 or gguf; q8a8, q4a8 and ggufa8 round
    activations to 8 bits too. context_length: tokens of the longest sequence, at most and by default the model's.
    max_batch: sequences in one step. kv_dtype: float32, float16, bfloat16 or auto (float32 for f32, else float16).
    page_size: tokens per KV page, 1 to 256. layers: keep the first ones only, for a model that guesses what the whole
    one will say. dump_ir: a directory for the module after each pass. random_weights: needs the config alone.
    lora_rank: the largest rank of low-rank adapters, of which `adapters` can be loaded at once; None: none can.
    progress: called with (stage, done, total); log: with a line per pass. Returns the artifact's path.

    Raises CheckpointError, UnsupportedError, TargetError or CompileError; nothing is left behind then.
    """
    progress = progress or (lambda stage, done, total: None)
    resolved = [resolve(name) for name in dict.fromkeys(targets)]
    progress("reading", 0, 1)
    checkpoint = _first_layers(open_checkpoint(model, weights=not random_weights), layers)
    config = parse_config(checkpoint.config)
    limits = _limits(config, context_length, max_batch, min(t.max_tokens_per_step for t in resolved))
    layout = _kv_layout(config, quantization, kv_dtype, page_size)
    options = Options(
        str(model), quantization, *limits, layout, random_weights, _adapter_limits(quantization, lora_rank, adapters)
    )
    path = Path(output) if output else Path("dist") / f"{checkpoint.name}-{quantization}"
    try:
        with artifact.new_artifact(path) as staging:
            observe = Observer(log, Path(dump_ir) if dump_ir else None)
            _build(checkpoint, config, options, resolved, staging, progress, observe)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CompileError(f"no space left on the disk of {path.parent}; nothing was written") from error
        raise
    return path


def _first_layers(checkpoint: Checkpoint, layers: int | None) -> Checkpoint:
    if layers is None:
        return checkpoint
    there = parse_config(checkpoint.config).num_layers
    if not 1 <= layers <= there:
        raise UnsupportedError(f"--layers {layers} is not between 1 and the model's {there}")
    config = {**checkpoint.config, "num_hidden_layers": layers}
    return dataclasses.replace(checkpoint, name=f"{checkpoint.name}-{layers}-layers", config=config)


def _build(
    checkpoint: Checkpoint,
    config: DecoderConfig,
    options: Options,
    targets: Sequence[Target],
    staging: Path,
    progress: Progress,
    observe: Observer,
) -> None:
    progress("reading", 1, 1)
    mod, names = export(config)
    shapes = {name: static_shape(p) for name, p in zip(names, mod[FORWARD].params[2:], strict=True)}
    dtypes = {name: info.dtype for name, info in checkpoint.tensors.items()}
    if options.random_weights:
        dtypes = dict.fromkeys(shapes, "float32")
    else:
        weights.check_parameters(checkpoint, shapes)
    plan = weights.storage_plan(options.quantization, shapes, dtypes)
    made = compile_targets(mod, config, plan, options, targets, staging, progress, observe)
    if not _are_made_on_device(options, targets):
        vm = build_functions(made.lifted.transform_module, observe)
        read = weights.random_reader(shapes) if options.random_weights else weights.checkpoint_reader(checkpoint)
        file = staging / artifact.WEIGHTS
        weights.convert_weights(made.lifted, vm, read, file, lambda done, total: progress("weights", done, total))
    _write_tokenizer(checkpoint, staging)
    artifact.write_json(staging / artifact.REPORT, made.reports)
    manifest = _manifest(checkpoint, config, options, made, staging)
    manifest["checkpoint"] = {"config": dict(checkpoint.config), "dtypes": {name: dtypes[name] for name in shapes}}
    artifact.write_json(staging / artifact.MANIFEST, manifest)


def _are_made_on_device(options: Options, targets: Sequence[Target]) -> bool:
    """Random weights of any size need neither disk nor this machine's memory, where every target can make its own."""
    return options.random_weights and all(target.executor == "plan" for target in targets)


def _limits(config: DecoderConfig, context: int | None, max_batch: int, largest_batch: int) -> tuple[int, int]:
    """(context length, sequences per step), checked."""
    longest = config.max_position_embeddings
    if context is not None and not 1 <= context <= longest:
        raise UnsupportedError(f"--context-length {context} is not between 1 and the model's {longest}")
    if not 1 <= max_batch <= largest_batch:
        raise UnsupportedError(f"--max-batch {max_batch} is not between 1 and {largest_batch}")
    return context or longest, max_batch


def _kv_layout(config: DecoderConfig, quantization: str, kv_dtype: str, page_size: int) -> KvLayout:
    if quantization not in QUANTIZATIONS:
        raise UnsupportedError(f"quantization {quantization!r} is not supported; have: {', '.join(QUANTIZATIONS)}")
    if not 1 <= page_size <= 256:
        raise UnsupportedError(f"--page-size {page_size} is not between 1 and 256")
    return KvLayout(config.num_kv_heads, config.head_dim, page_size, resolve_kv_dtype(kv_dtype, quantization))


def _adapter_limits(quantization: str, rank: int | None, slots: int) -> AdapterLimits | None:
    """float32 beside float32 weights; else 16 bits, of which the sums are made in float32."""
    if rank is None:
        return None
    for option, value, most in (("--lora-rank", rank, MAX_RANK), ("--adapters", slots, MAX_SLOTS)):
        if not 1 <= value <= most:
            raise UnsupportedError(f"{option} {value} is not between 1 and {most}")
    return AdapterLimits(rank, slots, "float32" if quantization == "f32" else "float16")


def _manifest(
    checkpoint: Checkpoint,
    config: DecoderConfig,
    options: Options,
    made: Compiled,
    staging: Path,
) -> dict[str, Any]:
    lifted = made.lifted
    func = lifted.forward[FORWARD]
    inputs = [p.name for p in func.params[: len(func.params) - len(lifted.weights)] if not p.name.startswith("pages_")]
    kv = {**dataclasses.asdict(options.kv), "num_layers": config.num_layers}
    return {
        "schema_version": artifact.SCHEMA_VERSION,
        "name": checkpoint.name,
        "model": {**dataclasses.asdict(config), "eos_token_ids": _eos_token_ids(checkpoint)},
        "quantization": options.quantization,
        "kv": kv,
        "context_length": options.context_length,
        "max_batch": options.max_batch,
        "entry": {"name": FORWARD, "inputs": inputs, "weights": lifted.weights},
        "targets": made.entries,
        **({"adapters": made.adapters.to_json()} if made.adapters is not None else {}),
        "runtime_libraries": carry_runtime(made.entries, staging),
        "weights": _weight_files(staging),
        "random_weights": options.random_weights,
        "versions": {name: version(name) for name in ("mlcgen", "apache-tvm", "apache-tvm-ffi")},
        "source": options.source,
        "verify": None,
    }


def _weight_files(staging: Path) -> list[dict[str, Any]]:
    file = staging / artifact.WEIGHTS
    if not file.exists():
        return []
    digest = artifact.sha256_of_blocks(file)
    return [
        {"file": artifact.WEIGHTS, "sha256": digest, "is_hashed_by_blocks": True, "bytes": file.stat().st_size},
    ]


def _eos_token_ids(checkpoint: Checkpoint) -> list[int]:
    found: list[int] = []
    for field in ("eos_token_id", "generation_eos_token_id"):
        value = checkpoint.config.get(field)
        found += value if isinstance(value, list) else [] if value is None else [value]
    return sorted({int(token) for token in found})


def _write_tokenizer(checkpoint: Checkpoint, staging: Path) -> None:
    if checkpoint.tokenizer.tokenizer_json is not None:
        (staging / artifact.TOKENIZER).write_bytes(checkpoint.tokenizer.tokenizer_json)
    artifact.write_json(staging / artifact.TOKENIZER_CONFIG, dict(checkpoint.tokenizer.config))
