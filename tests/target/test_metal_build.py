"""Metal's text of the kernels, as far as compilers that are not Metal's can judge it."""

import functools
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlcgen.targets.metal_build import metal_kernel, metal_source
from mlcgen.targets.wgsl_to_cpp import Module, modules

from .emulate_metal import STAND_IN
from .test_wgsl_to_cpp import codes

CPP14 = ("-x", "c++", "-std=c++14", "-pedantic-errors", "-nostdinc", "-Wno-undefined-internal", "-fsyntax-only")
# C++ for OpenCL checks address spaces much as Metal does.
ADDRESS_SPACES = ("-cc1", "-x", "cl", "-cl-std=clc++", "-triple", "spir64", "-fsyntax-only")
THREADGROUP_BYTES = 32768  # of any of Apple's GPUs
needs_zig = pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="needs the ziglang wheel")


@functools.cache
def translated() -> list[Module]:
    return modules(codes())


def compile_text(text: str, options: tuple[str, ...], folder: Path) -> str:
    """What the compiler says."""
    (folder / "kernels.metal").write_text(text)
    command = [sys.executable, "-m", "ziglang", "clang", *options, "-Wno-unknown-attributes", "-isystem", str(STAND_IN)]
    return subprocess.run([*command, "kernels.metal"], cwd=folder, capture_output=True, text=True).stderr


@needs_zig
@pytest.mark.parametrize("options", [CPP14, ADDRESS_SPACES], ids=["C++14", "address spaces"])
def test_it_compiles(options: tuple[str, ...], tmp_path: Path) -> None:
    assert compile_text(metal_source(codes()), options, tmp_path) == ""


@needs_zig
def test_threadgroup_memory_is_what_every_gpu_has(tmp_path: Path) -> None:
    text = metal_source(codes())
    for module in translated():
        sizes = "".join(f" + sizeof({module.struct}::{name}_type)" for name in module.workgroup)
        text += f'static_assert(0{sizes} <= {THREADGROUP_BYTES}, "{module.name}");\n'
    assert compile_text(text, CPP14, tmp_path) == ""
    assert "static assertion failed" in compile_text(text + 'static_assert(sizeof(int) == 1, "");', CPP14, tmp_path)


@needs_zig
def test_address_spaces_are_checked(tmp_path: Path) -> None:
    wrong = metal_source(codes()) + "kernel void f(device uint* a, threadgroup uint* b) { a = b; }\n"
    assert "changes address space" in compile_text(wrong, ADDRESS_SPACES, tmp_path)


def test_pointers_and_references_name_their_address_space() -> None:
    """OpenCL has a space for those that do not; Metal has not."""
    for module in translated():
        for line in module.text.splitlines():
            if re.search(r"^\S.*[*&]\s*\w+;$", line):
                assert line.startswith(("GLOBAL ", "WORKGROUP ", "UNIFORM(")), line
            if line.startswith("INLINE"):
                assert not re.search(r"[*&]", line[: line.index(")")]), line


def test_arguments() -> None:
    """Buffers have the indices of their bindings, the struct of numbers the next."""
    for module in translated():
        head = metal_kernel(module).split(") {\n")[0]
        indices = re.findall(r"(device|constant) [^,]*\[\[buffer\((\d+)\)\]\]", head)
        spaces = ["device"] * len(module.buffers) + ["constant"] * bool(module.numbers)
        assert indices == [(space, str(i)) for i, space in enumerate(spaces)]
        assert f"[[max_total_threads_per_threadgroup({module.threads})]]\nkernel void {module.name}(" in head


def test_a_kernel() -> None:
    module = next(module for module in translated() if module.name == "argmax_of_parts")
    assert metal_kernel(module) == (
        "[[max_total_threads_per_threadgroup(256)]]\n"
        "kernel void argmax_of_parts(device f32* logits [[buffer(0)]], device u32* parts [[buffer(1)]], "
        "constant argmax_of_parts_module::Numbers& numbers [[buffer(2)]], "
        "uint3 workgroup_id [[threadgroup_position_in_grid]], "
        "uint local_invocation_index [[thread_index_in_threadgroup]]) {\n"
        "  threadgroup argmax_of_parts_module::keys_type keys;\n"
        "  threadgroup argmax_of_parts_module::places_type places;\n"
        "  argmax_of_parts_module{logits, parts, numbers, keys, places}"
        ".argmax_of_parts(workgroup_id, local_invocation_index);\n"
        "}\n"
    )
