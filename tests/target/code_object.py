"""Reads code objects of AMD's GPUs: symbols, and what their notes tell of kernels (LLVM's AMDGPU usage guide)."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MACHINE, NOTE_SEGMENT, METADATA = 224, 4, 32
DYNAMIC_SYMBOLS, UNDEFINED = 11, 0
FEATURES = {0x3F: "gfx90a", 0x4C: "gfx942", 0x41: "gfx1100", 0x4E: "gfx1201"}  # of e_flags: the processor


@dataclass(frozen=True)
class CodeObject:
    processor: str
    abi: int
    symbols: dict[str, int]  # name -> bytes
    undefined: list[str]
    kernels: dict[str, dict[str, Any]]  # name -> metadata


def read(data: bytes) -> CodeObject:
    assert data[:5] == b"\x7fELF\x02"
    assert struct.unpack_from("<H", data, 18)[0] == MACHINE
    program, sections = struct.unpack_from("<QQ", data, 32)
    flags, _, program_size, num_program, section_size, num_sections = struct.unpack_from("<IHHHHH", data, 48)
    segments = [struct.unpack_from("<IIQQQQ", data, program + i * program_size) for i in range(num_program)]
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, sections + i * section_size) for i in range(num_sections)]
    notes = [data[offset : offset + size] for kind, _, offset, _, _, size in segments if kind == NOTE_SEGMENT]
    metadata = next(found for note in notes for found in _metadata(note))
    kernels = {kernel[".name"]: kernel for kernel in metadata["amdhsa.kernels"]}
    symbols, undefined = {}, []
    table = next(header for header in headers if header[1] == DYNAMIC_SYMBOLS)
    names = headers[table[6]][4]
    for at in range(table[4] + 24, table[4] + table[5], 24):  # the first symbol is none
        name_at, _, _, section, _, size = struct.unpack_from("<IBBHQQ", data, at)
        name = data[names + name_at : data.index(b"\0", names + name_at)].decode()
        if section == UNDEFINED:
            undefined.append(name)
        symbols[name] = size
    return CodeObject(FEATURES[flags & 0xFF], data[8], symbols, undefined, kernels)


def _metadata(notes: bytes) -> Iterator[Any]:
    at = 0
    while at < len(notes):
        name_bytes, size, kind = struct.unpack_from("<III", notes, at)
        start = at + 12 + -(-name_bytes // 4) * 4
        if kind == METADATA:
            yield _message(notes, start)[0]
        at = start + -(-size // 4) * 4


def _message(data: bytes, at: int) -> tuple[Any, int]:
    """(value, where the next one begins) of MessagePack."""
    head = data[at]
    at += 1
    if head <= 0x7F or head >= 0xE0:
        return head if head <= 0x7F else head - 256, at
    if head <= 0x9F:
        return (_map if head <= 0x8F else _list)(data, at, head & 0xF)
    if head <= 0xBF:
        return data[at : at + (head & 0x1F)].decode(), at + (head & 0x1F)
    if head in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[head], at
    kinds = {0xCC: "B", 0xCD: "H", 0xCE: "I", 0xCF: "Q", 0xD9: "B", 0xDA: "H", 0xDC: "H", 0xDE: "H"}
    (number,) = struct.unpack_from(">" + kinds[head], data, at)
    at += struct.calcsize(kinds[head])
    if head <= 0xCF:
        return number, at
    if head <= 0xDA:
        return data[at : at + number].decode(), at + number
    return (_list if head == 0xDC else _map)(data, at, number)


def _list(data: bytes, at: int, count: int) -> tuple[list[Any], int]:
    found = []
    for _ in range(count):
        value, at = _message(data, at)
        found.append(value)
    return found, at


def _map(data: bytes, at: int, count: int) -> tuple[dict[Any, Any], int]:
    flat, at = _list(data, at, 2 * count)
    return dict(zip(flat[::2], flat[1::2], strict=True)), at
