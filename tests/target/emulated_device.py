"""A CudaDevice without a GPU: memory is NumPy's, kernels run under the emulator."""

import contextlib
import ctypes
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .emulate_cuda import EmulatedKernel, compile_kernel

DEFINITION = 'extern "C" __global__'


class EmulatedDevice:
    """Stands in for runtime.cuda.CudaDevice; `load` takes the CUDA C++ text instead of machine code."""

    symbols: dict[str, int] = {}  # noqa: RUF012  (as CudaDevice, none)
    largest_binding = 1 << 48
    name = "Emulated GPU"

    def __init__(self) -> None:
        self.launched: list[str] = []
        self._memory: dict[int, np.ndarray] = {}
        self._recording: list[Any] | None = None
        self._texts: dict[str, tuple[str, str]] = {}  # a kernel's own name, and its text
        self._constants: dict[str, list[bool]] = {}  # parameters that are only read
        self._kernels: dict[str, EmulatedKernel] = {}

    def load(self, module: bytes, names: Sequence[str], prefix: str = "") -> None:
        includes, *definitions = module.decode().split(DEFINITION)
        for text in definitions:
            head = re.sub(r"__launch_bounds__\([^)]*\)", "", text)
            name, params = head.split("(")[0].split()[-1], head.split("(", 1)[1].split(")")[0].split(",")
            self._texts[prefix + name] = name, includes + DEFINITION + text
            self._constants[prefix + name] = ["const" in param for param in params]
        assert {prefix + name for name in names} <= set(self._texts)

    def allocate(self, num_bytes: int, purpose: str) -> int:
        array = np.zeros(num_bytes + 256, np.uint8)
        start = -array.ctypes.data % 256
        array = array[start : start + max(num_bytes, 16)]
        self._memory[array.ctypes.data] = array
        return array.ctypes.data

    def memory(self) -> None: ...

    def free(self, address: int) -> None:
        del self._memory[address]

    def pinned(self, num_bytes: int) -> np.ndarray:
        return np.zeros(max(num_bytes, 16), np.uint8)

    def upload(self, to: int, array: np.ndarray) -> None:
        self._do(lambda: self._at(to)[: array.nbytes].__setitem__(slice(None), array.reshape(-1).view(np.uint8)))

    def download(self, to: np.ndarray, source: int) -> None:
        self._do(lambda: to.reshape(-1).view(np.uint8).__setitem__(slice(None), self._at(source)[: to.nbytes]))

    def copy(self, to: int, source: int, num_bytes: int) -> None:
        self._do(lambda: self._at(to)[:num_bytes].__setitem__(slice(None), self._at(source)[:num_bytes]))

    def synchronize(self) -> None: ...
    def fence(self) -> None: ...
    def reach(self, fence: None) -> None: ...
    def hold(self, fence: None) -> None: ...
    def wait_for(self, fence: None) -> None: ...

    def prefetch(self, to: int, array: np.ndarray, after: None, done: None) -> None:
        self.upload(to, array)  # at once, in the one order that there is

    def mark(self, which: int) -> None: ...
    def wait(self, which: int) -> None: ...

    def launch(
        self, name: str, grid: Sequence[int], block: int, shared: int, args: Sequence[Any], overlaps: bool = False
    ) -> None:
        if name not in self._kernels:
            own_name, text = self._texts[name]
            self._kernels[name] = compile_kernel(text, own_name)
        values = [self._value(arg, const) for arg, const in zip(args, self._constants[name], strict=True)]
        self._do(lambda: (self.launched.append(name), self._kernels[name](tuple(grid), block, values, shared)))

    @contextlib.contextmanager
    def capture(self) -> Iterator["Recorded"]:
        graph = Recorded()
        self._recording = graph.actions
        yield graph
        self._recording = None

    def launch_graph(self, graph: "Recorded") -> None:
        for action in graph.actions:
            action()

    def _do(self, action: Any) -> None:
        if self._recording is None:
            action()
        else:
            self._recording.append(action)

    def _value(self, arg: Any, is_constant: bool) -> Any:
        if isinstance(arg, ctypes.c_uint64):
            if not arg.value:
                return None
            array = self._at(arg.value)
            array.flags.writeable = not is_constant  # what is not written must not be copied back over its neighbours
            return array
        return {ctypes.c_int32: np.int32, ctypes.c_int64: np.int64, ctypes.c_float: np.float32}[type(arg)](arg.value)

    def _at(self, address: int) -> np.ndarray:
        for start, array in self._memory.items():
            if start <= address < start + array.nbytes:
                return array[address - start :]
        raise AssertionError(f"{address:#x} is no memory of this device")


class Recorded:
    def __init__(self) -> None:
        self.actions: list[Any] = []
