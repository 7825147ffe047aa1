"""A kernel's launches with a step's sizes filled in: computed once for all layers that call the kernel in the step.

Arguments that no size changes are addresses and the like, and are kept from step to step. So a step of some hundred
launches, most of them of few kernels, costs the host little.
"""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlcgen.errors import RequestError
from mlcgen.runtime.device import Address, Device
from mlcgen.runtime.sizes import evaluate

_NUMBERS = {"int32": ctypes.c_int32, "int64": ctypes.c_int64}


def changes(arg: Sequence[Any]) -> bool:
    """Whether sizes change a launch's argument."""
    kind, value = arg
    if kind == "map":
        return value["of"][0] == "scratch" or not all(type(size) is int for size in value["dims"])
    return kind in _NUMBERS or kind == "scratch"


def tensor_map(device: Device, spec: Mapping[str, Any], address: Address, dims: Sequence[int]) -> Any:
    strides, box = tuple(spec["strides"]), tuple(spec["box"])
    return device.tensor_map(  # type: ignore[attr-defined]  # of CUDA, whose plans alone have maps
        address, spec["dtype"], tuple(dims), strides, box, spec["swizzle"]
    )


@dataclass
class _Map:
    """A tensor map with its dimensions, and the device's maps that were made of it, by address."""

    spec: Mapping[str, Any]
    dims: tuple[int, ...]
    address: Address | None  # of what it is of, where that is not a tensor
    made: dict[Address, Any] = field(default_factory=dict)

    def at(self, address: Address, device: Device) -> Any:
        address = address if self.address is None else self.address
        if address not in self.made:
            self.made[address] = tensor_map(device, self.spec, address, self.dims)
        return self.made[address]


@dataclass(frozen=True)
class SizedLaunch:
    launch: Mapping[str, Any]  # of the plan
    grid: tuple[int, ...]
    shared: int  # bytes
    values: Sequence[tuple[int, Any]]  # places of arguments that sizes alone decide, and these
    maps: Sequence[tuple[int, _Map]]

    def arguments(self, kept: Sequence[Any], device: Device) -> list[Any]:
        """ctypes values. kept: those that do not change; for a map that does, the address of its tensor."""
        args = list(kept)
        for place, value in self.values:
            args[place] = value
        for place, each in self.maps:
            args[place] = each.at(args[place], device)
        return args


def sized_launches(
    kernel: str, variants: Sequence[Mapping[str, Any]], symbols: Mapping[str, int], scratch: Address
) -> list[SizedLaunch]:
    """Of the kernel's variant that fits. scratch: where the kernels' scratch memory is."""
    for variant in variants:
        if evaluate(variant["when"], symbols):
            return [_sized(launch, symbols, scratch) for launch in variant["launches"]]
    raise RequestError(f"no variant of {kernel} fits {symbols}")


def _sized(launch: Mapping[str, Any], symbols: Mapping[str, int], scratch: Address) -> SizedLaunch:
    values, maps = list[tuple[int, Any]](), list[tuple[int, _Map]]()
    for place, arg in enumerate(launch["args"]):
        kind, value = arg
        if not changes(arg):
            continue
        if kind in _NUMBERS:
            values.append((place, _NUMBERS[kind](evaluate(value, symbols))))
        elif kind == "scratch":
            values.append((place, ctypes.c_uint64(scratch + evaluate(value, symbols))))
        else:
            of_kind, offset = value["of"]
            address = scratch + evaluate(offset, symbols) if of_kind == "scratch" else None
            maps.append((place, _Map(value, tuple(evaluate(size, symbols) for size in value["dims"]), address)))
    grid = tuple(evaluate(size, symbols) for size in launch["grid"])
    return SizedLaunch(launch, grid, evaluate(launch["shared"], symbols), values, maps)
