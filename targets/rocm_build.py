"""Code objects for AMD's GPUs: translated kernels through the clang and lld that the package ziglang holds."""

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from mlcgen.errors import CompileError
from mlcgen.targets.device_kernel import Code
from mlcgen.targets.wgsl_to_cpp import Module, modules, prelude

ARCHITECTURES = ("gfx90a", "gfx942", "gfx1100", "gfx1201")  # MI200, MI300, RX 7900, RX 9070
# Version 5 is what every HIP runtime from ROCm 5.7 on loads. A workgroup stays on one compute unit (cumode), so that
# its wavefronts share a cache. Integers wrap, as WGSL's do. Loops are unrolled where the kernels' templates do so: more
# of it costs registers.
COMPILE = (
    *("clang", "-x", "c++", "-std=c++17", "--target=amdgcn-amd-amdhsa", "-mcode-object-version=5", "-mcumode", "-O3"),
    *("-ffreestanding", "-nostdinc", "-nogpulib", "-fwrapv", "-fno-exceptions", "-fno-rtti", "-ffp-contract=fast"),
    "-fno-unroll-loops",
    *("-Wall", "-Werror", "-Wno-unused", "-c", "kernels.cpp", "-o", "kernels.o"),
)
LINK = ("ld.lld", "-shared", "--no-undefined", "kernels.o", "-o", "kernels.co")


def hip_source(codes: Mapping[str, Code]) -> str:
    """A model's kernels as one text."""
    return prelude("hip") + "\n".join(module.text + hip_kernel(module) for module in modules(codes))


def hip_kernel(module: Module) -> str:
    """The kernel of a translated module: its arguments are the buffers' addresses and then the numbers."""
    params = [f"GLOBAL {'const ' if b.is_read_only else ''}{b.type}* {b.name}" for b in module.buffers]
    params += [f"{type_} {name}" for name, type_ in module.fields.items()]
    members = [b.name for b in module.buffers]
    if module.fields:
        members.append(f"{{{', '.join(module.fields)}}}")
    members += module.workgroup
    memory = "".join(f"  WORKGROUP_MEMORY({module.struct}::{name}_type, {name});\n" for name in module.workgroup)
    builtins = {"num_workgroups": f"num_workgroups({module.threads})"}
    entry = ", ".join(builtins.get(name, f"{name}()") for name in module.entry)
    call = f"  {module.struct}{{{', '.join(members)}}}.{module.name}({entry});\n"
    return f"KERNEL({module.threads}) {module.name}({', '.join(params)}) {{\n{memory}{call}}}\n"


def compile_hip(source: str, arch: str) -> bytes:
    """The code object (ELF) with all kernels of a text. Raises CompileError with what the compiler says."""
    if importlib.util.find_spec("ziglang") is None:
        raise CompileError("compiling for AMD's GPUs needs the package ziglang; pip install 'mlcgen[cross]'")
    with tempfile.TemporaryDirectory(prefix="mlcgen-rocm-") as folder:
        Path(folder, "kernels.cpp").write_text(source)
        _run([*COMPILE, f"-mcpu={arch}"], folder, arch)
        _run(LINK, folder, arch)
        return Path(folder, "kernels.co").read_bytes()


def _run(command: list[str] | tuple[str, ...], folder: str, arch: str) -> None:
    done = subprocess.run([sys.executable, "-m", "ziglang", *command], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"kernels cannot be compiled for {arch}: {done.stderr.strip()[:2000]}")
