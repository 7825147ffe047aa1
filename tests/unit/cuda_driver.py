"""The driver of fake_cuda.c, compiled and put in the place of NVIDIA's."""

import ctypes
import functools
import importlib.util
import inspect
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlcgen.runtime import cuda

SOURCE = Path(__file__).with_name("fake_cuda.c")
OPTIONS = ["-x", "c", "-O1", "-Wall", "-Wextra", "-shared", "-fPIC"]
KINDS = ("memory", "pinned", "stream", "event", "module", "graph", "executable", "context")

Kernel = Callable[[tuple[int, int, int], int, bytes], None]  # grid, block, arguments one after the other
_HOOK = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_void_p, ctypes.c_size_t
)


class FakeDriver:
    """What happened in a fake driver, and what is to happen."""

    def __init__(self, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
        self._library, self._monkeypatch = library, monkeypatch
        self.kernels: dict[str, Kernel] = {}  # by name; those that are not in it do nothing
        library.fake_log.restype = ctypes.c_char_p
        self._hook = _HOOK(self._run)
        library.fake_kernels(self._hook)

    def set(self, **settings: int) -> None:
        """arch (90), memory (bytes), devices, version (of CUDA that the driver is for, 13000)."""
        for name, value in settings.items():
            self._monkeypatch.setenv(f"FAKE_CUDA_{name.upper()}", str(value))

    @property
    def log(self) -> list[str]:
        return self._library.fake_log().decode().splitlines()

    def logged(self, word: str) -> list[str]:
        """The lines that begin with a word."""
        return [line for line in self.log if line.split()[0] == word]

    def live(self) -> dict[str, int]:
        """How many there are of what was taken and not given back."""
        counts = {kind: self._library.fake_live(kind.encode()) for kind in KINDS}
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


def install(monkeypatch: pytest.MonkeyPatch, folder: Path) -> FakeDriver:
    """Let mlcgen.runtime.cuda find a fresh fake driver. Skips the test where there is no C compiler."""
    for name in ("ARCH", "MEMORY", "DEVICES"):
        monkeypatch.delenv(f"FAKE_CUDA_{name}", raising=False)
    # A copy has its own state, also for devices of a failed test that go later.
    path = str(shutil.copy(_library(), folder / "libcuda.so.1"))
    replace_loader(monkeypatch, {"libcuda.so.1": ctypes.CDLL(path)})
    return FakeDriver(ctypes.CDLL(path), monkeypatch)


def replace_loader(monkeypatch: pytest.MonkeyPatch, libraries: dict[str, ctypes.CDLL]) -> None:
    """Let mlcgen.runtime.cuda find these libraries only."""

    def load(name: str) -> ctypes.CDLL:
        if name not in libraries:
            raise OSError(f"{name}: cannot open shared object file")
        return libraries[name]

    monkeypatch.setattr(cuda, "ctypes", SimpleNamespace(**{**vars(ctypes), "CDLL": load}))
    monkeypatch.setattr(cuda, "_driver", functools.cache(inspect.unwrap(cuda._driver)))


@functools.cache
def _library() -> Path:
    if not (command := _compiler()):
        pytest.skip("needs Linux, and a C compiler or the ziglang wheel")
    path = Path(_folder().name) / "fake_cuda.so"
    done = subprocess.run([*command, *OPTIONS, str(SOURCE), "-o", str(path)], capture_output=True, text=True)
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
    return tempfile.TemporaryDirectory(prefix="mlcgen-fake-cuda-")
