"""The JSON of `mlcgen bench`: its version, and reading it back, also where another machine wrote it."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlcgen.errors import BenchError
from mlcgen.schema import NUMBER, Check, Named, Nullable, first_problem, mismatch

VERSION = 1
LARGEST = 1e30  # no figure is larger, and what is drawn of it stays finite


_FIGURE = Check(lambda value: NUMBER.accepts(value) and 0 <= value <= LARGEST, "number that can be")
# What the page relies on.
_SUMMARY = dict.fromkeys(("median", "min", "max"), _FIGURE)
_ABOUT = {
    "name": str,
    "target": Nullable(str),
    "kind": str,
    "targets": [str],
    "quantization": Nullable(str),
    "size": Named(_FIGURE),
    "quality": Named(_FIGURE),
    "versions": Named(str),
}
_ROW = {
    **_ABOUT,
    "engine": str,
    "device": str,
    "metrics": Named(_SUMMARY),
    "achieved": Named(_FIGURE),
    "skipped": Named(str),
}
_PEAKS = {"bytes_per_s": Named(_SUMMARY), "ops_per_s": Named(_SUMMARY), "link_bytes_per_s": Nullable(_SUMMARY)}
_SIZES = ("prompt", "tokens", "long_context", "batch", "batch_prompt", "repeat")
_RESULT = {
    "command": str,
    "model": {
        "name": str,
        "model_type": Nullable(str),
        **dict.fromkeys(("hidden_size", "num_layers", "vocab_size"), Nullable(int)),
    },
    "options": {**dict.fromkeys(_SIZES, int), "text": Nullable(str), "weight_memory": Nullable(str)},
    "machine": {"cpu": str, "cores": int, "threads": int},
    "versions": Named(str),
    "devices": Named({"name": str, "peaks": _PEAKS}),
    "engines": [_ROW],
    "not_run": [{**_ABOUT, "target": str, "reason": str}],
}


def read_results(files: Sequence[Path]) -> list[dict[str, Any]]:
    """The results in files that `mlcgen bench --json` wrote, also of merged ones, each result once.

    Raises BenchError, which names the file, for anything else.
    """
    found = [result for file in files for result in _read(file)]
    return [result for i, result in enumerate(found) if result not in found[:i]]


def merged(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several results as one, to be written as JSON."""
    return {"version": VERSION, "results": list(results)}


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(f"cannot read {file}: {error.strerror}; name files that mlcgen bench --json wrote") from error
    except (ValueError, RecursionError) as error:
        raise BenchError(f"{file} is not JSON ({error}); name files that mlcgen bench --json wrote") from error
    results = value["results"] if isinstance(value, dict) and isinstance(value.get("results"), list) else [value]
    for result in [value, *results]:
        _check_version(file, result)
    for result in results:
        if problem := mismatch(result, _RESULT) or _dangling(result):
            raise BenchError(f"{file} is no benchmark result: {problem}; write it with mlcgen bench --json")
    return results


def _check_version(file: Path, result: Any) -> None:
    if not isinstance(result, dict) or "version" not in result:
        raise BenchError(f"{file} is no benchmark result: it has no version; write it with mlcgen bench --json")
    version = result["version"]
    if type(version) is not int or version != VERSION:
        text = f"{file} has version {version!r:.40}, this mlcgen reads {VERSION}"
        raise BenchError(f"{text}; measure again, or merge with the mlcgen that wrote it")


def _dangling(result: Mapping[str, Any]) -> str | None:
    """What no schema says: that rows have devices, and that peaks are of sizes."""
    kinds = [row["kind"] for row in result["engines"] if row["kind"] not in result["devices"]]
    sizes = [size for device in result["devices"].values() for size in device["peaks"]["bytes_per_s"]]
    return first_problem(
        [
            *(f"devices has no {kind:.40}" for kind in kinds),
            *(f"{size:.40} is no number of bytes" for size in sizes if not re.fullmatch("[0-9]{1,18}", size)),
        ]
    )
