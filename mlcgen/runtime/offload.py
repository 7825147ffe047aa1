"""Which layers' weights stay in a memory that is smaller than all of them, and which are streamed through it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mlcgen.errors import DeviceError, RequestError

__all__ = ["Division", "divide", "layer_of", "num_bytes"]

SLOTS = 2  # buffers that streamed layers take turns in: one is read while the next is filled


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
    large = [sum(sizes[name] for name in names) for names in each]
    total, least = sum(sizes.values()), sum(sizes.values())
    for count in [0, *range(SLOTS + 1, len(each) + 1)]:
        chosen = [i for i in range(len(each)) if (i + 1) * count // len(each) > i * count // len(each)]
        slot, streamed = max((large[i] for i in chosen), default=0), sum(large[i] for i in chosen)
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


def num_bytes(size: int | str) -> int:
    """A number of bytes, or 4GiB, 512MB, "1.5 GiB". Raises RequestError for anything else."""
    if isinstance(size, int) and size > 0:
        return size
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([KMGT]?)(I?)B?\s*", str(size)[:40].upper(), re.ASCII)
    if found and (found[2] or not found[3]):
        unit: int = (1024 if found[3] else 1000) ** " KMGT".index(found[2] or " ")
        if (parsed := int(float(found[1]) * unit)) > 0:
            return parsed
    raise RequestError(f"weight_memory {str(size)[:40]!r} is no size; write 4GiB, 512MB or a number of bytes")


def _shown(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 1 << 30 else f"{size / 2**20:.2f} MiB"
