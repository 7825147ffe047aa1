"""CUDA C++ to machine code for one GPU architecture, on any machine: NVRTC, NVIDIA's compiler as a library."""

import ctypes
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlcgen.errors import CompileError

INSTALL = "pip install 'mlcgen[cuda]'"
KERNELS = Path(__file__).resolve().parent / "targets" / "cuda_kernels"


def compile_cuda(source: str, arch: str) -> tuple[bytes, str]:
    """(machine code, the assembler's report of registers and spills) of a CUDA C++ text for "sm_90" and the like; for
    "compute_80" and the like assembly (PTX) and no report.

    Raises CompileError with the compiler's words, or with what to install.
    """
    library = _library()
    # Hopper's own instructions exist under its architecture-specific name only.
    name = f"{arch}a" if arch in ("sm_90", "sm_100") else arch
    options = [f"--gpu-architecture={name}", "--std=c++17", "--device-as-default-execution-space"]
    options += [f"-I{KERNELS}", f"-I{_headers()}"]
    options += [] if arch.startswith("compute") else ["--ptxas-options=-v"]
    program = ctypes.c_void_p()
    _check(library, library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"mlcgen.cu", 0, None, None))
    try:
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = library.nvrtcCompileProgram(program, len(options), arguments)
        log = _text(library, program, "ProgramLog")
        if status:
            errors = [line for line in log.splitlines() if "error" in line] or [log[-500:]]
            raise CompileError(f"NVRTC could not compile the kernels for {arch}: {errors[0][:500]}")
        return _bytes(library, program, "PTX" if arch.startswith("compute") else "CUBIN"), log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def resources(log: str) -> dict[str, dict[str, int]]:
    """Kernel -> {"registers", "spill_bytes"}, from the assembler's report."""
    found: dict[str, dict[str, int]] = {}
    for block in re.split(r"Compiling entry function '", log)[1:]:
        registers, spills = re.search(r"Used (\d+) registers", block), re.search(r"(\d+) bytes spill stores", block)
        if registers:
            name = block.split("'", 1)[0]
            found[name] = {"registers": int(registers[1]), "spill_bytes": int(spills[1]) if spills else 0}
    return found


def find_library() -> Path | None:
    """NVRTC's library: of NVIDIA's wheel, else of a toolkit that the system's loader finds."""
    for folder in _wheel_folders():
        for file in sorted((folder / "lib").glob("libnvrtc.so*")):
            return file
    for name in ("libnvrtc.so.13", "libnvrtc.so.12"):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return Path(name)
    return None


def _library() -> Any:
    file = find_library()
    if file is None:
        raise CompileError(f"the CUDA compiler NVRTC is not installed: {INSTALL}")
    for builtins in sorted(file.parent.glob("libnvrtc-builtins.so*")) if file.is_absolute() else ():
        ctypes.CDLL(str(builtins))  # NVRTC asks the loader for it by name, which then knows it
    return ctypes.CDLL(str(file))


def _headers() -> Path:
    for folder in (*_wheel_folders(), Path("/usr/local/cuda")):
        if (folder / "include" / "cuda_fp16.h").is_file():
            return folder / "include"
    raise CompileError(f"CUDA's headers are not installed: {INSTALL}")


def _wheel_folders() -> Sequence[Path]:
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (spec.submodule_search_locations or [])] if spec else []
    return [folder for root in roots for folder in (root / "cu13", root / "cuda_nvrtc") if folder.is_dir()]


def _bytes(library: Any, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(library, getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _text(library: Any, program: ctypes.c_void_p, what: str) -> str:
    return _bytes(library, program, what).decode(errors="replace").rstrip("\0")


def _check(library: Any, status: int) -> None:
    if status:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CompileError(f"NVRTC failed: {library.nvrtcGetErrorString(status).decode()}")
