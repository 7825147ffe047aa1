"""The files of a compiled artifact, dist/<name>/: the only code that knows their names.

  manifest.json                        what is in here: model, quantization, entry, targets, weights, versions
  report.json                          how each kernel was made
  tokenizer.json tokenizer_config.json
  weights/model.safetensors            shared by all targets, 64-byte aligned so that it can be memory-mapped
  lib/<target>.so                      compiled code
  lib/<arch>/libtvm_runtime.so         the runtime library that the code was built for
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcgen import safetensors
from mlcgen.errors import ArtifactError, CheckpointError

SCHEMA_VERSION = 1
MANIFEST, REPORT = "manifest.json", "report.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
WEIGHTS = "weights/model.safetensors"
STORAGE = {"F32": "float32", "F16": "float16", "U16": "uint16", "U8": "uint8"}
_REQUIRED = {
    "schema_version": int,
    "name": str,
    "model": dict,
    "quantization": str,
    "kv": dict,
    "entry": dict,
    "context_length": int,
    "max_batch": int,
    "max_tokens_per_step": int,
    "targets": list,
    "weights": list,
    "versions": dict,
}


def library_file(target_name: str) -> str:
    return f"lib/{target_name.replace(':', '-')}.so"


def runtime_library_file(arch: str) -> str:
    return f"lib/{arch}/libtvm_runtime.so"


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest, checked. Raises ArtifactError where it is missing, of another schema, or points outside."""
    manifest = _read_json(Path(path) / MANIFEST)
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} has schema_version {version!r}, this mlcgen reads {SCHEMA_VERSION}; compile the model again"
        )
    for key, kind in _REQUIRED.items():
        if not isinstance(manifest.get(key), kind):
            raise ArtifactError(f"{path}/{MANIFEST}: {key!r} is missing or no {kind.__name__}; compile the model again")
    files = [*manifest["targets"], *manifest["weights"], *manifest.get("runtime_libraries", [])]
    for entry in files:
        if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
            raise ArtifactError(f"{path}/{MANIFEST}: an entry of files is malformed; compile the model again")
        inside(path, entry.get("file"))
    return manifest


def read_report(path: str | Path) -> dict[str, Any]:
    return _read_json(Path(path) / REPORT)


def read_tokenizer_config(path: str | Path) -> dict[str, Any]:
    file = Path(path) / TOKENIZER_CONFIG
    return _read_json(file) if file.exists() else {}


def tokenizer_path(path: str | Path) -> Path | None:
    file = Path(path) / TOKENIZER
    return file if file.exists() else None


def inside(path: str | Path, name: object) -> Path:
    """The file `name` of the artifact. Raises ArtifactError for a name that leads outside, also through a link."""
    root = Path(path).resolve()
    if not isinstance(name, str) or not name or not (root / name).resolve().is_relative_to(root):
        raise ArtifactError(f"{path}/{MANIFEST} names the file {str(name)[:80]!r}, which is not inside the artifact")
    return root / name


def check_hash(path: str | Path, entry: Mapping[str, Any]) -> Path:
    """The entry's file, after its sha256 was compared. Raises ArtifactError when it differs or is missing."""
    file = inside(path, entry["file"])
    try:
        actual = sha256(file)
    except OSError as error:
        raise ArtifactError(f"cannot read {file}: {error.strerror}; compile the model again") from error
    if actual != entry["sha256"]:
        raise ArtifactError(f"{file} is damaged: its sha256 is not the manifest's; compile or copy the artifact again")
    return file


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(stream)


def _digest(stream: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while chunk := stream.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def map_weights(file: Path) -> dict[str, npt.NDArray[Any]]:
    """The stored tensors by name, memory-mapped: pages are read when kernels touch them."""
    try:
        entries = safetensors.read_entries(file)
    except CheckpointError as error:
        raise ArtifactError(str(error)) from error
    # Copy on write: DLPack takes no read-only array.
    raw = np.memmap(file, np.uint8, mode="c")
    return {
        name: raw[e.offset : e.offset + e.num_bytes].view(STORAGE[e.dtype]).reshape(e.shape)
        for name, e in entries.items()
        if not name.startswith(safetensors.PADDING)
    }


class WeightWriter:
    """Tensors written one by one, in any order, into a file whose layout is known before."""

    def __init__(self, file: Path, tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
        """tensors: name -> (shape, NumPy dtype name), in file order."""
        codes = {storage: code for code, storage in STORAGE.items()}
        header, self.offsets = safetensors.layout({n: (shape, codes[dtype]) for n, (shape, dtype) in tensors.items()})
        self.tensors = tensors
        file.parent.mkdir(parents=True, exist_ok=True)
        self.stream = file.open("wb")
        self.stream.write(header)

    def write(self, name: str, array: npt.NDArray[Any]) -> None:
        shape, dtype = self.tensors[name]
        assert array.shape == shape and array.dtype == dtype, (name, array.shape, array.dtype, shape, dtype)
        self.stream.seek(self.offsets[name])
        array.tofile(self.stream)

    def close(self) -> None:
        self.stream.seek(0, os.SEEK_END)
        self.stream.write(b"\0" * (-self.stream.tell() % safetensors.ALIGNMENT))
        self.stream.close()


@contextlib.contextmanager
def new_artifact(path: Path) -> Iterator[Path]:
    """A directory to fill, beside `path`; it takes that name at the end, and is gone if anything fails.

    An artifact that is already there is replaced; anything else there is an error and stays.
    """
    if path.exists() and not (path / MANIFEST).exists() and (not path.is_dir() or any(path.iterdir())):
        raise ArtifactError(f"{path} exists and is no artifact; choose another output with -o")
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        staging.chmod(0o755)
        yield staging
        _replace(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace(staging: Path, path: Path) -> None:
    if not path.exists():
        staging.rename(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    path.rename(old / "artifact")
    staging.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{file.parent} is no artifact: it has no {file.name}; make one with mlcgen compile") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"cannot read {file}: {error}; compile the model again") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{file} is not a JSON object; compile the model again")
    return value
