"""From a model's module to one target's code: passes, kernels, the file in lib/ and its entry in the manifest."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
from tvm import IRModule, relax

from mlcgen import artifact, passes, report
from mlcgen.adapter_layout import AdapterLayout, AdapterLimits
from mlcgen.errors import UnsupportedError
from mlcgen.launch_plan import launch_plan, variants
from mlcgen.link import link_library
from mlcgen.models.config import DecoderConfig
from mlcgen.passes.add_adapters import adapter_groups
from mlcgen.passes.lift_weights import Lifted, lift_weights
from mlcgen.passes.paged_attention import KvLayout
from mlcgen.passes.quantize import WeightSource
from mlcgen.passes.rewrite import FORWARD
from mlcgen.runtime.cpu import host_arch
from mlcgen.runtime.vm_executor import installed_runtime_library
from mlcgen.targets import cpu_codegen, resolve
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
    adapters: AdapterLimits | None = None


def _check(target: Target, config: DecoderConfig, options: Options, plan: Mapping[str, WeightSource]) -> None:
    """Raises UnsupportedError for what the target's kernels do not take, before any work is done."""
    if options.kv.dtype not in target.kv_dtypes:
        have = " or ".join(target.kv_dtypes)
        raise UnsupportedError(f"{target.name} keeps no keys and values in {options.kv.dtype}: add --kv-dtype {have}")
    if target.head_dims and config.head_dim not in target.head_dims:
        have = ", ".join(map(str, target.head_dims))
        raise UnsupportedError(f"{target.name} has attention for heads of {have}, not of {config.head_dim}")
    if config.head_dim % 16:
        raise UnsupportedError(f"{target.name} has attention for heads of multiples of 16, not of {config.head_dim}")
    wide = next((name for name, source in plan.items() if source.fmt.dtype == "float32"), None)
    if wide is not None and not target.has_float32_weights:
        raise UnsupportedError(
            f"{target.name} multiplies no float32 matrix, such as {wide}: use -q f16, bf16, q8 or q4"
        )


def _activation_fallback(target: Target, plan: Mapping[str, WeightSource]) -> list[str]:
    if target.has_int8_activations or not any(source.fmt.int8_activations for source in plan.values()):
        return []
    return [f"{target.kind} has no products of 8-bit activations; they keep 16 bits"]


@dataclass(frozen=True)
class Compiled:
    lifted: Lifted  # the function whose weights are inputs
    reports: dict[str, Any]  # by target
    entries: list[dict[str, Any]]  # of the manifest
    adapters: AdapterLayout | None


def compile_targets(
    mod: IRModule,
    config: DecoderConfig,
    stored: tuple[Mapping[str, WeightSource], Sequence[str]],
    options: Options,
    targets: Sequence[Target],
    staging: Path,
    progress: Progress,
    observe: "Observer",
) -> Compiled:
    """Writes the targets' files.

    stored: what weights.storage_plan gives. Raises UnsupportedError before any work is done.
    """
    plan, fallbacks = stored
    lifted: Lifted | None = None
    layout: AdapterLayout | None = None
    reports, entries = {}, []
    for target in targets:
        _check(target, config, options, plan)
    for target in targets:
        one, lines = _compile(mod, plan, options, target, staging, progress, observe)
        assert lifted is None or lifted.weights == one.weights, "targets must store the same weights"
        lifted = one
        entry = _entry(target, staging)
        if options.adapters is not None:
            # A function of its own: where no sequence has an adapter, the one that knows of none runs.
            adapted, more = _compile(mod, plan, options, target, staging, progress, observe, options.adapters)
            assert adapted.weights == one.weights, "both functions must read the same weights"
            made = _layout(adapted, options.adapters)
            assert layout is None or layout == made, "targets must take the same adapters"
            layout = made
            lines["adapter_kernels"] = more["kernels"]
            if "functions" in lines:
                lines["functions"] |= more["functions"]
            lines["fallbacks"] += [line for line in more["fallbacks"] if line not in lines["fallbacks"]]
            entry["adapted"] = _file(target, staging, has_adapters=True)
        its_fallbacks = [*target.fallbacks, *fallbacks, *_activation_fallback(target, plan), *lines["fallbacks"]]
        reports[target.name] = {**lines, "fallbacks": its_fallbacks}
        entries.append(entry)
    assert lifted is not None
    return Compiled(lifted, reports, entries, layout)


def _layout(lifted: Lifted, limits: AdapterLimits) -> AdapterLayout:
    func = lifted.forward[FORWARD]
    names = [str(p.name) for p in func.params[: len(func.params) - len(lifted.weights)]]
    return AdapterLayout(limits, adapter_groups(lifted.forward), tuple(names))


def _compile(
    mod: IRModule,
    plan: Mapping[str, WeightSource],
    options: Options,
    target: Target,
    staging: Path,
    progress: Progress,
    observe: "Observer",
    adapters: AdapterLimits | None = None,
) -> tuple[Lifted, dict[str, Any]]:
    """Passes and code generation; writes the library, with `adapters` that of the function with their path."""
    tokens = target.max_tokens_per_step
    bounds = {"n": tokens, "rows": min(tokens, max(MAX_LOGIT_ROWS, options.max_batch)), "seqs": options.max_batch}
    pass_options = passes.PassOptions(plan, options.kv, bounds, adapters)
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
    file = staging / artifact.library_file(target.name, target.executor, adapters is not None)
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
    executable = cpu_codegen.build(mod, tvm.target.Target(target.tvm))
    observe("generate code", mod)
    return executable


def _file(target: Target, staging: Path, has_adapters: bool) -> dict[str, str]:
    file = artifact.library_file(target.name, target.executor, has_adapters)
    return {"file": file, "sha256": artifact.sha256(staging / file)}


def _entry(target: Target, staging: Path) -> dict[str, Any]:
    return {
        "name": target.name,
        "kind": target.kind,
        "arch": target.arch,
        "features": list(target.features),
        "executor": target.executor,
        "max_tokens_per_step": target.max_tokens_per_step,
        **_file(target, staging, has_adapters=False),
    }


def carry_runtime(targets: Sequence[Mapping[str, Any]], staging: Path) -> list[dict[str, Any]]:
    """The runtime library for this machine's architecture: 3 MB that make the artifact run without the compiler."""
    arch, library = host_arch(), installed_runtime_library()
    if library is None or arch not in {t["arch"] for t in targets}:
        return []
    file = artifact.runtime_library_file(arch)
    (staging / file).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(library, staging / file)
    return [{"arch": arch, "file": file, "sha256": artifact.sha256(staging / file)}]


class Observer:
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
