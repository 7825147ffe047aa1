"""The safetensors container, read strictly: the header must describe every byte of the file exactly once."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcgen.errors import CheckpointError

MAX_HEADER = 100_000_000  # bytes, the limit of the reference implementation
MAX_DIMS = 16
BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
    "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E3M2": 6, "F6_E2M3": 6,
    "F4": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    path: Path
    dtype: str  # as safetensors calls it: "F32"
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    num_bytes: int


def read_entries(path: Path) -> dict[str, Entry]:
    """The tensors that a file holds, by name, without touching their data.

    Raises CheckpointError where the header is malformed, lies about sizes, or leaves bytes out.
    Format: "Format" in the README of the safetensors project.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise _damaged(path, f"its header claims {length} bytes but the file has {size}")
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    header = _parse_header(path, text)
    entries = {name: _entry(path, name, fields, 8 + length) for name, fields in header.items()}
    _check_coverage(path, entries, 8 + length, size)
    return entries


def read_tensor(entry: Entry, storage: npt.DTypeLike) -> npt.NDArray[Any]:
    """One tensor, in memory of its own, as the NumPy dtype that its bytes stand for."""
    try:
        # Straight into the array: a mapping would count the file's pages on top of the copy.
        raw = np.fromfile(entry.path, np.uint8, entry.num_bytes, offset=entry.offset)
    except OSError as error:
        raise CheckpointError(f"cannot read {entry.path}: {error.strerror or error}") from error
    if len(raw) != entry.num_bytes:
        raise _damaged(entry.path, "it became shorter after it was opened")
    return raw.view(storage).reshape(entry.shape)


def _damaged(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {problem}; download it again")


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise _damaged(path, f"{twice[:80]!r} occurs twice in its header")
        return fields

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({str(error)[:80]})") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    return header


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _entry(path: Path, name: str, fields: Any, data_start: int) -> Entry:
    def bad(problem: str) -> CheckpointError:
        return _damaged(path, f"tensor {name[:80]!r} {problem}")

    if not isinstance(fields, dict):
        raise bad("is not described by a JSON object")
    dtype, shape, span = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise bad(f"has the unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(_is_size, shape)):
        raise bad(f"has the impossible shape {str(shape)[:80]}")
    if not isinstance(span, list) or len(span) != 2 or not all(map(_is_size, span)):
        raise bad(f"has the impossible data_offsets {str(span)[:80]}")
    begin, end = span
    if (end - begin) * 8 != prod(shape) * BITS[dtype]:
        raise bad(f"spans bytes {begin} to {end}, which is not the size of {dtype} {str(shape)[:80]}")
    return Entry(path, dtype, tuple(shape), data_start + begin, end - begin)


def _check_coverage(path: Path, entries: dict[str, Entry], start: int, size: int) -> None:
    """The format has no gaps, so tensors in file order must follow one another up to the end."""
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if entry.offset != end:
            problem = "overlaps another" if entry.offset < end else "leaves a gap before it"
            raise _damaged(path, f"tensor {name[:80]!r} at byte {entry.offset} {problem}")
        end += entry.num_bytes
        if end > size:
            raise _damaged(path, f"tensor {name[:80]!r} ends at byte {end} but the file has {size}")
    if end != size:
        raise _damaged(path, f"its tensors end at byte {end} but the file has {size}")


ALIGNMENT = 64  # bytes; generated code loads whole vectors
PADDING = "__padding"  # names of the tensors that fill gaps, which the format itself does not allow


def layout(tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> tuple[bytes, dict[str, int]]:
    """The file's start (length and header) and each tensor's offset in the file, all aligned to 64 bytes.

    tensors: name -> (shape, dtype as safetensors calls it), in file order.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, (shape, dtype) in tensors.items():
        num_bytes = prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + num_bytes]}
        end += num_bytes
        if gap := -end % ALIGNMENT:
            header[f"{PADDING}{end}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [end, end + gap]}
            end += gap
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    start = len(text) + 8
    return len(text).to_bytes(8, "little") + text, {name: start + header[name]["data_offsets"][0] for name in tensors}
