"""The files of a compiled artifact, dist/<name>/: the only code that knows their names.

manifest.json                        what is in here: model, quantization, entry, targets, weights, versions
report.json                          how each kernel was made
tokenizer.json tokenizer_config.json
weights/model.safetensors            shared by all targets, 64-byte aligned so that it can be memory-mapped
lib/<target>.so or .plan             compiled code
lib/<target>.adapters.so or .plan    likewise, with the path of low-rank adapters
lib/<arch>/libtvm_runtime.so         the runtime library that the code was built for
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcgen import safetensors
from mlcgen.adapter_layout import MAX_RANK, MAX_SLOTS
from mlcgen.errors import ArtifactError, CheckpointError
from mlcgen.json_file import read_object
from mlcgen.runtime.cpu import usable_cores
from mlcgen.runtime.executor import AdaptedStepInput, StepInput
from mlcgen.schema import NUMBER, mismatch

SCHEMA_VERSION = 2
HASH_BLOCK = 16 << 20  # bytes
MANIFEST, REPORT = "manifest.json", "report.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
WEIGHTS = "weights/model.safetensors"
STORAGE = {"F32": "float32", "F16": "float16", "U16": "uint16", "U8": "uint8"}
KV_DTYPES = ("float32", "float16", "bfloat16")
_FILE = {"file": str, "sha256": str}
_SIZE = range(1, 1 << 31)
# What every reader may rely on.
_SCHEMA: dict[str, Any] = {
    "name": str,
    "model": {"vocab_size": _SIZE, "eos_token_ids": [int], "rope": {"inv_freq": [NUMBER]}},
    "quantization": str,
    "kv": {"num_layers": _SIZE, "num_kv_heads": _SIZE, "head_dim": _SIZE, "page_size": _SIZE, "dtype": KV_DTYPES},
    "entry": {"name": str, "inputs": [tuple(field.name for field in dataclasses.fields(StepInput))], "weights": [str]},
    "context_length": _SIZE,
    "max_batch": _SIZE,
    "targets": [
        {
            "name": str,
            "kind": str,
            "arch": str,
            "features": [str],
            "executor": str,
            "max_tokens_per_step": _SIZE,
            **_FILE,
        }
    ],
    "random_weights": bool,
    "runtime_libraries": [{"arch": str, **_FILE}],
    "weights": [{"bytes": int, "is_hashed_by_blocks": bool, **_FILE}],
    "versions": dict,
}
# What an artifact that was compiled for adapters has too.
_ADAPTERS_SCHEMA = {
    "targets": [{"adapted": _FILE}],
    "adapters": {
        "rank": range(1, MAX_RANK + 1),
        "slots": range(1, MAX_SLOTS + 1),
        "dtype": ("float32", "float16"),
        "groups": [{"projections": [str], "in_features": _SIZE, "out_features": [_SIZE]}],
        "arguments": [str],
    },
}


def library_file(target_name: str, executor: str = "vm", has_adapters: bool = False) -> str:
    name = target_name.replace(":", "-") + (".adapters" if has_adapters else "")
    return f"lib/{name}.{'plan' if executor == 'plan' else 'so'}"


def runtime_library_file(arch: str) -> str:
    return f"lib/{arch}/libtvm_runtime.so"


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest, checked. Raises ArtifactError where it is missing, of another schema, or points outside."""
    manifest = _read_json(Path(path) / MANIFEST)
    version = manifest.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        text = f"{path} has schema_version {version!r:.40}, this mlcgen reads {SCHEMA_VERSION}"
        raise ArtifactError(f"{text}; compile the model again")
    problem = mismatch(manifest, _SCHEMA)
    if problem is None and "adapters" in manifest:
        problem = mismatch(manifest, _ADAPTERS_SCHEMA) or _mismatch_of_adapters(manifest)
    if problem:
        raise ArtifactError(f"{path}/{MANIFEST}: {problem}; compile the model again")
    adapted = [entry["adapted"] for entry in manifest["targets"]] if "adapters" in manifest else []
    for entry in [*manifest["targets"], *manifest["weights"], *manifest["runtime_libraries"], *adapted]:
        inside(path, entry["file"])
    if not manifest["targets"] or not (manifest["weights"] or manifest["random_weights"]):
        raise ArtifactError(f"{path}/{MANIFEST} names no target or no weights; compile the model again")
    return manifest


def _mismatch_of_adapters(manifest: Mapping[str, Any]) -> str | None:
    adapters, layers = manifest["adapters"], manifest["kv"]["num_layers"]
    groups = adapters["groups"]
    known = {field.name for field in dataclasses.fields(AdaptedStepInput)}
    # Not sets of the names that there may be: a manifest can claim any number of layers.
    for name in adapters["arguments"]:
        kind, _, index = name.rpartition("_")
        most = {"pages": layers, "lora_a": len(groups), "lora_b": len(groups)}.get(kind, 0)
        if name not in known and not (index.isascii() and index.isdigit() and int(index[:9]) < most):
            return f"adapters.arguments has {name[:40]!r}"
    for i, group in enumerate(groups):
        if not group["projections"] or len(group["projections"]) != len(group["out_features"]):
            return f"adapters.groups[{i}] has not one size for each projection"
    return None


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
    try:
        if isinstance(name, str) and name and (root / name).resolve().is_relative_to(root):
            return root / name
    except (OSError, RuntimeError, ValueError):  # a link to itself, a zero byte
        pass
    raise ArtifactError(f"{path}/{MANIFEST} names the file {str(name)[:80]!r}, which is not inside the artifact")


def check_hash(path: str | Path, entry: Mapping[str, Any]) -> Path:
    """The entry's file, after its sha256 was compared. Raises ArtifactError when it differs or is missing."""
    file = inside(path, entry["file"])
    try:
        actual = sha256_of_blocks(file) if entry.get("is_hashed_by_blocks") else sha256(file)
    except OSError as error:
        raise ArtifactError(f"cannot read {file}: {error.strerror}; compile the model again") from error
    if actual != entry["sha256"]:
        raise ArtifactError(f"{file} is damaged: its sha256 is not the manifest's; compile or copy the artifact again")
    return file


def sha256_of_blocks(file: Path) -> str:
    """The sha256 of the sha256s of the file's blocks: all cores take part in checking what is large."""
    starts = range(0, file.stat().st_size, HASH_BLOCK)

    def digest(start: int) -> bytes:
        with file.open("rb") as stream:
            stream.seek(start)
            return hashlib.sha256(stream.read(HASH_BLOCK)).digest()

    with ThreadPoolExecutor(usable_cores()) as threads:
        return hashlib.sha256(b"".join(threads.map(digest, starts))).hexdigest()


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
        # Copy on write: DLPack takes no read-only array.
        raw = np.memmap(file, np.uint8, mode="c")
    except (CheckpointError, OSError) as error:
        raise ArtifactError(str(error)) from error
    return {name: _mapped(raw, name, e) for name, e in entries.items() if not name.startswith(safetensors.PADDING)}


def _mapped(raw: npt.NDArray[Any], name: str, entry: safetensors.Entry) -> npt.NDArray[Any]:
    if entry.dtype not in STORAGE or entry.offset % safetensors.ALIGNMENT:
        place = f"tensor {name[:80]!r} is {entry.dtype} at byte {entry.offset}"
        raise ArtifactError(f"{entry.path}: {place}, which no kernel reads; compile the model again")
    data = raw[entry.offset : entry.offset + entry.num_bytes].view(STORAGE[entry.dtype])
    try:
        return data.reshape(entry.shape)
    except ValueError as error:  # a side that no array can have, beside one of 0
        raise ArtifactError(f"{entry.path}: tensor {name[:80]!r}: {error}; compile the model again") from error


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
        assert (array.shape, str(array.dtype)) == (shape, dtype), (name, array.shape, array.dtype, shape, dtype)
        self.stream.seek(self.offsets[name])
        # Not array.tofile: on a full disk its error has no errno.
        self.stream.write(array.reshape(-1).view(np.uint8).data)

    def close(self) -> None:
        self.stream.seek(0, os.SEEK_END)
        self.stream.write(b"\0" * (-self.stream.tell() % safetensors.ALIGNMENT))
        self.stream.close()


@contextlib.contextmanager
def new_artifact(path: Path) -> Iterator[Path]:
    """A directory to fill, beside `path`; it takes that name at the end, and is gone if anything fails.

    An artifact that is already there is replaced; anything else there is an error and stays.
    """
    if os.path.lexists(path) and not _is_replaceable(path):
        raise ArtifactError(f"{path} exists and is no artifact; choose another output with -o")
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        staging.chmod(0o755)
        yield staging
        _replace(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _is_replaceable(path: Path) -> bool:
    """An artifact, of any version, or an empty directory. Many other things have a manifest.json too."""
    if not path.is_dir():
        return False
    with contextlib.suppress(ArtifactError):
        return {"schema_version", "targets", "weights"} <= _read_json(path / MANIFEST).keys()
    return not any(path.iterdir())


def _replace(staging: Path, path: Path) -> None:
    if not path.exists():
        staging.rename(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    try:
        path.rename(old / "artifact")
        staging.rename(path)
    finally:
        if not path.exists():  # it failed in between
            (old / "artifact").rename(path)
        shutil.rmtree(old, ignore_errors=True)


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise ArtifactError(f"{file.parent} is no artifact: it has no {file.name}; make one with mlcgen compile")
    return read_object(file, ArtifactError, "compile the model again")
