"""The `vm` executor: a compiled Relax function run by TVM's small runtime library, through tvm_ffi alone."""

import contextlib
import ctypes
import importlib.util
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcgen.adapter_layout import AdapterLayout, ProjectionGroup
from mlcgen.errors import ArtifactError, DeviceError, RequestError
from mlcgen.runtime.check_numerics import described, is_finite
from mlcgen.runtime.cpu import usable_cores
from mlcgen.runtime.executor import AdaptedStepInput, Float32, StepInput, Uint8
from mlcgen.runtime.mapped_layers import MappedLayers
from mlcgen.safetensors import ALIGNMENT

KV_STORAGE = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}
_CPU, _POOLED = 1, 2  # DLPack device type; the VM's pooled allocator


_loaded: list[ctypes.CDLL] = []  # one at most: a second copy, another artifact's, would abort the process


def load_runtime_library(carried: Path | None) -> None:
    """TVM's runtime library: the installed one of the version we pin, else the artifact's own copy."""
    if _loaded or "tvm" in sys.modules:  # the compiler brought it
        return
    path = installed_runtime_library() or carried
    if path is None:
        raise ArtifactError("TVM's runtime library is neither in this artifact nor installed; pip install apache-tvm")
    with _without_torch():
        import tvm_ffi  # noqa: F401  (the library's symbols come from it)

    try:
        _loaded.append(ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL))
    except OSError as error:
        raise ArtifactError(f"cannot load {path}: {error}") from error


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """tvm_ffi imports torch wherever that is installed, which takes seconds and 300 MB of memory; we need none of it.

    None in sys.modules makes `import torch` an ImportError, as where it is absent. Does nothing if torch is there.
    """
    if "torch" in sys.modules or "tvm_ffi" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


def installed_runtime_library() -> Path | None:
    spec = importlib.util.find_spec("tvm")
    if spec is None or spec.origin is None:
        return None
    found = sorted(Path(spec.origin).parent.rglob("libtvm_runtime.so"))
    return found[0] if found else None


class VmExecutor:
    """One CPU. Call it from a single thread: TVM's worker threads belong to the thread that starts them."""

    def __init__(
        self,
        library: Path,
        manifest: Mapping[str, Any],
        weights: Mapping[str, npt.NDArray[Any]],
        num_pages: int,
        max_tokens_per_step: int,
        num_threads: int | None = None,
        stream: MappedLayers | None = None,
        adapted_library: Path | None = None,
    ) -> None:
        """adapted_library: with the path of adapters, where the artifact has it."""
        threads = num_threads or usable_cores()
        os.environ.setdefault("TVM_NUM_THREADS", str(threads))  # read when the first kernel runs
        import tvm_ffi

        self._tensor = tvm_ffi.from_dlpack
        model, kv = manifest["model"], manifest["kv"]
        self.num_pages, self.page_size = num_pages, int(kv["page_size"])
        self.vocab_size = int(model["vocab_size"])
        self.max_tokens_per_step = max_tokens_per_step
        entry = manifest["entry"]["name"]
        self._vms = [_load_vm(library)]
        self._forward = self._vms[0][entry]
        if num_threads:
            tvm_ffi.get_global_func("runtime.config_threadpool")(1, num_threads)
        shape = (num_pages, 2, int(kv["num_kv_heads"]), self.page_size, int(kv["head_dim"]))
        pages = [_zero_pages(shape, KV_STORAGE[kv["dtype"]]) for _ in range(int(kv["num_layers"]))]
        self._page_bytes = [page.reshape(num_pages, -1).view(np.uint8) for page in pages]  # (num_pages, bytes)
        self.page_shape = len(pages), self._page_bytes[0].shape[1]
        self._pages = [self._tensor(page) for page in pages]
        self._weight_names: list[str] = list(manifest["entry"]["weights"])
        self._weights = [self._tensor(weights[name]) for name in self._weight_names]
        self.stream = stream
        self._inputs: list[str] = list(manifest["entry"]["inputs"])
        self.supports_trees = "tree_masks" in self._inputs
        self._no_masks = np.zeros(max_tokens_per_step, np.int32)
        self._staged: dict[str, tuple[npt.NDArray[Any], Any]] = {}
        self.adapters: AdapterLayout | None = None
        if adapted_library is not None:
            self.adapters = AdapterLayout.from_json(manifest["adapters"])
            self._vms.append(_load_vm(adapted_library))
            self._adapted = self._vms[1][entry]
            self._slots = [_zero_slots(group, self.adapters) for group in self.adapters.groups]
            self._fixed = self._fixed_arguments()
        self._instrument(None if stream is None else _entering(stream))

    def step(self, batch: StepInput) -> Float32:
        """See Executor.step."""
        if len(batch.input_ids) > self.max_tokens_per_step:
            raise RequestError(f"{len(batch.input_ids)} tokens in one step, {self.max_tokens_per_step} were compiled")
        wanted = len(batch.logit_rows)
        rows = batch.logit_rows if wanted else np.zeros(1, np.int32)  # the output matrix takes at least one row
        masks = self._no_masks[: len(batch.input_ids)] if batch.tree_masks is None else batch.tree_masks
        arrays = {**vars(batch), "logit_rows": rows, "tree_masks": masks}
        if isinstance(batch, AdaptedStepInput):
            logits = self._adapted(*self._adapted_arguments(arrays), *self._weights)
        else:
            inputs = [self._stage(name, arrays[name]) for name in self._inputs]
            logits = self._forward(*inputs, *self._pages, *self._weights)
        result: Float32 = np.from_dlpack(logits)[:wanted]  # type: ignore[assignment]
        return result

    def first_not_finite(self, batch: StepInput) -> str | None:
        """See Executor.first_not_finite."""
        pages = {tensor.data_ptr() for tensor in self._pages}
        names = dict(zip((tensor.data_ptr() for tensor in self._weights), self._weight_names, strict=True))
        entering = None if self.stream is None else _entering(self.stream)
        found: list[str] = []

        def check(func: Any, kernel: str, before_run: bool, result: Any, *args: Any) -> int:
            if entering is not None:
                entering(func, kernel, before_run, result, *args)
            tensors = [arg for arg in args if hasattr(arg, "data_ptr")]
            if not (before_run or found or kernel.startswith("vm.")) and tensors:
                last = tensors[-1]  # kernels write to their last argument
                if last.data_ptr() not in pages and not is_finite(np.from_dlpack(last)):
                    read = [names[tensor.data_ptr()] for tensor in tensors if tensor.data_ptr() in names]
                    found.append(described(kernel, read))
            return 0

        self._instrument(check)
        try:
            self.step(batch)
        finally:
            self._instrument(entering)
        return found[0] if found else None

    def _instrument(self, called: Callable[..., Any] | None) -> None:
        """What the VM calls before and after each function that it calls."""
        for vm in self._vms:
            vm["set_instrument"](called)

    def copy_page(self, source: int, to: int) -> None:
        """See Executor.copy_page."""
        for pages in self._page_bytes:
            pages[to] = pages[source]

    def pinned(self, num_bytes: int) -> Uint8:
        """See Executor.pinned. Any memory, which is used only once it is written to."""
        return np.zeros(num_bytes, np.uint8)

    def read_pages(self, pages: Sequence[int], host: Uint8, places: Sequence[int]) -> None:
        """See Executor.read_pages."""
        for held, layer in zip(host, self._page_bytes, strict=True):
            for page, place in zip(pages, places, strict=True):
                held[place] = layer[page]

    def write_pages(self, pages: Sequence[int], host: Uint8, places: Sequence[int]) -> None:
        """See Executor.write_pages."""
        for held, layer in zip(host, self._page_bytes, strict=True):
            for page, place in zip(pages, places, strict=True):
                layer[page] = held[place]

    def synchronize(self) -> None:
        """See Executor.synchronize. A step ends before `step` does."""

    def write_adapter(self, slot: int, matrices: Sequence[tuple[npt.NDArray[Any], npt.NDArray[Any]]]) -> None:
        """See AdaptedExecutor.write_adapter."""
        for slots, pair in zip(self._slots, matrices, strict=True):
            for buffer, matrix in zip(slots, pair, strict=True):
                buffer[slot] = matrix

    def _fixed_arguments(self) -> dict[str, Any]:
        """Of the function with the path of adapters: those that stay the same from step to step, by name."""
        fixed = {f"pages_{layer}": pages for layer, pages in enumerate(self._pages)}
        for i, pair in enumerate(self._slots):
            a, b = map(self._tensor, pair)
            fixed |= {f"lora_a_{i}": a, f"lora_b_{i}": b}
        return fixed

    def _adapted_arguments(self, arrays: Mapping[str, npt.NDArray[Any]]) -> list[Any]:
        assert self.adapters is not None, "the artifact takes no adapters"
        fixed = self._fixed
        return [fixed[n] if n in fixed else self._stage(n, arrays[n]) for n in self.adapters.arguments]

    def _stage(self, name: str, array: npt.NDArray[Any]) -> Any:
        """The tensor of an input. While its shape stays the same, as when decoding, memory and tensor are kept."""
        held, tensor = self._staged.get(name, (None, None))
        if held is None or held.shape != array.shape:
            held = _aligned_empty(array)
            tensor = self._tensor(held)
            self._staged[name] = held, tensor
        held[...] = array
        return tensor


def _entering(stream: MappedLayers) -> Callable[..., None]:
    """For VmExecutor._instrument: a function's arguments tell which layer comes."""
    from tvm_ffi import Tensor

    layer_at = stream.layer_at

    def called(function: Any, name: str, is_before: bool, result: Any, *args: Any) -> None:
        if is_before and not name.startswith("vm.builtin."):  # those check shapes, and read no weights
            for arg in args:
                if isinstance(arg, Tensor) and (layer := layer_at.get(arg.data_ptr())) is not None:
                    stream.enter(layer)

    return called


def _load_vm(library: Path) -> Any:
    import tvm_ffi

    vm = tvm_ffi.load_module(str(library))["vm_load_executable"]()
    vm["vm_initialization"](_CPU, 0, _POOLED)
    return vm


def _zero_slots(group: ProjectionGroup, layout: AdapterLayout) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """lora_a and lora_b. Raises DeviceError where there is no room."""
    limits = layout.limits
    shapes = group.a_shape(limits), group.b_shape(limits)
    try:
        a, b = (_zero_pages(shape, limits.dtype) for shape in shapes)
    except (OSError, OverflowError, ValueError) as error:
        size = sum(map(prod, shapes)) * np.dtype(limits.dtype).itemsize * len(layout.groups)
        room = f"{limits.slots} adapters of rank {limits.rank} take about {size / 2**30:.1f} GiB"
        raise DeviceError(f"{room}, which this machine does not have; compile with fewer --adapters") from error
    return a, b


def _zero_pages(shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    """Zeros on a memory page's border (generated code loads aligned vectors); no memory is used until written to."""
    size = prod(shape) * np.dtype(dtype).itemsize
    return np.frombuffer(mmap.mmap(-1, size), dtype).reshape(shape)


def _aligned_empty(like: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """An array of that shape and type at a multiple of 64 bytes, as generated code expects."""
    raw = np.empty(like.nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + like.nbytes].view(like.dtype).reshape(like.shape)
