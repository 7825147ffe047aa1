"""Running CUDA kernels without a GPU: compiled as C++ for this CPU, with cuda_emulator/ in place of CUDA."""

import ctypes
import functools
import hashlib
import importlib.util
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest

EMULATOR = Path(__file__).parent / "cuda_emulator"
KERNELS = Path(__file__).parents[2] / "targets" / "cuda_kernels"
# Undefined behaviour that a GPU punishes, too, or that comes of memory that was not written. Variables hold NaN until
# they are assigned.
CHECKS = ["-fsanitize=alignment,bounds,bool", "-fsanitize-undefined-trap-on-error", "-ftrivial-auto-var-init=pattern"]
# No libraries: finding them takes a fifth of the time, and what kernels call is there in Python's process.
OPTIONS = [
    *("-std=c++17", "-O1", "-march=native", "-ffp-contract=off", "-fno-exceptions", "-fno-rtti", "-nostdinc++"),
    *("-w", "-shared", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE", "-nostdlib"),
]

Dim3: TypeAlias = int | tuple[int, ...]
Argument: TypeAlias = "npt.NDArray[np.generic] | np.generic | int | float | None"
Order: TypeAlias = Literal["ascending", "descending"]
SCALAR, ARRAY, CONSTANT_ARRAY = range(3)


class EmulationError(RuntimeError):
    """What a kernel did wrong."""


class _Argument(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int), ("data", ctypes.c_void_p), ("bytes", ctypes.c_size_t))


class _Launch(ctypes.Structure):
    _fields_ = (
        *(("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_size_t)),
        *(("descending", ctypes.c_int), ("seconds", ctypes.c_int), ("argument_count", ctypes.c_int)),
        ("arguments", ctypes.POINTER(_Argument)),
    )


class EmulatedKernel:
    """A kernel compiled for this CPU."""

    def __init__(self, library: Path, name: str) -> None:
        functions = ctypes.CDLL(str(library))
        self._launch, parameters = functions[f"launch_{name}"], functions[f"parameters_{name}"]
        self._launch.restype = parameters.restype = ctypes.c_char_p
        self._parameters: str = parameters().decode()
        self._name = name

    def __call__(
        self,
        grid: Dim3,
        block: Dim3,
        args: Sequence[Argument],
        shared: int = 0,
        order: Order = "ascending",
        seconds: int = 60,
    ) -> None:
        """Run it on scalars and C-contiguous arrays (pointers; None is null), of which it may write the writeable ones.

        An int is an int32 and a float a float32; NumPy scalars are what they are. Threads, warps and blocks run in
        `order`: a kernel whose results depend on it lacks a barrier. Raises EmulationError for what a kernel must not
        do, also when it has not ended after `seconds`.
        """
        threads, blocks = _dim3(block), _dim3(grid)
        assert 0 < math.prod(threads) <= 1024
        assert math.prod(blocks) > 0
        assert shared <= 227 * 1024
        values = [_value(arg) for arg in args]
        letters = "".join(map(_letter, values))
        if letters != self._parameters:
            raise TypeError(f"{self._name} has parameters {self._parameters}, given {letters}")
        arrays = [np.asarray(value) for value in values]  # alive while the kernel runs
        arguments = (_Argument * len(values))(*map(_argument, values, arrays))
        launch = _Launch(blocks, threads, shared, order == "descending", seconds, len(values), arguments)
        if message := self._launch(ctypes.byref(launch)):
            raise EmulationError(f"{self._name}: {message.decode()}")


def compile_kernel(source: str, name: str, include: Path = KERNELS) -> EmulatedKernel:
    """Compile CUDA C++ that has extern "C" __global__ void `name`, and may include the headers of a folder."""
    return compile_kernels(source, [name], include)[name]


def compile_kernels(source: str, names: Sequence[str], include: Path = KERNELS) -> dict[str, EmulatedKernel]:
    """Several kernels of one text, for little more time than one."""
    headers = tuple(sorted(include.glob("*.cuh")))
    library = _library(source, tuple(names), headers, _digest([*headers, *EMULATOR.iterdir()]))
    return {name: EmulatedKernel(library, name) for name in names}


@functools.cache
def _library(source: str, names: tuple[str, ...], headers: tuple[Path, ...], digest: str) -> Path:
    """The shared library for kernels; `digest` is of the headers, which may change."""
    folder = Path(tempfile.mkdtemp(dir=_folder_of_session().name))
    for file in (*EMULATOR.iterdir(), *(path for path in headers if not (EMULATOR / path.name).exists())):
        (folder / file.name).symlink_to(file.resolve())  # in one folder, so that headers there find our primitives.cuh
    emulated = "\n".join(f"EMULATE({name})" for name in names)
    (folder / "kernel.cpp").write_text(f'#include "launch.h"\n#line 1 "{names[0]}.cu"\n{source}\n{emulated}\n')
    command = [*compiler(), *OPTIONS, *CHECKS, "kernel.cpp", "-o", "kernel.so"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"compiling {', '.join(names)} failed:\n{done.stderr[:4000]}")
    return folder / "kernel.so"


def compiler() -> list[str]:
    """Preferably the one that is the same everywhere."""
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc"]
    found = shutil.which("clang++") or shutil.which("g++")
    return [found] if found else []


needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or not compiler(), reason="needs Linux, and the ziglang wheel or a C++ compiler"
)


@functools.cache
def _folder_of_session() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="mlcgen-cuda-emulator-")


def _digest(files: Sequence[Path]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _dim3(size: Dim3) -> tuple[int, ...]:
    sizes = (size,) if isinstance(size, int) else size
    return (*sizes, 1, 1)[:3]


def _value(arg: Argument) -> "npt.NDArray[np.generic] | np.generic | None":
    if isinstance(arg, int):
        return np.int32(arg)
    return np.float32(arg) if isinstance(arg, float) and not isinstance(arg, np.generic) else arg


def _letter(value: "npt.NDArray[np.generic] | np.generic | None") -> str:
    """As in launch.h."""
    if value is None or isinstance(value, np.ndarray):
        return "p"
    return {"f4": "f", "f8": "d"}.get(value.dtype.str[1:], str(value.dtype.itemsize))


def _argument(value: "npt.NDArray[np.generic] | np.generic | None", array: "npt.NDArray[np.generic]") -> _Argument:
    """As in launch.h. `array` has the value's bytes."""
    if value is None:
        return _Argument(ARRAY, None, 0)
    assert array.flags.c_contiguous
    kind = (ARRAY if array.flags.writeable else CONSTANT_ARRAY) if isinstance(value, np.ndarray) else SCALAR
    return _Argument(kind, array.ctypes.data, array.nbytes)
