"""Running kernels cross-compiled for aarch64 under QEMU, each in a process of its own (emulator/main.c)."""

import importlib.util
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi

from mlcgen.targets.cpu import cpu_target

from .cpu_build import MakeKernel, compile_for

MAIN = Path(__file__).parent / "emulator" / "main.c"
# Variant of the cpu target -> a CPU of QEMU's with just enough, so that an instruction too new for the variant is
# illegal. No model between cortex-a76 and max has i8mm.
CPUS = {"aarch64": "cortex-a53", "aarch64-dotprod": "cortex-a76", "aarch64-i8mm": "max"}
DLPACK_CODES = {"i": 0, "u": 1, "f": 2}

HAS_EMULATOR = shutil.which("qemu-aarch64") is not None and importlib.util.find_spec("ziglang") is not None
needs_emulator = pytest.mark.skipif(
    not HAS_EMULATOR, reason="needs qemu-aarch64 (Debian's qemu-user) and the ziglang wheel"
)
without_emulator = pytest.mark.skipif(HAS_EMULATOR, reason="the kernel is also run, see test_aarch64.py")


def each_variant(name: str, values: Sequence[Any], newer: Sequence[Any], ids: Callable[[Any], str] = str) -> Any:
    """Parameters `name` and variant: every value on the first, those in `newer` also on the others, which have only
    instructions for int8 more."""
    pairs = [(value, variant) for variant in CPUS for value in values if variant == "aarch64" or value in newer]
    params = [pytest.param(value, variant, id=f"{ids(value)}-{variant}") for value, variant in pairs]
    return pytest.mark.parametrize((name, "variant"), params)


def emulated(variant: str, make: MakeKernel, folder: Path) -> Callable[..., None]:
    """The kernel compiled for a variant, as a function of NumPy arrays, which it may write to. Files go to `folder`."""
    target = tvm.target.Target(cpu_target(variant).tvm)
    program = link(compile_for(target, make), folder)

    def run(*arrays: np.ndarray) -> None:
        execute(program, CPUS[variant], arrays)

    return run


def link(kernel: tvm.runtime.Executable, folder: Path) -> Path:
    """A static program: the kernel's object file and main.c."""
    objects, program = folder / "kernel.o", folder / "kernel"
    kernel.mod.write_to_file(str(objects), "o")
    headers = (tvm.libinfo.find_include_path(), tvm_ffi.libinfo.find_include_path())
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-none", "-ffreestanding", "-nostdlib", "-O2"]
    _check_output([*zig, *(f"-I{path}" for path in headers), str(MAIN), objects.name, "-o", program.name], folder)
    return program


def execute(program: Path, cpu: str, arrays: Sequence[np.ndarray]) -> None:
    """Run on one of QEMU's CPUs, and copy what the kernel leaves in its arguments back into the arrays."""
    command = ["qemu-aarch64", "-cpu", cpu, str(program)]
    results = _check_output(command, program.parent, b"".join(map(_argument, arrays)))
    for array in arrays:
        array[...] = np.frombuffer(results[: array.nbytes], array.dtype).reshape(array.shape)
        results = results[array.nbytes :]
    assert not results


def _argument(array: np.ndarray) -> bytes:
    header = [DLPACK_CODES[array.dtype.kind], 8 * array.itemsize, array.ndim, *array.shape]
    return np.int64(header).tobytes() + array.tobytes()


def _check_output(command: list[str], folder: Path, stdin: bytes = b"") -> bytes:
    """Runs in `folder`, where QEMU may leave a core dump."""
    done = subprocess.run(command, cwd=folder, input=stdin, capture_output=True)
    if done.returncode:
        status = signal.strsignal(-done.returncode) if done.returncode < 0 else f"status {done.returncode}"
        raise RuntimeError(f"{Path(command[0]).name} failed: {status}: {done.stderr.decode().strip()}")
    return done.stdout
