"""The drivers of fake_cuda.c and fake_hip.c, compiled and put in the places of NVIDIA's and AMD's."""

import ctypes
import functools
import importlib.util
import inspect
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mlcgen.runtime import cuda, hip
from mlcgen.runtime.driver_device import DriverDevice

OPTIONS = ["-x", "c", "-O1", "-Wall", "-Wextra", "-shared", "-fPIC"]
KINDS = ("memory", "pinned", "stream", "event", "module", "graph", "executable")

Kernel = Callable[[tuple[int, int, int], int, bytes], None]  # grid, block, arguments one after the other
_HOOK = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_void_p, ctypes.c_size_t
)


class FakeDriver:
    """What happened in a fake driver, and what is to happen."""

    def __init__(self, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, kinds: tuple[str, ...]) -> None:
        """kinds: of what `live` counts."""
        self._library, self._monkeypatch, self._kinds = library, monkeypatch, kinds
        self.kernels: dict[str, Kernel] = {}  # by name; those that are not in it do nothing
        library.fake_log.restype = ctypes.c_char_p
        self._hook = _HOOK(self._run)
        library.fake_kernels(self._hook)

    def set(self, **settings: int) -> None:
        """arch (90), memory (bytes), devices, version (of CUDA that the driver is for, 13000), ahead (0): streams but
        the first do what they can at once, not as late as they can."""
        for name, value in settings.items():
            self._monkeypatch.setenv(f"FAKE_CUDA_{name.upper()}", str(value))

    @property
    def log(self) -> list[str]:
        """Of each call its line, under CUDA's name also in HIP's."""
        return self._library.fake_log().decode().splitlines()

    def logged(self, word: str) -> list[str]:
        """The lines that begin with a word."""
        return [line for line in self.log if line.split()[0] == word]

    def live(self) -> dict[str, int]:
        """How many there are of what was taken and not given back."""
        counts = {kind: self._library.fake_live(kind.encode()) for kind in self._kinds}
        return {kind: count for kind, count in counts.items() if count}

    @property
    def pending(self) -> int:
        """How much was started and is not done."""
        return self._library.fake_pending()

    def fail(self, function: str, code: int = 1, nth: int = 1) -> None:
        """Let the n-th call of a function from now on do nothing but return an error."""
        assert hasattr(self._library, function)
        self._library.fake_fail(function.encode(), nth, code)

    def _run(self, name: bytes, grid: Any, block: int, args: int | None, num_bytes: int) -> None:
        if kernel := self.kernels.get(name.decode()):
            kernel((grid[0], grid[1], grid[2]), block, ctypes.string_at(args, num_bytes) if args else b"")


def install_cuda(monkeypatch: pytest.MonkeyPatch, folder: Path) -> FakeDriver:
    """Let mlcgen.runtime.cuda find a fresh fake driver. Skips the test where there is no C compiler."""
    path = _install(monkeypatch, cuda, "libcuda.so.1", _compiled("fake_cuda"), folder)
    return FakeDriver(ctypes.CDLL(path), monkeypatch, (*KINDS, "context"))


def install_hip(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str) -> FakeDriver:
    """Likewise mlcgen.runtime.hip. HIP has no contexts that are given back. options: for the C compiler."""
    path = _install(monkeypatch, hip, "libamdhip64.so.6", _compiled("fake_hip", *options), folder)
    return FakeDriver(ctypes.CDLL(path), monkeypatch, KINDS)


def _install(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, library: Path, folder: Path) -> str:
    for setting in ("CUDA_ARCH", "CUDA_MEMORY", "CUDA_DEVICES", "CUDA_AHEAD", "HIP_ARCH"):
        monkeypatch.delenv(f"FAKE_{setting}", raising=False)
    # A copy has its own state, also for devices of a failed test that go later.
    path = str(shutil.copy(library, folder / name))
    replace_loader(monkeypatch, module, {name: ctypes.CDLL(path)})
    return path


def replace_loader(monkeypatch: pytest.MonkeyPatch, module: ModuleType, libraries: dict[str, ctypes.CDLL]) -> None:
    """Let mlcgen.runtime.cuda or .hip find these libraries only."""

    def load(name: str) -> ctypes.CDLL:
        if name not in libraries:
            raise OSError(f"{name}: cannot open shared object file")
        return libraries[name]

    monkeypatch.setattr(module, "ctypes", SimpleNamespace(**{**vars(ctypes), "CDLL": load}))
    monkeypatch.setattr(module, "_library", functools.cache(inspect.unwrap(module._library)))


@functools.cache
def _compiled(name: str, *options: str) -> Path:
    if not (command := _compiler()):
        pytest.skip("needs Linux, and a C compiler or the ziglang wheel")
    source = Path(__file__).with_name(f"{name}.c")
    path = Path(_folder().name) / f"{'_'.join([name, *options])}.so"
    done = subprocess.run([*command, *OPTIONS, *options, str(source), "-o", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path


def _compiler() -> list[str]:
    if sys.platform != "linux":
        return []
    if found := shutil.which("cc") or shutil.which("gcc") or shutil.which("clang"):
        return [found]
    return [sys.executable, "-m", "ziglang", "cc"] if importlib.util.find_spec("ziglang") else []


@functools.cache
def _folder() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="mlcgen-fake-driver-")


class Cuda:
    """What tests of both drivers have to know of one. They name functions as CUDA's library does."""

    title, prefix, unnamed_error = "CUDA", "cu", "?"
    overlaps = " 6=1"  # of a launch in the log
    context: Mapping[str, int] = {"context": 1}  # that is alive beside what a device took in it
    module, open, install = cuda, cuda.CudaDevice, staticmethod(install_cuda)

    def symbol(self, function: str) -> str:
        return function

    def documented(self, function: str) -> str:
        """What errors call it."""
        return re.sub(r"(_v2|WithFlags)$", "", function)

    def error(self, name: str) -> str:
        return "CUDA_ERROR" + re.sub("[A-Z]", r"_\g<0>", name).upper()


class Hip(Cuda):
    title, prefix, unnamed_error = "HIP", "hip", "hipErrorUnknown"
    overlaps = ""
    context: Mapping[str, int] = {}
    module, open, install = hip, hip.HipDevice, staticmethod(install_hip)

    def symbol(self, function: str) -> str:
        names = {
            "cuMemAlloc_v2": "hipMalloc",
            "cuMemFree_v2": "hipFree",
            "cuMemHostAlloc": "hipHostMalloc",
            "cuStreamCreate": "hipStreamCreateWithFlags",
            "cuEventCreate": "hipEventCreateWithFlags",
            "cuGraphInstantiateWithFlags": "hipGraphInstantiate",
            "cuLaunchKernelEx": "hipModuleLaunchKernel",
        }
        return names.get(function) or "hip" + function.removeprefix("cu").removesuffix("_v2")

    def documented(self, function: str) -> str:
        return self.symbol(function)

    def error(self, name: str) -> str:
        return f"hipError{name}"


# Something to do

MODULE = b"add(8,8,4) plain small(8)+1024 mapped(128,8)"


def add(grid: tuple[int, int, int], block: int, args: bytes) -> None:
    """to[:n] += from[:n]"""
    to, source, count = struct.unpack("<QQi", args)
    np.ctypeslib.as_array((ctypes.c_int32 * count).from_address(to))[:] += np.frombuffer(
        ctypes.string_at(source, count * 4), np.int32
    )


def numbers(*values: int) -> list[Any]:
    """Arguments of `add`."""
    return [ctypes.c_uint64(values[0]), ctypes.c_uint64(values[1]), ctypes.c_int32(values[2])]


def recorded(driver: FakeDriver, device: DriverDevice) -> tuple[Any, npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """A graph that adds what is in a pinned array to a sum on the device, and writes it to another array."""
    driver.kernels["add"] = add
    device.load(MODULE, ["add"])
    to, source = device.allocate(16, "sum"), device.allocate(16, "inputs")
    given, found = (device.pinned(16).view(np.int32) for _ in range(2))
    given[:], found[:] = 1, -1
    with device.capture() as graph:
        device.upload(source, given)
        device.launch("add", (1, 1, 1), 32, 0, numbers(to, source, 4), overlaps=True)
        device.download(found, to)
    return graph, given, found


def begun(device: DriverDevice) -> dict[str, Any]:
    """Something of everything that a device takes."""
    device.load(MODULE, ["plain"])
    address, held = device.allocate(64, "numbers"), device.pinned(64)
    with device.capture() as graph:
        device.upload(address, held)
    return {"address": address, "held": held, "graph": graph}
