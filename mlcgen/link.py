"""From object files to a shared library: a system compiler when there is one, else the ziglang wheel's linker."""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlcgen.errors import CompileError
from mlcgen.runtime.cpu import host_arch

_TRIPLES = {"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"}


def link_library(executable: Any, library: Path, arch: str) -> None:
    """Write a built VM executable as a shared library for `arch`. Raises CompileError with the linker's words."""
    command = linker(arch)

    def run(output: str, objects: Sequence[str], options: Any = None, **_: Any) -> None:
        with _zig_cache() if "ziglang" in command else contextlib.nullcontext() as environment:
            line = [*command, "-shared", "-fPIC", "-o", output, *objects]
            done = subprocess.run(line, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise CompileError(f"linking {library.name} with {command[0]} failed: {done.stderr.strip()[-300:]}")

    library.parent.mkdir(parents=True, exist_ok=True)
    executable.export_library(str(library), fcompile=run)


def linker(arch: str) -> list[str]:
    """The command that links for `arch`: cc or gcc here, a cross compiler by its usual name, or zig."""
    names = ("cc", "gcc", "clang") if arch == host_arch() else (f"{_TRIPLES[arch]}-gcc",)
    for name in names:
        if found := shutil.which(name):
            return [found]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc", "-target", _TRIPLES[arch]]
    raise CompileError(f"no linker for {arch}: install a C compiler, or pip install mlcgen[cross]")


@contextlib.contextmanager
def _zig_cache() -> Iterator[dict[str, str]]:
    """An environment in which zig can keep the parts of libc that it builds, also where the home is read-only."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    usual = Path(os.environ.get("ZIG_GLOBAL_CACHE_DIR") or f"{home}/zig")
    with contextlib.ExitStack() as stack:
        try:
            usual.mkdir(parents=True, exist_ok=True)
            stack.enter_context(tempfile.TemporaryFile(dir=usual))
            cache = str(usual)
        except OSError:
            cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="mlcgen-zig-"))
        yield {**os.environ, "ZIG_GLOBAL_CACHE_DIR": cache}
