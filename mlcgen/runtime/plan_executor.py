"""The `plan` executor: runs launch plans (mlcgen/launch_plan.py) on a device, without TVM.

An artifact for adapters has two: steps in which no sequence has one run the plan that knows of none. Both have the same
weights, pages, inputs and memory for intermediate results, of which only one step's are alive at a time.

A step in which every sequence decodes is recorded once per size, rounded up, as a graph of copies and kernels; from
then on a step is one copy into pinned memory and one launch. So are other steps of few tokens, whose kernels the host
would start more slowly than the device runs them, when a size comes again. Larger ones start their kernels one by one,
and so do all where layers are streamed: the link takes far longer than the host needs to start what it waits for.
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
from mlcgen.runtime.device import Address, Device, StridedDevice
from mlcgen.runtime.executor import AdaptedStepInput, Float32, Int32, StepInput, Uint8
from mlcgen.runtime.kv_cache import stretches
from mlcgen.runtime.layer_stream import LayerStream
from mlcgen.runtime.pinned import PinnedRows, power_of_two
from mlcgen.runtime.plan import ITEM_BYTES, adapter_bytes, storage_bytes
from mlcgen.runtime.sized_launch import SizedLaunch, changes, sized_launches, tensor_map
from mlcgen.runtime.sizes import evaluate

INPUT_ALIGNMENT = 256  # bytes
FEW_TOKENS = (4, 8, 16, 32, 48, 64)  # to which steps of few tokens are rounded up; products have tiles of these sizes
MOST_KEPT = 512  # steps; those in which all decode are fewer
ADAPTED = "adapted:"  # what names of the second plan's kernels begin with


class _Inputs:
    """Where a step's inputs are: pinned memory on the host, and as much on the device."""

    def __init__(self, device: Device, num_bytes: int) -> None:
        self.staging = device.pinned(num_bytes)
        self.address = device.allocate(num_bytes, "inputs of a step")
        self.kept: dict[tuple[str, int, int], list[Any]] = {}  # of each launch of a plan: its arguments, but for sizes


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
    is_kept: bool  # for later steps of the size
    has_run: bool = False
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
        self._strided = device if isinstance(device, StridedDevice) else None
        self._pages = self._allocate_pages()
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
        self._kept_steps: dict[tuple[Any, ...], Step] = {}
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

    def pinned(self, num_bytes: int) -> Uint8:
        """See Executor.pinned."""
        return self.device.pinned(num_bytes)

    def read_pages(self, pages: Sequence[int], host: Uint8, places: Sequence[int]) -> None:
        """See Executor.read_pages."""
        for held, offset in self._page_copies(pages, host, places):
            if self._strided is not None:
                self._strided.download_layers(held, self._pages[0] + offset, self._layer_stride)
            else:
                for layer, address in zip(held, self._pages, strict=True):
                    self.device.download(layer, address + offset)
        self.device.synchronize()

    def write_pages(self, pages: Sequence[int], host: Uint8, places: Sequence[int]) -> None:
        """See Executor.write_pages."""
        for held, offset in self._page_copies(pages, host, places):
            if self._strided is not None:
                self._strided.upload_layers(self._pages[0] + offset, self._layer_stride, held)
            else:
                for layer, address in zip(held, self._pages, strict=True):
                    self.device.upload(address + offset, layer)
        self.device.synchronize()  # the contents may change afterwards

    def _page_copies(self, pages: Sequence[int], host: Uint8, places: Sequence[int]) -> Iterator[tuple[Uint8, int]]:
        """For pages that are neighbours in both memories: the host's, and where they begin in each layer's."""
        for page, place, count in stretches(pages, places):
            yield host[:, place : place + count], page * self.page_shape[1]

    @property
    def _layer_stride(self) -> int:
        return self.num_pages * self.page_shape[1]

    def _allocate_pages(self) -> list[Address]:
        """Of each layer; in one piece only where that lets layers be copied together."""
        layers, size = self.page_shape[0], self._layer_stride
        if self._strided is None:
            return [self.device.allocate(size, "KV pages") for _ in range(layers)]
        first = self.device.allocate(layers * size, "KV pages")
        return [first + layer * size for layer in range(layers)]

    def synchronize(self) -> None:
        """See Executor.synchronize."""
        self.device.synchronize()

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
            self._record(step)
        return step

    def prepared(self, batch: StepInput, **more: Int32 | None) -> Step:
        """The step of the batch's size, with the batch in its inputs."""
        self._turn = (self._turn + 1) % self.TURNS
        is_decode = len(batch.input_ids) == len(batch.seq_lens) == len(batch.logit_rows)
        step = self._decode_step(batch) if is_decode else self._other_step(batch)
        self._fill(step, {**vars(batch), **more})
        return step

    def _record(self, step: Step) -> None:
        """A graph of a step that is under way, for when its size comes again: at once of those in which all decode, of
        others the second time. What a first launch sets up is no part of it."""
        if step.is_kept and (step.symbols["is_decode"] or step.has_run):
            with self.device.capture() as graph:
                self.run(step)
            step.graph = graph
        step.has_run = True

    def _decode_step(self, batch: StepInput) -> Step:
        """Of a number of sequences and a width of their block tables that are powers of two."""
        size = min(power_of_two(len(batch.seq_lens)), self.max_batch)
        blocks = power_of_two(batch.block_table.shape[1])
        symbols = {"n": size, "rows": size, "seqs": size, "blocks": blocks}
        symbols |= {"is_decode": 1, "has_trees": 0, "longest": blocks * self.page_size}
        key = self._key(batch, symbols)
        if key not in self._kept_steps:
            self._kept_steps[key] = self._new_step(self._function(batch), symbols)
        return self._kept_steps[key]

    def _key(self, batch: StepInput, symbols: Mapping[str, int]) -> tuple[Any, ...]:
        return self._function(batch).prefix, self._turn, *symbols.values()

    def _other_step(self, batch: StepInput) -> Step:
        n, seqs = len(batch.input_ids), len(batch.seq_lens)
        rows, blocks = max(len(batch.logit_rows), 1), batch.block_table.shape[1]
        symbols = {"n": n, "rows": rows, "seqs": seqs, "blocks": blocks}
        longest = power_of_two(int(batch.seq_lens.max(initial=1)))
        has_trees = int(batch.tree_masks is not None and batch.tree_masks.any())
        symbols |= {"is_decode": 0, "has_trees": has_trees, "longest": longest}
        return self._small_step(batch, symbols) or self._new_step(
            self._function(batch), symbols, self._inputs[self._turn]
        )

    def _small_step(self, batch: StepInput, symbols: dict[str, int]) -> Step | None:
        """A step that is kept, rounded up to few sizes; None where there are too many tokens, or steps."""
        n = next((size for size in FEW_TOKENS if size >= symbols["n"]), self.max_tokens_per_step + 1)
        rows, blocks = power_of_two(symbols["rows"]), power_of_two(symbols["blocks"])
        seqs = max(symbols["seqs"], min(power_of_two(symbols["seqs"]), self.max_batch))
        if n > self.max_tokens_per_step or rows > self._max_logit_rows or self.stream is not None:
            return None
        rounded = symbols | {"n": n, "rows": rows, "seqs": seqs, "blocks": blocks}
        key = self._key(batch, rounded)
        if key not in self._kept_steps and len(self._kept_steps) < MOST_KEPT:
            self._kept_steps[key] = self._new_step(self._function(batch), rounded)
        return self._kept_steps.get(key)

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
        is_kept = inputs not in self._inputs and self.stream is None
        return Step(inputs, num_bytes, host, offsets, symbols, self._turn, function, is_kept)

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
        found: dict[tuple[Any, ...], tuple[dict[str, int], list[SizedLaunch]]] = {}
        for index, (name, tensors, own) in enumerate(plan["steps"]):
            waits = self.stream is not None and self.stream.reach(index, is_adapted)
            key = (name, *(evaluate(size, step.symbols) for size in own.values()))
            if key not in found:
                symbols = step.symbols | dict(zip(own, key[1:], strict=True))
                found[key] = symbols, sized_launches(name, plan["kernels"][name], symbols, self._scratch)
            symbols, launches = found[key]
            for launch in launches:
                self._launch(launch, index, tensors, step, waits)
                waits = False
            yield name, tensors, symbols
        if self.stream is not None:
            self.stream.reach(len(plan["steps"]), is_adapted)

    def _launch(self, sized: SizedLaunch, index: int, tensors: Sequence[int], step: Step, waits: bool) -> None:
        """index: the call's in the plan. waits: until all that came before it has ended."""
        launch, prefix = sized.launch, step.function.prefix
        key = (prefix, index, id(launch))
        if key not in step.inputs.kept:
            step.inputs.kept[key] = [self._kept_argument(arg, tensors, step) for arg in launch["args"]]
        args = sized.arguments(step.inputs.kept[key], self.device)
        overlaps = launch["overlaps"] and not waits
        self.device.launch(prefix + launch["function"], sized.grid, launch["block"], sized.shared, args, overlaps)

    def _kept_argument(self, arg: Sequence[Any], tensors: Sequence[int], step: Step) -> Any:
        """See SizedLaunch.arguments."""
        kind, value = arg
        if kind == "map":
            address = self._address(value["of"], tensors, step)
            return address if changes(arg) else tensor_map(self.device, value, address, value["dims"])
        return ctypes.c_float(value) if kind == "float32" else ctypes.c_uint64(self._address(arg, tensors, step))

    def _address(self, arg: Sequence[Any], tensors: Sequence[int], step: Step) -> Address:
        """0 for what is none, or changes with a step's sizes."""
        kind, value = arg
        if kind == "tensor":
            return self._tensor_address(step, tensors[value])
        if kind == "part":
            return self._tensor_address(step, tensors[value[0]]) + int(value[1])
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
