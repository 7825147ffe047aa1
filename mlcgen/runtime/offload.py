"""Which layers' weights stay in a memory that is smaller than all of them, and which are streamed through it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mlcgen.errors import DeviceError, RequestError

__all__ = ["Division", "divide", "layer_of", "parse_bytes"]

SLOTS = 2  # buffers that streamed layers take turns in: one is read while the next is filled
_UNITS = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class Division:
    """Names of weights, and bytes."""

    resident: tuple[str, ...]
    streamed: tuple[tuple[str, ...], ...]  # of each layer that does not stay, in order
    slot_bytes: int  # of the largest of these


def divide(sizes: Mapping[str, int], budget: int | None) -> Division:
    """Stream as few layers as possible, so that all that is held at a time is at most `budget` bytes.

    sizes: bytes of each weight by name. What belongs to no layer (embedding, last norm, head) stays. Those that stream
    are spread evenly, so that while layers compute that are there, the next one is on its way.
    budget: None leaves all where it is. Raises DeviceError that says the least that works.
    """
    if budget is None:
        return Division(tuple(sizes), (), 0)
    layers: dict[int, list[str]] = {}
    for name in sizes:
        if (layer := layer_of(name)) is not None:
            layers.setdefault(layer, []).append(name)
    each = [layers[number] for number in sorted(layers)]
    num_bytes = [sum(sizes[name] for name in names) for names in each]
    total, least = sum(sizes.values()), sum(sizes.values())
    for count in [0, *range(SLOTS + 1, len(each) + 1)]:
        chosen = [i for i in range(len(each)) if (i + 1) * count // len(each) > i * count // len(each)]
        slot, streamed = max((num_bytes[i] for i in chosen), default=0), sum(num_bytes[i] for i in chosen)
        held = total - streamed + SLOTS * slot
        if held <= budget:
            moving = {name for i in chosen for name in each[i]}
            resident = tuple(name for name in sizes if name not in moving)
            return Division(resident, tuple(tuple(each[i]) for i in chosen), slot)
        least = min(least, held)
    raise DeviceError(
        f"weight_memory {_shown(budget)} is too small: what every step needs (embedding, norms, head) and "
        f"{SLOTS} layers take {_shown(least)}; give at least {least} bytes, or quantize further (-q)"
    )


def layer_of(name: str) -> int | None:
    """The number of the layer that a weight belongs to, the first in its name; None for what belongs to none."""
    return next((int(part) for part in name.split(".") if part.isascii() and part.isdigit() and len(part) < 9), None)


def parse_bytes(text: str) -> int:
    """4GiB, 512MB, 1.5 GiB or a number of bytes. Raises RequestError for anything else."""
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([KMGT]?I?B?)\s*", text.upper(), re.ASCII)
    if found:
        unit = found[2] + "B" * (found[2] != "" and not found[2].endswith("B"))
        if (size := int(float(found[1]) * _UNITS.get(unit, 1 if unit == "B" else 0))) > 0:
            return size
    raise RequestError(f"{text[:40]!r} is no size of memory; write 4GiB, 512MiB or a number of bytes")


def _shown(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 1 << 30 else f"{num_bytes / 2**20:.2f} MiB"
