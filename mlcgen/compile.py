"""The whole story on one page: checkpoint -> IRModule -> passes -> target -> artifact."""

import dataclasses
import errno
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tvm
from tvm import IRModule, relax

from mlcgen import artifact, passes, report, weights
from mlcgen.checkpoint import Checkpoint, open_checkpoint
from mlcgen.errors import CompileError, UnsupportedError
from mlcgen.formats import QUANTIZATIONS, resolve_kv_dtype
from mlcgen.launch_plan import launch_plan, variants
from mlcgen.link import link_library
from mlcgen.models import parse_config
from mlcgen.models.config import DecoderConfig
from mlcgen.models.layers import export
from mlcgen.passes.lift_weights import Lifted, lift_weights
from mlcgen.passes.paged_attention import KvLayout
from mlcgen.passes.quantize import WeightSource
from mlcgen.passes.rewrite import FORWARD, static_shape
from mlcgen.runtime.cpu import host_arch
from mlcgen.runtime.vm_executor import installed_runtime_library
from mlcgen.targets import resolve
from mlcgen.targets.base import Target

MAX_LOGIT_ROWS = 512  # of one step: what scoring a text asks for at once, a batch has fewer
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Options:
    """What a compile was asked for, with every default resolved."""

    source: str  # as the user named it
    quantization: str
    context_length: int
    max_batch: int
    kv: KvLayout
    random_weights: bool


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
    dump_ir: str | Path | None = None,
    random_weights: bool = False,
    progress: Progress | None = None,
    log: Callable[[str], None] | None = None,
) -> Path:
    """Compile `model` (an HF directory, a .gguf file, a hub id or a model package's name) into an artifact directory.

    targets: such as "cpu", "cpu:x86-64-v3". quantization: f32, f16, bf16, q8, q4 or gguf; q8a8, q4a8 and ggufa8 round
    activations to 8 bits too. context_length: tokens of the longest sequence, at most and by default the model's.
    max_batch: sequences in one step. kv_dtype: float32,
    float16, bfloat16 or auto (float32 for f32, else float16). page_size: tokens per KV page, 1 to 256. dump_ir: a
    directory for the module after each pass. random_weights: needs the config alone. progress: called with
    (stage, done, total); log: with a line per pass. Returns the artifact's path.

    Raises CheckpointError, UnsupportedError, TargetError or CompileError; nothing is left behind then.
    """
    progress = progress or (lambda stage, done, total: None)
    resolved = [resolve(name) for name in dict.fromkeys(targets)]
    progress("reading", 0, 1)
    checkpoint = open_checkpoint(model, weights=not random_weights)
    config = parse_config(checkpoint.config)
    limits = _limits(config, context_length, max_batch, min(t.max_tokens_per_step for t in resolved))
    layout = _kv_layout(config, quantization, kv_dtype, page_size)
    options = Options(str(model), quantization, *limits, layout, random_weights)
    path = Path(output) if output else Path("dist") / f"{checkpoint.name}-{quantization}"
    try:
        with artifact.new_artifact(path) as staging:
            observe = _Observer(log, Path(dump_ir) if dump_ir else None)
            _build(checkpoint, config, options, resolved, staging, progress, observe)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CompileError(f"no space left on the disk of {path.parent}; nothing was written") from error
        raise
    return path


def _build(
    checkpoint: Checkpoint,
    config: DecoderConfig,
    options: Options,
    targets: Sequence[Target],
    staging: Path,
    progress: Progress,
    observe: "_Observer",
) -> None:
    progress("reading", 1, 1)
    mod, names = export(config)
    shapes = {name: static_shape(p) for name, p in zip(names, mod[FORWARD].params[2:], strict=True)}
    dtypes = {name: info.dtype for name, info in checkpoint.tensors.items()}
    if options.random_weights:
        dtypes = dict.fromkeys(shapes, "float32")
    else:
        weights.check_parameters(checkpoint, shapes)
    plan, fallbacks = weights.storage_plan(options.quantization, shapes, dtypes)
    lifted: Lifted | None = None
    reports, entries = {}, []
    for target in targets:
        _check_target(target, config, options, plan)
    for target in targets:
        one, lines = _compile_target(mod, plan, options, target, staging, progress, observe)
        assert lifted is None or lifted.weights == one.weights, "targets must store the same weights"
        lifted = one
        its_fallbacks = [*target.fallbacks, *fallbacks, *_activation_fallback(target, plan), *lines["fallbacks"]]
        reports[target.name] = {**lines, "fallbacks": its_fallbacks}
        entries.append(_target_entry(target, staging))
    assert lifted is not None
    if not _are_made_on_device(options, targets):
        vm = build_functions(lifted.transform_module, observe)
        read = weights.random_reader(shapes) if options.random_weights else weights.checkpoint_reader(checkpoint)
        file = staging / artifact.WEIGHTS
        weights.convert_weights(lifted, vm, read, file, lambda done, total: progress("weights", done, total))
    _write_tokenizer(checkpoint, staging)
    artifact.write_json(staging / artifact.REPORT, reports)
    manifest = _manifest(checkpoint, config, options, lifted, entries, staging)
    artifact.write_json(staging / artifact.MANIFEST, manifest)


def _check_target(target: Target, config: DecoderConfig, options: Options, plan: Mapping[str, WeightSource]) -> None:
    """Raises UnsupportedError for what the target's kernels do not take, before any work is done."""
    if options.kv.dtype not in target.kv_dtypes:
        have = " or ".join(target.kv_dtypes)
        raise UnsupportedError(f"{target.name} keeps no keys and values in {options.kv.dtype}: add --kv-dtype {have}")
    if target.head_dims and config.head_dim not in target.head_dims:
        have = ", ".join(map(str, target.head_dims))
        raise UnsupportedError(f"{target.name} has attention for heads of {have}, not of {config.head_dim}")
    wide = next((name for name, source in plan.items() if source.fmt.dtype == "float32"), None)
    if wide is not None and not target.has_float32_weights:
        raise UnsupportedError(
            f"{target.name} multiplies no float32 matrix, such as {wide}: use -q f16, bf16, q8 or q4"
        )


def _activation_fallback(target: Target, plan: Mapping[str, WeightSource]) -> list[str]:
    if target.has_int8_activations or not any(source.fmt.int8_activations for source in plan.values()):
        return []
    return [f"{target.kind} has no products of 8-bit activations; they keep 16 bits"]


def _are_made_on_device(options: Options, targets: Sequence[Target]) -> bool:
    """Random weights of any size need neither disk nor this machine's memory, where every target can make its own."""
    return options.random_weights and all(target.executor == "plan" for target in targets)


def _compile_target(
    mod: IRModule,
    plan: Mapping[str, WeightSource],
    options: Options,
    target: Target,
    staging: Path,
    progress: Progress,
    observe: "_Observer",
) -> tuple[Lifted, dict[str, Any]]:
    """Passes and code generation; writes the library."""
    tokens = target.max_tokens_per_step
    bounds = {"n": tokens, "rows": min(tokens, max(MAX_LOGIT_ROWS, options.max_batch)), "seqs": options.max_batch}
    pass_options = passes.PassOptions(plan, options.kv, bounds)
    model_passes, lowering = passes.model_pipeline(target, pass_options), passes.lowering_pipeline(target, bounds)
    scheduled: list[IRModule] = []
    done = 0

    def observe_pass(name: str, module: IRModule) -> None:
        nonlocal done
        done += 1
        observe(name, module)
        progress(f"passes for {target.name}", done, len(model_passes) + len(lowering))
        if name == "schedule":
            scheduled.append(module)

    lifted = lift_weights(passes.run(mod, model_passes, target, observe_pass))
    lowered = passes.run(lifted.forward, lowering, target, observe_pass)
    progress(f"code for {target.name}", 0, 1)
    kernels = report.kernels(scheduled[0], len(lifted.weights))
    file = staging / artifact.library_file(target.name, target.executor)
    if target.executor == "plan":
        made, kernels["functions"] = launch_plan(lowered, target, lifted.weights, bounds)
        for line in kernels["kernels"]:
            line["variants"] = variants(made, line["name"])
        file.parent.mkdir(parents=True, exist_ok=True)
        artifact.write_json(file, made)
        observe("generate code", lowered)
    else:
        link_library(_generate(lowered, target, observe), file, target.arch)
    progress(f"code for {target.name}", 1, 1)
    return lifted, kernels


def build_functions(mod: IRModule, observe: Callable[[str, IRModule], None]) -> Any:
    """A VM on this machine's CPU with the module's functions, for work that belongs to compiling itself."""
    target = resolve("cpu")
    executable = _generate(passes.run(mod, passes.lowering_pipeline(target), target, observe), target, observe)
    return relax.VirtualMachine(executable, tvm.cpu())


def _generate(mod: IRModule, target: Target, observe: Callable[[str, IRModule], None]) -> Any:
    executable = tvm.compile(mod, target=tvm.target.Target(target.tvm), relax_pipeline=None, tir_pipeline="default")
    observe("generate code", mod)
    return executable


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


def _target_entry(target: Target, staging: Path) -> dict[str, Any]:
    file = artifact.library_file(target.name, target.executor)
    return {
        "name": target.name,
        "kind": target.kind,
        "arch": target.arch,
        "features": list(target.features),
        "executor": target.executor,
        "max_tokens_per_step": target.max_tokens_per_step,
        "file": file,
        "sha256": artifact.sha256(staging / file),
    }


def _manifest(
    checkpoint: Checkpoint,
    config: DecoderConfig,
    options: Options,
    lifted: Lifted,
    targets: list[dict[str, Any]],
    staging: Path,
) -> dict[str, Any]:
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
        "targets": targets,
        "runtime_libraries": _carry_runtime(targets, staging),
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


def _carry_runtime(targets: Sequence[Mapping[str, Any]], staging: Path) -> list[dict[str, Any]]:
    """The runtime library for this machine's architecture: 3 MB that make the artifact run without the compiler."""
    arch, library = host_arch(), installed_runtime_library()
    if library is None or arch not in {t["arch"] for t in targets}:
        return []
    file = artifact.runtime_library_file(arch)
    (staging / file).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(library, staging / file)
    return [{"arch": arch, "file": file, "sha256": artifact.sha256(staging / file)}]


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


class _Observer:
    """Times each pass and writes the module after it, where asked to."""

    def __init__(self, log: Callable[[str], None] | None, dump: Path | None) -> None:
        self.log, self.dump, self.count, self.last = log, dump, 0, time.perf_counter()
        if dump:
            dump.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, mod: IRModule) -> None:
        if self.log:
            self.log(f"{name:<24} {time.perf_counter() - self.last:7.3f} s")
        if self.dump:
            (self.dump / f"{self.count:02d}_{name.replace(' ', '_')}.py").write_text(mod.script())
        self.count += 1
        self.last = time.perf_counter()
