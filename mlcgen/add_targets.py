"""`mlcgen targets add`: code for more targets into an artifact that is there; its weights stay as they are."""

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlcgen import artifact, weights
from mlcgen.adapter_layout import AdapterLayout
from mlcgen.compile_target import Observer, Options, Progress, carry_runtime, compile_targets
from mlcgen.errors import ArtifactError, UnsupportedError
from mlcgen.models import parse_config
from mlcgen.models.layers import export
from mlcgen.passes.paged_attention import KvLayout
from mlcgen.passes.rewrite import FORWARD, static_shape
from mlcgen.targets import resolve
from mlcgen.targets.base import Target


def add_targets(
    path: str | Path,
    targets: Sequence[str],
    progress: Progress | None = None,
    log: Callable[[str], None] | None = None,
) -> Path:
    """Compile the artifact's model for `targets` too; one that it has already is compiled anew.

    Needs neither the checkpoint nor more disk space than the new code: the artifact's other files are linked, not
    copied. Raises ArtifactError for an artifact that does not say what it was compiled from, UnsupportedError,
    TargetError or CompileError as `compile` does; the artifact is as before then.
    """
    path = Path(path)
    manifest = artifact.read_manifest(path)
    resolved = [resolve(name) for name in dict.fromkeys(targets)]
    _check_limits(manifest, resolved)
    with artifact.new_artifact(path) as staging:
        _link_files(path, staging)
        for target in resolved:  # a linked file is the old artifact's, not to be written over
            for has_adapters in (False, True):
                (staging / artifact.library_file(target.name, target.executor, has_adapters)).unlink(missing_ok=True)
        observe = Observer(log, None)
        reports, entries = _compile(manifest, resolved, staging, progress or (lambda stage, done, total: None), observe)
        names = {entry["name"] for entry in entries}
        entries = [*(entry for entry in manifest["targets"] if entry["name"] not in names), *entries]
        libraries = manifest["runtime_libraries"] or carry_runtime(entries, staging)
        _write(staging / artifact.REPORT, artifact.read_report(path) | reports)
        _write(staging / artifact.MANIFEST, {**manifest, "targets": entries, "runtime_libraries": libraries})
    return path


def _check_limits(manifest: Mapping[str, Any], targets: Sequence[Target]) -> None:
    for target in targets:
        if manifest["max_batch"] > target.max_tokens_per_step:
            most = f"{target.name} takes {target.max_tokens_per_step} sequences in a step"
            raise UnsupportedError(f"{most}, the artifact was compiled for {manifest['max_batch']}")
        if not manifest["weights"] and target.executor != "plan":
            raise UnsupportedError(
                f"the artifact has no weights, and {target.name} cannot make random ones; compile for it from the start"
            )


def _compile(
    manifest: Mapping[str, Any], targets: Sequence[Target], staging: Path, progress: Progress, observe: Observer
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(report by target, manifest entries)"""
    hf, dtypes = _origin(manifest)
    kv = manifest["kv"]
    layout = KvLayout(kv["num_kv_heads"], kv["head_dim"], kv["page_size"], kv["dtype"])
    limits = manifest["context_length"], manifest["max_batch"]
    limits_of_adapters = AdapterLayout.from_json(manifest["adapters"]).limits if "adapters" in manifest else None
    options = Options(
        manifest["name"], manifest["quantization"], *limits, layout, manifest["random_weights"], limits_of_adapters
    )
    config = parse_config(hf)
    mod, names = export(config)
    shapes = {name: static_shape(p) for name, p in zip(names, mod[FORWARD].params[2:], strict=True)}
    if missing := sorted(shapes.keys() - dtypes.keys()):
        raise ArtifactError(f"the manifest does not say how {missing[0]!r} was stored; compile the model again")
    stored = weights.storage_plan(options.quantization, shapes, dtypes)
    made = compile_targets(mod, config, stored, options, targets, staging, progress, observe)
    if made.lifted.weights != manifest["entry"]["weights"]:
        raise ArtifactError("this mlcgen stores the model's weights in another way; compile the model again")
    if made.adapters is not None and made.adapters.to_json() != manifest["adapters"]:
        raise ArtifactError("this mlcgen arranges adapters in another way; compile the model again")
    return made.reports, made.entries


def _origin(manifest: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """(fields of the model's config.json, source dtype of each parameter)"""
    origin = manifest.get("checkpoint")
    with contextlib.suppress(TypeError, KeyError, AttributeError):
        config, dtypes = origin["config"], origin["dtypes"]  # type: ignore[index]
        if isinstance(config, dict) and all(isinstance(dtype, str) for dtype in dtypes.values()):
            return config, dtypes
    raise ArtifactError("the manifest does not say what was compiled, an older mlcgen made it; compile the model again")


def _link_files(path: Path, staging: Path) -> None:
    """All files of the artifact, under the same names: links where the disk has them, else copies."""
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        to = staging / file.relative_to(path)
        to.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file.resolve(), to)
        except OSError:
            shutil.copy2(file, to)


def _write(file: Path, value: Any) -> None:
    """A new file: what stands there is linked to the old artifact's."""
    file.unlink(missing_ok=True)
    artifact.write_json(file, value)
