"""The `plan` executor: runs a launch plan (mlcgen/launch_plan.py) on a device, without TVM.

A step in which every sequence decodes is recorded once per size, rounded up, as a graph of copies and kernels; from
then on a step is one copy into pinned memory and one launch. Other steps start their kernels one by one.
"""

import base64
import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcgen.errors import RequestError
from mlcgen.runtime.cuda import Address, CudaDevice, Graph
from mlcgen.runtime.device_sampler import DeviceSampler
from mlcgen.runtime.executor import Float32, Int32, StepInput
from mlcgen.runtime.sampler import Sampled, Sampler
from mlcgen.runtime.sizes import evaluate

ITEM_BYTES = {"float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "uint16": 2, "uint8": 1}
_ARGUMENTS = {"int32": ctypes.c_int32, "int64": ctypes.c_int64}


@dataclass
class _Step:
    """One size of step: where its inputs are, on the host and on the device, and its symbols."""

    host: dict[str, npt.NDArray[np.int32]]  # views of `staging`
    staging: npt.NDArray[np.uint8]  # pinned
    inputs: Address
    offsets: dict[str, int]
    symbols: dict[str, int]
    graph: Graph | None = None


class PlanExecutor:
    """One device. Call it from the thread that made it."""

    def __init__(
        self,
        device: CudaDevice,
        plan: Mapping[str, Any],
        manifest: Mapping[str, Any],
        weights: Mapping[str, Address],
        num_pages: int,
    ) -> None:
        self._device, self._plan = device, plan
        self.num_pages, self.page_size = num_pages, int(manifest["kv"]["page_size"])
        self.vocab_size = int(manifest["model"]["vocab_size"])
        self.max_batch = int(manifest["max_batch"])
        self.max_tokens_per_step = int(plan["max_tokens_per_step"])
        pages = plan["pages"]
        page_bytes = prod(pages["shape"]) * ITEM_BYTES[pages["dtype"]]
        self._pages = [device.allocate(num_pages * page_bytes, "KV pages") for _ in range(pages["layers"])]
        self._storages = [device.allocate(size, "intermediate results") for size in plan["storages"]]
        self._scratch = device.allocate(plan["scratch"], "kernels' scratch memory")
        self._counters = device.allocate(plan["counters"], "kernels' counters")
        self._constants = [self._upload_constant(constant) for constant in plan["constants"]]
        self._weights = weights
        self._steps: dict[tuple[int, ...], _Step] = {}
        self._logits = _PinnedRows(device, self.vocab_size)
        self._sampler = DeviceSampler(device, self.vocab_size, self.max_batch)
        device.synchronize()

    def step(self, batch: StepInput) -> Float32:
        """See Executor.step."""
        address = self._start(batch)
        logits = self._logits.rows(len(batch.logit_rows))
        self._device.download(logits, address)
        self._device.synchronize()
        return logits

    def start(self, batch: StepInput, samplers: Sequence[Sampler]) -> None:
        """See SamplingExecutor.start."""
        self._sampler.start(self._start(batch), samplers)

    def finish(self) -> Sampled:
        """See SamplingExecutor.finish."""
        self._device.synchronize()
        return self._sampler.finish()

    def _start(self, batch: StepInput) -> Address:
        """Start a step; returns where its logits will be."""
        if len(batch.input_ids) > self.max_tokens_per_step:
            raise RequestError(f"{len(batch.input_ids)} tokens in one step, {self.max_tokens_per_step} were compiled")
        is_decode = len(batch.input_ids) == len(batch.seq_lens) == len(batch.logit_rows)
        step = self._decode_step(batch) if is_decode else self._other_step(batch)
        if step.graph is not None:
            self._device.launch_graph(step.graph)
        else:
            self._run(step)
        return self._tensor_address(step, self._plan["output"])

    def _decode_step(self, batch: StepInput) -> _Step:
        count, blocks = len(batch.seq_lens), batch.block_table.shape[1]
        size = min(_power_of_two(count), self.max_batch)
        key = (size, _power_of_two(blocks))
        step = self._steps.get(key)
        if step is None:
            symbols = {"n": size, "rows": size, "seqs": size, "blocks": key[1], "num_pages": self.num_pages}
            step = self._new_step(symbols | {"is_decode": 1, "longest": key[1] * self.page_size})
            self._steps[key] = step
            self._fill(step, batch, count)
            self._run(step)  # before recording: what a first launch sets up is not part of a graph
            with self._device.capture() as graph:
                self._run(step)
            step.graph = graph
        self._fill(step, batch, count)
        return step

    def _other_step(self, batch: StepInput) -> _Step:
        n, seqs = len(batch.input_ids), len(batch.seq_lens)
        rows, blocks = max(len(batch.logit_rows), 1), batch.block_table.shape[1]
        key = (n, seqs, rows, blocks)
        self._steps = {k: s for k, s in self._steps.items() if len(k) == 2 or k == key}
        step = self._steps.get(key)
        if step is None:
            symbols = {"n": n, "rows": rows, "seqs": seqs, "blocks": blocks, "num_pages": self.num_pages}
            longest = _power_of_two(int(batch.seq_lens.max(initial=1)))
            step = self._new_step(symbols | {"is_decode": 0, "longest": longest})
            self._steps[key] = step
        self._fill(step, batch, seqs)
        return step

    def _new_step(self, symbols: dict[str, int]) -> _Step:
        shapes = {
            name: tuple(evaluate(size, symbols) for size in spec["shape"])
            for name, spec in self._plan["inputs"].items()
        }
        offsets, end = {}, 0
        for name, shape in shapes.items():
            offsets[name] = end
            end += -(-prod(shape) * 4 // 256) * 256
        staging = self._device.pinned(end)
        host = {
            name: staging[offsets[name] :].view(np.int32)[: prod(shape)].reshape(shape)
            for name, shape in shapes.items()
        }
        return _Step(host, staging, self._device.allocate(end, "inputs of a step"), offsets, symbols)

    def _fill(self, step: _Step, batch: StepInput, count: int) -> None:
        """The batch's arrays into pinned memory; what is rounded up becomes sequences of no token."""
        host = step.host
        for name, padding in _PADDING.items():
            if name not in host:
                continue
            array: Int32 = getattr(batch, name)
            held = host[name]
            if array.ndim == 2:
                held[: array.shape[0], : array.shape[1]] = array
                continue
            held[: len(array)] = array
            if len(array) < len(held):
                held[len(array) :] = array[-1] if padding is None and len(array) else padding or 0

    def _run(self, step: _Step) -> None:
        self._device.upload(step.inputs, step.staging)
        for name, tensors, own in self._plan["steps"]:
            symbols = step.symbols | {symbol: evaluate(size, step.symbols) for symbol, size in own.items()}
            for launch in self._launches(name, symbols):
                self._launch(launch, tensors, step, symbols)

    def _launches(self, kernel: str, symbols: Mapping[str, int]) -> Sequence[Mapping[str, Any]]:
        for variant in self._plan["kernels"][kernel]:
            if evaluate(variant["when"], symbols):
                launches: Sequence[Mapping[str, Any]] = variant["launches"]
                return launches
        raise RequestError(f"no variant of {kernel} fits {symbols}")

    def _launch(self, launch: Mapping[str, Any], tensors: Sequence[int], step: _Step, symbols: dict[str, int]) -> None:
        args = [self._argument(arg, tensors, step, symbols) for arg in launch["args"]]
        grid = [evaluate(size, symbols) for size in launch["grid"]]
        shared = evaluate(launch["shared"], symbols)
        self._device.launch(launch["function"], grid, launch["block"], shared, args, launch["overlaps"])

    def _argument(self, arg: Sequence[Any], tensors: Sequence[int], step: _Step, symbols: dict[str, int]) -> Any:
        kind, value = arg
        if kind in _ARGUMENTS:
            return _ARGUMENTS[kind](evaluate(value, symbols))
        if kind == "float32":
            return ctypes.c_float(value)
        if kind == "map":
            address = self._address(value["of"], tensors, step, symbols)
            dims = tuple(evaluate(size, symbols) for size in value["dims"])
            return self._device.tensor_map(
                address, value["dtype"], dims, tuple(value["strides"]), tuple(value["box"]), value["swizzle"]
            )
        return ctypes.c_uint64(self._address(arg, tensors, step, symbols))

    def _address(self, arg: Sequence[Any], tensors: Sequence[int], step: _Step, symbols: dict[str, int]) -> Address:
        kind, value = arg
        if kind == "tensor":
            return self._tensor_address(step, tensors[value])
        if kind == "scratch":
            return self._scratch + evaluate(value, symbols)
        return self._counters if kind == "counters" else 0

    def _tensor_address(self, step: _Step, index: int) -> Address:
        tensor = self._plan["tensors"][index]
        kind = tensor["kind"]
        if kind == "storage":
            return self._storages[tensor["storage"]] + int(tensor["offset"])
        if kind == "input":
            return step.inputs + step.offsets[tensor["name"]]
        if kind == "weights":
            return self._weights[tensor["name"]]
        return self._pages[tensor["layer"]] if kind == "pages" else self._constants[tensor["constant"]]

    def _upload_constant(self, constant: Mapping[str, str]) -> Address:
        data = np.frombuffer(base64.b64decode(constant["data"]), np.uint8)
        address = self._device.allocate(data.nbytes, "constants")
        self._device.upload(address, data)
        self._device.synchronize()
        return address


# What stands behind the batch's own entries where a size was rounded up; None: the last entry again.
_PADDING: dict[str, int | None] = {
    "input_ids": 0,
    "positions": 0,
    "slot_mapping": -1,
    "block_table": 0,
    "seq_lens": 0,
    "query_start": None,
    "logit_rows": 0,
}


class _PinnedRows:
    """Host memory for logits, as many rows as were ever asked for."""

    def __init__(self, device: CudaDevice, width: int) -> None:
        self._device, self._width = device, width
        self._held = np.zeros((0, width), np.float32)

    def rows(self, count: int) -> Float32:
        if count > len(self._held):
            raw = self._device.pinned(_power_of_two(count) * self._width * 4)
            self._held = raw.view(np.float32).reshape(-1, self._width)
        return self._held[:count]


def _power_of_two(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def function_names(plan: Mapping[str, Any]) -> list[str]:
    """Each function that the plan launches."""
    launches = (launch for kernel in plan["kernels"].values() for variant in kernel for launch in variant["launches"])
    return sorted({str(launch["function"]) for launch in launches})
