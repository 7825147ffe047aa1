"""From object files to a shared library: a system compiler when there is one, else the ziglang wheel's linker."""

import importlib.util
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlcgen.errors import CompileError

_TRIPLES = {"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"}


def link_library(executable: Any, library: Path, arch: str) -> None:
    """Write a built VM executable as a shared library for `arch`. Raises CompileError with the linker's words."""
    command = linker(arch)

    def run(output: str, objects: Sequence[str], options: Any = None, **_: Any) -> None:
        done = subprocess.run([*command, "-shared", "-fPIC", "-o", output, *objects], capture_output=True, text=True)
        if done.returncode:
            raise CompileError(f"linking {library.name} with {command[0]} failed: {done.stderr.strip()[-300:]}")

    library.parent.mkdir(parents=True, exist_ok=True)
    executable.export_library(str(library), fcompile=run)


def linker(arch: str) -> list[str]:
    """The command that links for `arch`: cc or gcc here, a cross compiler by its usual name, or zig."""
    names = ("cc", "gcc", "clang") if arch == platform.machine() else (f"{_TRIPLES[arch]}-gcc",)
    for name in names:
        if found := shutil.which(name):
            return [found]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc", "-target", _TRIPLES[arch]]
    raise CompileError(f"no linker for {arch}: install a C compiler, or pip install mlcgen[cross]")
