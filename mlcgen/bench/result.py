"""The JSON of `mlcgen bench`: its version, and reading it back, also where another machine wrote it."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcgen.errors import BenchError

VERSION = 1
LARGEST = 1e30  # no figure is larger, and what is drawn of it stays finite


@dataclass(frozen=True)
class _Each:
    """An object of any keys, whose values are of one schema."""

    schema: Any


@dataclass(frozen=True)
class _Maybe:
    schema: Any


# What the page relies on: a type, [schema of each item], {key: its schema}, _Each or _Maybe.
_SUMMARY = {"median": float, "min": float, "max": float}
_ABOUT = {
    "name": str,
    "target": _Maybe(str),
    "kind": str,
    "targets": [str],
    "quantization": _Maybe(str),
    "size": _Each(float),
    "quality": _Each(float),
    "versions": _Each(str),
}
_ROW = {
    **_ABOUT,
    "engine": str,
    "device": str,
    "metrics": _Each(_SUMMARY),
    "achieved": _Each(float),
    "skipped": _Each(str),
}
_PEAKS = {"bytes_per_s": _Each(_SUMMARY), "ops_per_s": _Each(_SUMMARY), "link_bytes_per_s": _Maybe(_SUMMARY)}
_SIZES = ("prompt", "tokens", "long_context", "batch", "batch_prompt", "repeat")
_RESULT = {
    "command": str,
    "model": {
        "name": str,
        "model_type": _Maybe(str),
        **dict.fromkeys(("hidden_size", "num_layers", "vocab_size"), _Maybe(int)),
    },
    "options": {**dict.fromkeys(_SIZES, int), "text": _Maybe(str), "weight_memory": _Maybe(str)},
    "machine": {"cpu": str, "cores": int, "threads": int},
    "versions": _Each(str),
    "devices": _Each({"name": str, "peaks": _PEAKS}),
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
        if problem := _mismatch(result, _RESULT, "") or _dangling(result):
            raise BenchError(f"{file} is no benchmark result: {problem}; write it with mlcgen bench --json")
    return results


def _check_version(file: Path, result: Any) -> None:
    if not isinstance(result, dict) or "version" not in result:
        raise BenchError(f"{file} is no benchmark result: it has no version; write it with mlcgen bench --json")
    version = result["version"]
    if type(version) is not int or version != VERSION:
        text = f"{file} has version {version!r:.40}, this mlcgen reads {VERSION}"
        raise BenchError(f"{text}; measure again, or merge with the mlcgen that wrote it")


def _mismatch(value: Any, schema: Any, where: str) -> str | None:
    """What is wrong with the value at `where`, or None."""
    if isinstance(schema, _Maybe):
        return None if value is None else _mismatch(value, schema.schema, where)
    if isinstance(schema, list):
        if not isinstance(value, list):
            return f"{where} is missing or no list"
        return _first(_mismatch(each, schema[0], f"{where}[{i}]") for i, each in enumerate(value))
    if isinstance(schema, dict | _Each):
        if not isinstance(value, dict):
            return f"{where or 'it'} is missing or no object"
        fields = dict.fromkeys(value, schema.schema) if isinstance(schema, _Each) else schema
        prefix = f"{where}." if where else ""
        return _first(_mismatch(value.get(key), its, f"{prefix}{key:.40}") for key, its in fields.items())
    if schema is float:
        is_number = type(value) in (int, float) and 0 <= value <= LARGEST
        return None if is_number else f"{where} is missing or no number that can be"
    return None if type(value) is schema else f"{where} is missing or no {schema.__name__}"


def _first(problems: Iterable[str | None]) -> str | None:
    return next(filter(None, problems), None)


def _dangling(result: Mapping[str, Any]) -> str | None:
    """What no schema says: that rows have devices, and that peaks are of sizes."""
    kinds = [row["kind"] for row in result["engines"] if row["kind"] not in result["devices"]]
    sizes = [size for device in result["devices"].values() for size in device["peaks"]["bytes_per_s"]]
    return _first(
        [
            *(f"devices has no {kind:.40}" for kind in kinds),
            *(f"{size:.40} is no number of bytes" for size in sizes if not re.fullmatch("[0-9]{1,18}", size)),
        ]
    )
