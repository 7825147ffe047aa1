"""The `plan` executor: runs launch plans (mlcgen/launch_plan.py) on a device, without TVM.

An artifact for adapters has two: steps in which no sequence has one run the plan that knows of none. Both have the same
weights, pages, inputs and memory for intermediate results, of which only one step's are alive at a time.

A step in which every sequence decodes is recorded once per size, rounded up, as a graph of copies and kernels; from
then on a step is one copy into pinned memory and one launch. Other steps start their kernels one by one, and so do all
where layers are streamed: the link takes far longer than the host needs to start what it waits for.
"""

import base64
import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcgen.adapter_layout import SLOTS, AdapterLayout
from mlcgen.errors import DeviceError, RequestError
from mlcgen.runtime.check_numerics import described, is_finite
from mlcgen.runtime.device import Address, Device
from mlcgen.runtime.executor import AdaptedStepInput, Float32, Int32, StepInput, Uint8
from mlcgen.runtime.layer_stream import LayerStream
from mlcgen.runtime.pinned import PinnedRows, power_of_two
from mlcgen.runtime.plan import ITEM_BYTES, adapter_bytes, storage_bytes
from mlcgen.runtime.sizes import evaluate

INPUT_ALIGNMENT = 256  # bytes
ADAPTED = "adapted:"  # what names of the second plan's kernels begin with
_ARGUMENTS = {"int32": ctypes.c_int32, "int64": ctypes.c_int64}


class _Inputs:
    """Where a step's inputs are: pinned memory on the host, and as much on the device."""

    def __init__(self, device: Device, num_bytes: int) -> None:
        self.staging = device.pinned(num_bytes)
        self.address = device.allocate(num_bytes, "inputs of a step")


@dataclass(frozen=True)
class _Function:
    """A plan, and what is its alone."""

    plan: Mapping[str, Any]
    prefix: str  # of its kernels' names
    constants: Sequence[Address]


@dataclass
class Step:
    """One size of step: its inputs by name, in memory of their own or that steps of any size share, and its symbols."""

    inputs: _Inputs
    num_bytes: int
    host: dict[str, Int32]  # views of the pinned memory
    offsets: dict[str, int]
    symbols: dict[str, int]
    turn: int
    function: _Function
    graph: Any = None

    def address(self, name: str) -> Address:
        return self.inputs.address + self.offsets[name]


class PlanExecutor:
    """One device. Call it from the thread that made it.

    Steps take turns with `TURNS` sets of inputs, so that a subclass may prepare one while another is under way.
    """

    TURNS = 1

    def __init__(
        self,
        device: Device,
        plan: Mapping[str, Any],
        manifest: Mapping[str, Any],
        weights: Mapping[str, Address],
        num_pages: int,
        stream: LayerStream | None = None,
        adapted: Mapping[str, Any] | None = None,
    ) -> None:
        """adapted: the plan with the path of adapters, whose kernels were loaded behind ADAPTED."""
        self.device, self.stream = device, stream
        self.adapters = None if adapted is None else AdapterLayout.from_json(manifest["adapters"])
        plans = [plan] if adapted is None else [plan, adapted]
        self._adapter_buffers = {name: self._allocate_adapters(size) for name, size in adapter_bytes(plans[-1]).items()}
        self.num_pages, self.page_size = num_pages, int(manifest["kv"]["page_size"])
        self.vocab_size = int(manifest["model"]["vocab_size"])
        self.max_batch = int(manifest["max_batch"])
        self.max_tokens_per_step = int(plan["max_tokens_per_step"])
        self.supports_trees = "tree_masks" in plan["inputs"]
        pages = plan["pages"]
        page_bytes = prod(pages["shape"]) * ITEM_BYTES[pages["dtype"]]
        self.page_shape = int(pages["layers"]), page_bytes
        self._pages = [device.allocate(num_pages * page_bytes, "KV pages") for _ in range(pages["layers"])]
        self._storages = [device.allocate(size, "intermediate results") for size in storage_bytes(plans)]
        self._scratch = device.allocate(max(each["scratch"] for each in plans), "kernels' scratch memory")
        self._counters = device.allocate(max(each["counters"] for each in plans), "kernels' counters")
        self._functions = [
            _Function(each, prefix, [self._upload_constant(constant) for constant in each["constants"]])
            for each, prefix in zip(plans, ("", ADAPTED), strict=False)
        ]
        self._weights = weights
        self._max_logit_rows = min(int(plan["max_logit_rows"]), device.largest_binding // (self.vocab_size * 4))
        self._logits = PinnedRows(device, self.vocab_size)
        self._decode_steps: dict[tuple[str, int, int, int], Step] = {}
        self._room = self._largest_step(manifest)
        inputs = max(self._input_layout(each, self._room, self._room)[2] for each in plans)
        self._inputs = [_Inputs(device, inputs) for _ in range(self.TURNS)]  # of steps of any size
        self._turn = 0
        device.synchronize()

    def step(self, batch: StepInput) -> Float32:
        """See Executor.step."""
        step = self.launched(batch)
        logits = self._logits.rows(len(batch.logit_rows))
        self.device.download(logits, self.logits_address(step))
        self.device.synchronize()
        return logits

    def first_not_finite(self, batch: StepInput) -> str | None:
        """See Executor.first_not_finite."""
        step = self.prepared(batch)
        self._turn = (self._turn - 1) % self.TURNS  # the next step's is another one still
        found = step.function.plan["tensors"]
        for name, tensors, symbols in self._started_kernels(step):
            for index in tensors:
                tensor = found[index]
                if tensor["kind"] != "storage":
                    continue
                shape = [evaluate(size, symbols) for size in tensor["shape"]]
                if tensor["shape"][0] == "n":  # rows behind the batch's own hold anything
                    shape[0] = len(batch.input_ids)
                result = np.empty(shape, "uint16" if tensor["dtype"] == "bfloat16" else tensor["dtype"])
                self.device.download(result, self._tensor_address(step, index))
                self.device.synchronize()
                if not is_finite(result):
                    read = [found[i] for i in tensors]
                    return described(name, [each["name"] for each in read if each["kind"] == "weights"])
        return None

    def copy_page(self, source: int, to: int) -> None:
        """See Executor.copy_page."""
        num_bytes = self.page_shape[1]
        for pages in self._pages:
            self.device.copy(pages + to * num_bytes, pages + source * num_bytes, num_bytes)

    def read_page(self, page: int, to: Uint8) -> None:
        """See Executor.read_page."""
        for layer, pages in zip(to, self._pages, strict=True):
            self.device.download(layer, pages + page * self.page_shape[1])
        self.device.synchronize()

    def write_page(self, page: int, contents: Uint8) -> None:
        """See Executor.write_page."""
        for layer, pages in zip(contents, self._pages, strict=True):
            self.device.upload(pages + page * self.page_shape[1], layer)
        self.device.synchronize()  # the contents may change afterwards

    def write_adapter(self, slot: int, matrices: Sequence[tuple[npt.NDArray[Any], npt.NDArray[Any]]]) -> None:
        """See AdaptedExecutor.write_adapter."""
        for buffer, matrix in zip(self._adapter_buffers.values(), chain(*matrices), strict=True):
            self.device.upload(buffer + slot * matrix.nbytes, matrix)
        self.device.synchronize()  # the matrices may go afterwards

    def _allocate_adapters(self, num_bytes: int) -> Address:
        try:
            return self.device.allocate(num_bytes, "adapters")
        except DeviceError as error:
            raise DeviceError(f"{error}; or compile with fewer --adapters") from error

    def launched(self, batch: StepInput, **more: Int32 | None) -> Step:
        """The batch's step, begun. more: inputs beside the batch's, of shapes `more_inputs`."""
        if len(batch.input_ids) > self.max_tokens_per_step:
            raise RequestError(f"{len(batch.input_ids)} tokens in one step, {self.max_tokens_per_step} were compiled")
        if len(batch.logit_rows) > self._max_logit_rows:
            raise RequestError(f"{len(batch.logit_rows)} rows of logits, {self._max_logit_rows} were compiled")
        step = self.prepared(batch, **more)
        if step.graph is not None:
            self.device.launch_graph(step.graph)
        else:
            self.run(step)
        return step

    def prepared(self, batch: StepInput, **more: Int32 | None) -> Step:
        """The step of the batch's size, with the batch in its inputs; recorded where all decode and nothing streams."""
        self._turn = (self._turn + 1) % self.TURNS
        is_decode = len(batch.input_ids) == len(batch.seq_lens) == len(batch.logit_rows)
        step = self._decode_step(batch) if is_decode else self._other_step(batch)
        self._fill(step, {**vars(batch), **more})
        if is_decode and step.graph is None and self.stream is None:
            self.run(step)  # before recording: what a first launch sets up is not part of a graph
            with self.device.capture() as graph:
                self.run(step)
            step.graph = graph
        return step

    def _decode_step(self, batch: StepInput) -> Step:
        """Of a number of sequences and a width of their block tables that are powers of two."""
        size = min(power_of_two(len(batch.seq_lens)), self.max_batch)
        blocks = power_of_two(batch.block_table.shape[1])
        function = self._function(batch)
        key = (function.prefix, self._turn, size, blocks)
        if key not in self._decode_steps:
            symbols = {"n": size, "rows": size, "seqs": size, "blocks": blocks}
            symbols |= {"is_decode": 1, "has_trees": 0, "longest": blocks * self.page_size}
            self._decode_steps[key] = self._new_step(function, symbols)
        return self._decode_steps[key]

    def _other_step(self, batch: StepInput) -> Step:
        n, seqs = len(batch.input_ids), len(batch.seq_lens)
        rows, blocks = max(len(batch.logit_rows), 1), batch.block_table.shape[1]
        symbols = {"n": n, "rows": rows, "seqs": seqs, "blocks": blocks}
        longest = power_of_two(int(batch.seq_lens.max(initial=1)))
        has_trees = int(batch.tree_masks is not None and batch.tree_masks.any())
        symbols |= {"is_decode": 0, "has_trees": has_trees, "longest": longest}
        return self._new_step(self._function(batch), symbols, self._inputs[self._turn])

    def _function(self, batch: StepInput) -> _Function:
        return self._functions[isinstance(batch, AdaptedStepInput)]

    def _new_step(self, function: _Function, symbols: dict[str, int], inputs: _Inputs | None = None) -> Step:
        """A step with `inputs`, or with some of its own."""
        room = self._room if inputs else symbols
        shapes, offsets, num_bytes = self._input_layout(function.plan, symbols, room)
        symbols |= {"num_pages": self.num_pages, **self.device.symbols}
        inputs = inputs or _Inputs(self.device, num_bytes)
        words = inputs.staging.view(np.int32)
        host = {name: words[offsets[name] // 4 :][: prod(shape)].reshape(shape) for name, shape in shapes.items()}
        return Step(inputs, num_bytes, host, offsets, symbols, self._turn, function)

    def _input_layout(
        self, plan: Mapping[str, Any], symbols: Mapping[str, int], room: Mapping[str, int]
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, int], int]:
        """Shapes of the inputs by name, where they begin, and their bytes together.

        Each has the place that it needs in a step of `room`, so that steps of other sizes have theirs at the same
        addresses, for which a device may keep something. Block tables, the largest by far, come last.
        """
        shapes, places = self._input_shapes(plan, symbols), self._input_shapes(plan, room)
        offsets, end, num_bytes = {}, 0, 0
        for name in sorted(shapes, key=lambda name: name == "block_table"):
            offsets[name], num_bytes = end, end + _aligned(prod(shapes[name]) * 4)
            end += _aligned(prod(places[name]) * 4)
        return shapes, offsets, num_bytes

    def _input_shapes(self, plan: Mapping[str, Any], symbols: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        shapes = self.more_inputs(symbols)
        for name, spec in plan["inputs"].items():
            shapes[name] = tuple(evaluate(size, symbols) for size in spec["shape"])
        return shapes

    def more_inputs(self, symbols: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Shapes of a step's int32 inputs beside the plan's."""
        return {}

    def begin(self, step: Step) -> None:
        """Called where a step's inputs are on the device, before its kernels."""

    def logits_address(self, step: Step) -> Address:
        return self._tensor_address(step, step.function.plan["output"])

    def _largest_step(self, manifest: Mapping[str, Any]) -> dict[str, int]:
        tokens = self.max_tokens_per_step
        blocks = -(-int(manifest["context_length"]) // self.page_size) + 1
        sequences = min(tokens, max(self.max_batch, 1))
        return {"n": tokens, "rows": self._max_logit_rows, "seqs": sequences, "blocks": blocks}

    def _fill(self, step: Step, arrays: Mapping[str, Int32 | None]) -> None:
        """The batch's arrays into pinned memory; what is rounded up becomes sequences of no token."""
        for name, held in step.host.items():
            array, padding = arrays.get(name), _PADDING[name]
            if array is None:
                held[:] = padding or 0
            elif array.ndim == 2:
                held[: array.shape[0], : array.shape[1]] = array
            else:
                held[: len(array)] = array
                if len(array) < len(held):
                    held[len(array) :] = array[-1] if padding is None else padding

    def run(self, step: Step) -> None:
        """Start a step's copies and kernels one by one."""
        for _ in self._started_kernels(step):
            pass

    def _started_kernels(self, step: Step) -> Iterator[tuple[str, Sequence[int], dict[str, int]]]:
        """Start a step's kernels: (name, tensors, symbols) of each that was started."""
        self.device.upload(step.inputs.address, step.inputs.staging[: step.num_bytes])
        self.begin(step)
        plan, is_adapted = step.function.plan, step.function is not self._functions[0]
        for index, (name, tensors, own) in enumerate(plan["steps"]):
            waits = self.stream is not None and self.stream.reach(index, is_adapted)
            symbols = step.symbols | {symbol: evaluate(size, step.symbols) for symbol, size in own.items()}
            for launch in self._launches(plan, name, symbols):
                self._launch(launch, tensors, step, symbols, waits)
                waits = False
            yield name, tensors, symbols
        if self.stream is not None:
            self.stream.reach(len(plan["steps"]), is_adapted)

    def _launches(
        self, plan: Mapping[str, Any], kernel: str, symbols: Mapping[str, int]
    ) -> Sequence[Mapping[str, Any]]:
        for variant in plan["kernels"][kernel]:
            if evaluate(variant["when"], symbols):
                launches: Sequence[Mapping[str, Any]] = variant["launches"]
                return launches
        raise RequestError(f"no variant of {kernel} fits {symbols}")

    def _launch(
        self, launch: Mapping[str, Any], tensors: Sequence[int], step: Step, symbols: dict[str, int], waits: bool
    ) -> None:
        """waits: until all that came before it has ended."""
        args = [self._argument(arg, tensors, step, symbols) for arg in launch["args"]]
        grid = [evaluate(size, symbols) for size in launch["grid"]]
        shared = evaluate(launch["shared"], symbols)
        overlaps = launch["overlaps"] and not waits
        self.device.launch(step.function.prefix + launch["function"], grid, launch["block"], shared, args, overlaps)

    def _argument(self, arg: Sequence[Any], tensors: Sequence[int], step: Step, symbols: dict[str, int]) -> Any:
        kind, value = arg
        if kind in _ARGUMENTS:
            return _ARGUMENTS[kind](evaluate(value, symbols))
        if kind == "float32":
            return ctypes.c_float(value)
        if kind == "map":
            address = self._address(value["of"], tensors, step, symbols)
            dims = tuple(evaluate(size, symbols) for size in value["dims"])
            return self.device.tensor_map(  # type: ignore[attr-defined]  # of CUDA, whose plans alone have maps
                address, value["dtype"], dims, tuple(value["strides"]), tuple(value["box"]), value["swizzle"]
            )
        return ctypes.c_uint64(self._address(arg, tensors, step, symbols))

    def _address(self, arg: Sequence[Any], tensors: Sequence[int], step: Step, symbols: dict[str, int]) -> Address:
        kind, value = arg
        if kind == "tensor":
            return self._tensor_address(step, tensors[value])
        if kind == "part":
            return self._tensor_address(step, tensors[value[0]]) + int(value[1])
        if kind == "scratch":
            return self._scratch + evaluate(value, symbols)
        return self._counters if kind == "counters" else 0

    def _tensor_address(self, step: Step, index: int) -> Address:
        tensor = step.function.plan["tensors"][index]
        kind = tensor["kind"]
        if kind == "storage":
            return self._storages[tensor["storage"]] + int(tensor["offset"])
        if kind == "input":
            return step.address(tensor["name"])
        if kind == "weights":
            return self._weights[tensor["name"]]
        if kind == "adapters":
            return self._adapter_buffers[tensor["name"]]
        return self._pages[tensor["layer"]] if kind == "pages" else step.function.constants[tensor["constant"]]

    def _upload_constant(self, constant: Mapping[str, str]) -> Address:
        data = np.frombuffer(base64.b64decode(constant["data"]), np.uint8)
        address = self.device.allocate(data.nbytes, "constants")
        self.device.upload(address, data)
        self.device.synchronize()
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
    "tree_masks": 0,
    SLOTS: -1,
    "sampled_rows": -1,
}


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // INPUT_ALIGNMENT) * INPUT_ALIGNMENT
