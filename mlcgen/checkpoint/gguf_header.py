"""The GGUF container, read strictly: every count, length and offset is checked against the file before it is used."""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mlcgen.checkpoint.base import Array
from mlcgen.checkpoint.gguf_blocks import BLOCK_TYPES, OTHER_TYPES, BlockType
from mlcgen.errors import CheckpointError, UnsupportedError

MAX_DIMS = 4  # ggml's own limit
MAX_NAME = 1 << 16  # bytes in a metadata key or tensor name; real ones have less than 100
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


@dataclass(frozen=True)
class StoredTensor:
    shape: tuple[int, ...]  # outermost dimension first, as numpy has it
    kind: BlockType
    offset: int  # from the start of the file
    num_bytes: int


@dataclass(frozen=True)
class GgufFile:
    path: Path
    metadata: dict[str, Any]  # str, bool, int, float, list[str] or numpy array
    tensors: dict[str, StoredTensor]  # by GGUF name

    def rows(self, tensor: StoredTensor) -> Array:
        """The stored bytes, mapped: (rows, bytes per row) uint8. A vector of floats has one element per row."""
        try:
            flat = np.memmap(self.path, np.uint8, "r", tensor.offset, (tensor.num_bytes,))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {self.path}: {error}; was it changed since it was opened?") from error
        is_float_vector = len(tensor.shape) == 1 and tensor.kind.unpack is None
        return flat.reshape(-1, tensor.kind.row_bytes(1 if is_float_vector else tensor.shape[-1]))


def read_gguf_file(path: Path) -> GgufFile:
    """Header, metadata and tensor table of a GGUF file, version 2 or 3, little endian. Tensor data is not touched.

    Raises CheckpointError where the file is truncated or contradicts itself, UnsupportedError where it is well formed
    but uses a version, byte order or tensor type that mlcgen does not read. Format: ggml's docs/gguf.md.
    """
    try:
        size = path.stat().st_size
        if size < 24:
            raise CheckpointError(f"{path} has {size} bytes, too few for a GGUF file; download it again")
        with path.open("rb") as stream:
            data = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    cursor = _Cursor(path, data)
    num_tensors, num_entries = _preamble(cursor)
    metadata = _metadata(cursor, num_entries)
    alignment = _alignment(cursor, metadata)
    return GgufFile(path, metadata, _tensors(cursor, num_tensors, alignment))


class _Cursor:
    """A position in the file that refuses to move past its end."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path, self.data, self.at = path, data, 0

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged: {problem}; download or convert it again")

    def take(self, num_bytes: int, what: str) -> memoryview:
        left = len(self.data) - self.at
        if num_bytes > left:
            raise self.error(f"{what} at byte {self.at} needs {num_bytes} bytes but {left} are left")
        self.at += num_bytes
        return self.data[self.at - num_bytes : self.at]

    def u32(self, what: str) -> int:
        return int(struct.unpack("<I", self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(struct.unpack("<Q", self.take(8, what))[0])

    def count(self, item_bytes: int, what: str) -> int:
        """A number of items, each of which takes at least item_bytes of what is left of the file."""
        n = self.u64(what)
        if n * item_bytes > len(self.data) - self.at:
            raise self.error(f"{what} is {n}, more than the rest of the file can hold")
        return n

    def string(self, what: str, limit: int | None = None) -> str:
        n = self.u64(what)
        if limit is not None and n > limit:
            raise self.error(f"{what} is {n} bytes long (limit {limit})")
        try:
            return str(self.take(n, what), "utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} at byte {self.at - n} is not UTF-8") from None


def _preamble(cursor: _Cursor) -> tuple[int, int]:
    magic = bytes(cursor.take(4, "magic"))
    if magic != b"GGUF":
        raise CheckpointError(f"{cursor.path} is not a GGUF file: it starts with {magic!r}, not b'GGUF'")
    version = cursor.u32("version")
    if version and version & 0xFFFF == 0:
        raise UnsupportedError(f"{cursor.path} is a big-endian GGUF file; convert it to little endian")
    if version not in (2, 3):
        raise UnsupportedError(f"{cursor.path} is GGUF version {version}; have: 2, 3 (convert the model again)")
    # name length, dims, one dim, type, offset / key length, type, one byte of value
    return cursor.count(8 + 4 + 8 + 4 + 8, "tensor count"), cursor.count(8 + 4 + 1, "metadata count")


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.string("metadata key", MAX_NAME)
        if key in metadata:
            raise cursor.error(f"metadata key {key!r} occurs twice")
        metadata[key] = _value(cursor, key)
    return metadata


def _value(cursor: _Cursor, key: str) -> Any:
    kind = cursor.u32(f"type of {key!r}")
    if kind == _STRING:
        return cursor.string(f"value of {key!r}")
    if kind == _ARRAY:
        return _array(cursor, key)
    return _numbers(cursor, key, kind, 1)[0].item()


def _array(cursor: _Cursor, key: str) -> list[str] | Array:
    kind = cursor.u32(f"item type of {key!r}")
    if kind == _ARRAY:
        raise UnsupportedError(f"{cursor.path}: metadata {key!r} is an array of arrays, which no model needs")
    if kind == _STRING:
        what = f"item of {key!r}"
        return [cursor.string(what) for _ in range(cursor.count(8, f"length of {key!r}"))]
    return _numbers(cursor, key, kind, cursor.u64(f"length of {key!r}"))


def _numbers(cursor: _Cursor, key: str, kind: int, count: int) -> Array:
    if kind not in _SCALARS:
        raise cursor.error(f"metadata {key!r} has the unknown type {kind}")
    dtype = np.dtype(_SCALARS[kind])
    raw = np.frombuffer(cursor.take(count * dtype.itemsize, f"value of {key!r}"), np.uint8)
    return (raw != 0) if dtype == np.bool_ else raw.view(dtype).copy()


def _alignment(cursor: _Cursor, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment is {str(alignment)[:40]}, not a power of two")
    return alignment


def _tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, StoredTensor]:
    table: dict[str, StoredTensor] = {}
    for _ in range(count):
        name = cursor.string("tensor name", MAX_NAME)
        if name in table:
            raise cursor.error(f"tensor {name!r} occurs twice")
        table[name] = _tensor(cursor, name, alignment)
    start = -(-cursor.at // alignment) * alignment  # data begins at the next aligned byte
    tensors = {name: StoredTensor(t.shape, t.kind, start + t.offset, t.num_bytes) for name, t in table.items()}
    _check_extents(cursor, tensors)
    return tensors


def _tensor(cursor: _Cursor, name: str, alignment: int) -> StoredTensor:
    """One entry of the tensor table; its offset counts from the start of the data."""
    num_dims = cursor.u32(f"rank of {name!r}")
    if not 1 <= num_dims <= MAX_DIMS:
        raise cursor.error(f"tensor {name!r} has {num_dims} dimensions (1 to {MAX_DIMS} are possible)")
    shape = tuple(cursor.u64(f"shape of {name!r}") for _ in range(num_dims))[::-1]  # stored innermost first
    number, offset = cursor.u32(f"type of {name!r}"), cursor.u64(f"offset of {name!r}")
    if number in OTHER_TYPES:
        have = ", ".join(kind.name for kind in BLOCK_TYPES.values())
        raise UnsupportedError(f"{cursor.path}: {name!r} is stored as {OTHER_TYPES[number]}; have: {have}")
    if number not in BLOCK_TYPES:
        raise cursor.error(f"tensor {name!r} has the unknown type {number}")
    kind = BLOCK_TYPES[number]
    if min(shape) < 1 or shape[-1] % kind.block:
        raise cursor.error(f"tensor {name!r} has shape {shape}, which {kind.name} blocks of {kind.block} cannot fill")
    if offset % alignment:
        raise cursor.error(f"tensor {name!r} starts at {offset}, not a multiple of the alignment {alignment}")
    return StoredTensor(shape, kind, offset, prod(shape) // kind.block * kind.num_bytes)


def _check_extents(cursor: _Cursor, tensors: dict[str, StoredTensor]) -> None:
    end, before = cursor.at, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset < end:
            raise cursor.error(f"tensor {name!r} at byte {tensor.offset} overlaps {before}")
        end, before = tensor.offset + tensor.num_bytes, repr(name)
        if end > len(cursor.data):
            raise cursor.error(f"tensor {name!r} ends at byte {end} but the file has {len(cursor.data)}")
