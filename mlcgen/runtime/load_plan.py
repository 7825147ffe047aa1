"""From a launch plan to its executor: the device of the target's kind, weights, and pages in what memory is left."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlcgen.errors import DeviceError, TargetError
from mlcgen.runtime.device import Address, Device, StreamingDevice
from mlcgen.runtime.executor import Executor
from mlcgen.runtime.host_layers import host_layers, padded_bytes
from mlcgen.runtime.kv_size import page_bytes, useful_pages
from mlcgen.runtime.layer_stream import LayerStream, find_visits
from mlcgen.runtime.offload import divide
from mlcgen.runtime.plan import (
    adapter_bytes,
    bound_bytes,
    check_adapted,
    check_fit,
    function_names,
    read_plan,
    storage_bytes,
)

KV_BYTES = 4 << 30  # for pages, where neither the user names a number nor the device tells how much memory there is
HOST_SHARE = 0.8  # of the host's free memory, for layers that are streamed from there; more are read from the file


def load_plan(
    kind: str,
    plan_file: Path,
    manifest: Mapping[str, Any],
    weights: Mapping[str, Any] | None,
    num_pages: int | None,
    max_batch: int,
    memory_utilization: float,
    weight_memory: int | None = None,
    adapted_file: Path | None = None,
) -> Executor:
    """weights: arrays by name; None: random ones. weight_memory: see load_executor. adapted_file: the plan with the
    path of adapters, where the artifact has it. Raises as load_executor does."""
    from mlcgen.runtime import argmax_sampler, device_sampler, device_weights
    from mlcgen.runtime.plan_executor import ADAPTED
    from mlcgen.runtime.sampling_executor import TAKE_TOKENS, SamplingPlanExecutor

    plan = read_plan(plan_file)
    check_fit(plan, manifest, weights)
    adapted = None if adapted_file is None else read_plan(adapted_file)
    if adapted is not None:
        check_adapted(adapted, plan, manifest)
    plans = [plan] if adapted is None else [plan, adapted]
    device, names = open_device(kind), [*function_names(plan), TAKE_TOKENS]
    if kind == "cuda":
        names += [*device_weights.FUNCTIONS, *device_sampler.FUNCTIONS]
    else:
        names += argmax_sampler.FUNCTIONS
    for each in plans:
        _check_bindings(each, device)
    device.load(base64.b64decode(plan["module"]), names)
    if adapted is not None:
        device.load(base64.b64decode(adapted["module"]), function_names(adapted), ADAPTED)
    addresses, stream = _weights(device, plans, weights, weight_memory, kind == "cuda")
    num_pages = _num_pages(device, plans, manifest, num_pages, max_batch, memory_utilization)
    sampling = device_sampler.DeviceSampler if kind == "cuda" else argmax_sampler.ArgmaxSampler
    return SamplingPlanExecutor(device, plan, manifest, addresses, num_pages, sampling, stream, adapted)


def _weights(
    device: Device,
    plans: Sequence[Mapping[str, Any]],
    weights: Mapping[str, Any] | None,
    budget: int | None,
    makes_random: bool,
) -> tuple[dict[str, Address], LayerStream | None]:
    """Where each weight is on the device, and what brings those that do not stay there."""
    from mlcgen.runtime import device_weights

    specs = plans[0]["weights"]
    division = divide({name: padded_bytes(spec) for name, spec in specs.items()}, budget)
    given = weights or device_weights.Random(specs)
    resident = {name: specs[name] for name in division.resident}
    if weights is None and makes_random:
        addresses = device_weights.make_random_weights(device, resident)
    else:
        addresses = device_weights.upload_weights(device, resident, given)
    if not division.streamed:
        return addresses, None
    stream = _stream(device, plans, given, division.streamed)
    return addresses | stream.addresses(), stream


def _stream(
    device: Device,
    plans: Sequence[Mapping[str, Any]],
    weights: Mapping[str, Any],
    layers: Sequence[Sequence[str]],
) -> LayerStream:
    from mlcgen.runtime.load import free_memory

    if not isinstance(device, StreamingDevice):
        text = f"{device.name} cannot stream weights (weight_memory); CPUs, CUDA and ROCm can"
        raise TargetError(f"{text}; use one of these targets, or quantize further (-q)")
    visits, *adapted = (find_visits(plan, layers) for plan in plans)
    memory = int(free_memory() * HOST_SHARE)
    source = host_layers(device, plans[0]["weights"], weights, layers, memory)
    return LayerStream(device, visits, source, *adapted)


def open_device(kind: str) -> Device:
    if kind == "cuda":
        from mlcgen.runtime.cuda import CudaDevice

        return CudaDevice()
    if kind == "rocm":
        from mlcgen.runtime.hip import HipDevice

        return HipDevice()
    if kind == "metal":
        from mlcgen.runtime.metal import MetalDevice

        return MetalDevice()
    from mlcgen.runtime.webgpu import WebgpuDevice

    return WebgpuDevice()


def _check_bindings(plan: Mapping[str, Any], device: Device) -> None:
    """Raises DeviceError for a tensor that the device's kernels cannot be given."""
    for name, num_bytes in bound_bytes(plan):
        if num_bytes > device.largest_binding:
            has = f"kernels on {device.name} reach {device.largest_binding / 2**20:.0f} MiB"
            raise DeviceError(
                f"{name[:80]} has {num_bytes / 2**20:.0f} MiB, {has}; quantize further (-q), or use another target"
            )


def _num_pages(
    device: Device,
    plans: Sequence[Mapping[str, Any]],
    manifest: Mapping[str, Any],
    wanted: int | None,
    max_batch: int,
    memory_utilization: float,
) -> int:
    each = page_bytes(manifest["kv"])
    most = device.largest_binding // (each // plans[0]["pages"]["layers"])
    if wanted is not None:
        if wanted > most:
            raise DeviceError(
                f"{wanted} pages are more than the {most} that kernels on {device.name} reach; lower them"
            )
        return wanted
    affordable = _bytes_left(device, plans, memory_utilization, each) // each
    return max(1, min(affordable, most, useful_pages(manifest, max_batch)))


def _bytes_left(device: Device, plans: Sequence[Mapping[str, Any]], memory_utilization: float, least: int) -> int:
    """Memory for pages. Raises DeviceError where it is less than `least`."""
    memory = device.memory()
    if memory is None:
        return KV_BYTES
    free, total = memory
    workspace = sum(storage_bytes(plans)) + max(plan["scratch"] for plan in plans)
    workspace += sum(adapter_bytes(plans[-1]).values())
    left = int(memory_utilization * total) - (total - free) - workspace
    if left < least:
        raise DeviceError(
            f"{memory_utilization:.0%} of the GPU's {total / 2**30:.1f} GiB leave no room for KV pages: "
            f"{(total - free) / 2**30:.2f} GiB are in use (weights and other programs), kernels need "
            f"{workspace / 2**30:.2f}; raise --gpu-memory-utilization, free memory, or keep layers on the host "
            "(--weight-memory)"
        )
    return left
